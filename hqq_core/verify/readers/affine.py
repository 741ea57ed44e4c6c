"""MLX's affine layout, which transformers' `metal` has under another name: dense bit streams, scales and offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hqq_core.verify._bits import unpack_stream
from hqq_core.verify._matrix import Grouped
from hqq_core.verify.readers._module import Module


@dataclass(frozen=True, slots=True)
class AffineReader:
    """Reads weight, scales and offsets."""

    nbits: int
    group_size: int
    offsets: str

    @classmethod
    def of_mlx(cls, settings: dict[str, Any]) -> AffineReader:
        """From mlx-lm's `quantization`."""
        if settings["mode"] != "affine":
            raise ValueError(f"mode {settings['mode']!r}: wanted 'affine'")
        return cls(settings["bits"], settings["group_size"], "biases")

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
        packed = module.words("weight", "U32", rows, columns * self.nbits // 32)
        scale, offset = (module.floats(part, rows, n_groups) for part in ("scales", self.offsets))
        return Grouped(
            (rows, columns),
            1,
            lambda start, stop: unpack_stream(packed[start:stop], self.nbits),
            scale.ravel(),
            offset.ravel(),
            is_offset=True,
        )
