"""MLX's affine layout, which transformers' `metal` has under another name: dense bit streams, scales and offsets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hqq_core.verify._bits import unpack_stream
from hqq_core.verify._matrix import Grouped
from hqq_core.verify.readers._module import Module


@dataclass(frozen=True, slots=True)
class AffineReader:
    """Reads weight, scales and offsets; `others` are widths of modules that have another."""

    nbits: int
    group_size: int
    offsets: str
    others: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_mlx(cls, settings: dict[str, Any]) -> AffineReader:
        """From mlx-lm's `quantization`."""
        if settings["mode"] != "affine":
            raise ValueError(f"mode {settings['mode']!r}: wanted 'affine'")
        own = {module: fields for module, fields in settings.items() if isinstance(fields, dict)}
        for module, fields in own.items():
            if (fields["mode"], fields["group_size"]) != ("affine", settings["group_size"]):
                raise ValueError(f"{module}: {fields}: wanted mode 'affine' and group size {settings['group_size']}")
        widths = {module: fields["bits"] for module, fields in own.items()}
        return cls(settings["bits"], settings["group_size"], "biases", widths)

    @classmethod
    def of_metal(cls, settings: dict[str, Any]) -> AffineReader:
        """From transformers' quantization_config."""
        return cls(settings["bits"], settings["group_size"], "qbiases")

    @property
    def parts(self) -> tuple[str, ...]:
        """Three for each weight."""
        return ("weight", "scales", self.offsets)

    def read(self, module: Module) -> Grouped:
        """As wide as the scales say."""
        rows, n_groups = module.shape("scales", 2)
        columns = n_groups * self.group_size
        nbits = self.others.get(module.name, self.nbits)
        packed = module.words("weight", "U32", rows, columns * nbits // 32)
        scale, offset = (module.floats(part, rows, n_groups) for part in ("scales", self.offsets))
        return Grouped(
            (rows, columns),
            1,
            lambda start, stop: unpack_stream(packed[start:stop], nbits),
            scale.ravel(),
            offset.ravel(),
            is_offset=True,
        )
