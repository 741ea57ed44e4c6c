"""transformers' BitNet layout: quarters of the rows share bytes, the first in the lowest bits; one scale a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqq_core.verify._matrix import Grouped
from hqq_core.verify.readers._module import Module


@dataclass(frozen=True, slots=True)
class BitnetReader:
    """Reads weight and weight_scale."""

    @classmethod
    def of(cls, settings: dict[str, Any]) -> BitnetReader:
        """From a quantization_config whose linear class multiplies by the scale."""
        if (settings["linear_class"], settings["quantization_mode"]) != ("autobitlinear", "offline"):
            raise ValueError("wanted linear_class 'autobitlinear' and quantization_mode 'offline'")
        return cls()

    @property
    def parts(self) -> tuple[str, ...]:
        """Two for each weight."""
        return ("weight", "weight_scale")

    def read(self, module: Module) -> Grouped:
        """0, 1 and 2 stand for -1, 0 and 1 times the scale."""
        height, columns = module.shape("weight", 2)
        packed = module.words("weight", "U8", height, columns)
        scale = np.repeat(module.floats("weight_scale", 1), 4 * height)

        def codes(start: int, stop: int) -> NDArray[np.uint8]:
            quarters = range(start // height, -(-stop // height))
            rows = (packed[max(start - q * height, 0) : stop - q * height] >> 2 * q & 3 for q in quarters)
            return np.concatenate(list(rows))

        return Grouped((4 * height, columns), 1, codes, scale, np.ones_like(scale))
