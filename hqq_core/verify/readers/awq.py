"""AutoAWQ's gemm layout: inputs along the rows, eight outputs of 4 bit in a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqq_core.verify._matrix import Grouped
from hqq_core.verify.readers._module import Module

SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of outputs 0, 1, ... in a word


@dataclass(frozen=True, slots=True)
class AwqReader:
    """Reads qweight, qzeros and scales."""

    group_size: int

    @classmethod
    def of(cls, settings: dict[str, Any]) -> AwqReader:
        """From a quantization_config."""
        if (settings["version"], settings["bits"], settings["zero_point"]) != ("gemm", 4, True):
            raise ValueError("wanted version 'gemm', 4 bits and zero points")
        return cls(settings["group_size"])

    @property
    def parts(self) -> tuple[str, ...]:
        """Three for each weight."""
        return ("qweight", "qzeros", "scales")

    def read(self, module: Module) -> Grouped:
        """Transposed back to (outputs, inputs)."""
        n_groups, rows = module.shape("scales", 2)
        columns = n_groups * self.group_size
        module.check("scales", rows % 8 == 0, f"{rows} outputs", "a multiple of 8")
        words = module.words("qweight", "I32", columns, rows // 8)
        zero = _outputs(module.words("qzeros", "I32", n_groups, rows // 8))
        scale = module.floats("scales", n_groups, rows)
        return Grouped(
            (rows, columns),
            1,
            lambda start, stop: _outputs(words[:, start // 8 : -(-stop // 8)])[start % 8 :][: stop - start],
            np.ascontiguousarray(scale.T).ravel(),
            zero.ravel().astype(np.float32),
        )


def _outputs(words: NDArray[Any]) -> NDArray[np.uint8]:
    """int32 [shape=(n, outputs / 8)] -> uint8 [shape=(outputs, n)]."""
    transposed = np.ascontiguousarray(words.T).view(np.uint32)
    codes = np.empty((len(transposed), 8, len(words)), np.uint8)
    for output, shift in enumerate(SHIFTS):
        codes[:, output] = (transposed >> shift) & 15
    return codes.reshape(-1, len(words))
