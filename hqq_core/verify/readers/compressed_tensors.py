"""compressed-tensors, pack-quantized: dense bit streams, codes along the inputs and zero points along the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hqq_core.verify._bits import unpack_stream
from hqq_core.verify._matrix import Grouped
from hqq_core.verify.readers._module import Module


@dataclass(frozen=True, slots=True)
class CompressedTensorsReader:
    """Reads weight_packed, weight_scale, weight_shape and, unless symmetric, weight_zero_point."""

    nbits: int
    group_size: int
    symmetric: bool

    @classmethod
    def of(cls, settings: dict[str, Any]) -> CompressedTensorsReader:
        """From the one group of a quantization_config."""
        (scheme,) = settings["config_groups"].values()
        weights = scheme["weights"]
        if settings["format"] != "pack-quantized" or weights["strategy"] != "group" or weights["type"] != "int":
            raise ValueError("wanted pack-quantized integers, by group")
        return cls(weights["num_bits"], weights["group_size"], weights["symmetric"])

    @property
    def parts(self) -> tuple[str, ...]:
        """Zero points only where they are not the middle."""
        always = ("weight_packed", "weight_scale", "weight_shape")
        return always if self.symmetric else (*always, "weight_zero_point")

    def read(self, module: Module) -> Grouped:
        """Signed codes are stored from 0 on; so the middle is what symmetric weights have for a zero."""
        rows, columns = (int(size) for size in module.words("weight_shape", "I64", 2))
        fits = rows > 0 < columns and columns % self.group_size == 0 == columns * self.nbits % 32
        module.check("weight_shape", fits, (rows, columns), f"whole groups of {self.group_size}, and whole words")
        n_groups = columns // self.group_size
        packed = module.words("weight_packed", "I32", rows, columns * self.nbits // 32)
        scale = module.floats("weight_scale", rows, n_groups)
        zero = np.full(scale.shape, 1 << (self.nbits - 1), np.float32)
        if not self.symmetric:
            words = module.words("weight_zero_point", "I32", -(-rows * self.nbits // 32), n_groups)
            points = unpack_stream(words.T, self.nbits)
            module.check(
                "weight_zero_point", not points[:, rows:].any(), "bits set behind the last row", "unused bits of 0"
            )
            zero = points[:, :rows].T.astype(np.float32)
        return Grouped(
            (rows, columns),
            1,
            lambda start, stop: unpack_stream(packed[start:stop], self.nbits),
            scale.ravel(),
            zero.ravel(),
        )
