"""humming's own layout: dense bit streams along the inputs, scales and real zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hqq_core.verify._bits import unpack_stream
from hqq_core.verify._matrix import Grouped
from hqq_core.verify.readers._module import Module


@dataclass(frozen=True, slots=True)
class HummingReader:
    """Reads weight, weight_scale and zero_point."""

    nbits: int
    group_size: int

    @classmethod
    def of(cls, settings: dict[str, Any]) -> HummingReader:
        """From a quantization_config."""
        kind, nbits = settings["b_dtype"][:4], int(settings["b_dtype"][4:])
        if kind != "uint" or settings["has_zero_point"] is not True or settings["is_fp_zero_point"] is not True:
            raise ValueError("wanted unsigned integers, and zero points that are floats")
        return cls(nbits, settings["weight_scale_group_size"])

    @property
    def parts(self) -> tuple[str, ...]:
        """Three for each weight."""
        return ("weight", "weight_scale", "zero_point")

    def read(self, module: Module) -> Grouped:
        """As wide as the scales say."""
        rows, n_groups = module.shape("weight_scale", 2)
        columns = n_groups * self.group_size
        packed = module.words("weight", "I32", rows, columns * self.nbits // 32)
        scale, zero = (module.floats(part, rows, n_groups).ravel() for part in ("weight_scale", "zero_point"))
        return Grouped(
            (rows, columns), 1, lambda start, stop: unpack_stream(packed[start:stop], self.nbits), scale, zero
        )
