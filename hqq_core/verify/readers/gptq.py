"""GPTQ checkpoints of version 1, symmetric: inputs along the rows, packed along them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hqq_core.verify._bits import unpack_stream
from hqq_core.verify._matrix import Grouped
from hqq_core.verify.readers._module import Module


@dataclass(frozen=True, slots=True)
class GptqReader:
    """Reads qweight, qzeros, scales and g_idx."""

    nbits: int
    group_size: int

    @classmethod
    def of(cls, settings: dict[str, Any]) -> GptqReader:
        """From a quantization_config."""
        if (settings["checkpoint_format"], settings["sym"], settings["desc_act"]) != ("gptq", True, False):
            raise ValueError("wanted checkpoint_format 'gptq', sym, and no desc_act")
        return cls(settings["bits"], settings["group_size"])

    @property
    def parts(self) -> tuple[str, ...]:
        """Four for each weight."""
        return ("qweight", "qzeros", "scales", "g_idx")

    def read(self, module: Module) -> Grouped:
        """Transposed back to (outputs, inputs); stored zero points are one less."""
        n_groups, rows = module.shape("scales", 2)
        columns = n_groups * self.group_size
        words = module.words("qweight", "I32", columns * self.nbits // 32, rows)
        order = module.words("g_idx", "I32", columns)
        in_order = bool((order == np.arange(columns) // self.group_size).all())
        module.check("g_idx", in_order, "inputs out of order", f"groups of {self.group_size} in a row")
        points = unpack_stream(module.words("qzeros", "I32", n_groups, -(-rows * self.nbits // 32)), self.nbits)
        zero = points[:, :rows].T.astype(np.float32) + 1
        module.check("qzeros", not points[:, rows:].any(), "bits set behind the last output", "unused bits of 0")
        scale = module.floats("scales", n_groups, rows)
        return Grouped(
            (rows, columns),
            1,
            lambda start, stop: unpack_stream(np.ascontiguousarray(words[:, start:stop].T), self.nbits),
            np.ascontiguousarray(scale.T).ravel(),
            zero.ravel(),
        )
