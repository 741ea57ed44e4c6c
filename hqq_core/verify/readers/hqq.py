"""HQQLinear's state dict, encoded for safetensors: codes packed in blocks of rows of the grouped weight, high bits first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqq_core.verify._matrix import Grouped
from hqq_core.verify.readers._module import Module

PACKINGS = {1: "1bit_u8", 2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 5: "8bit_u8", 6: "8bit_u8", 8: "8bit_u8"}
PER_WORD = {"1bit_u8": (8, 1), "2bit_u8": (4, 2), "3bit_32": (10, 3), "4bit_u8": (2, 4), "8bit_u8": (1, 8)}
# The hqq library runs `eval` on these two.
COMPUTE_DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16")
WORD_DTYPES = {"U8": "torch.uint8", "I32": "torch.int32"}
FLAGS = {
    "channel_wise": 1, "optimize": 1, "view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0,
    "encoded_state_dict": 1, "stores_quant_config": 1,
}  # fmt: skip
NUMBERS = ("nbits", "group_size", "axis")
WORDS = ("packing", "compute_dtype", "unpack_view_dtype")


@dataclass(frozen=True, slots=True)
class HqqReader:
    """Reads W_q, scale, zero and the layer's own settings, which must be those of config.json."""

    nbits: int
    group_size: int | None
    axis: int
    round_zero: bool

    @classmethod
    def of(cls, settings: dict[str, Any]) -> HqqReader:
        """From transformers' quantization_config."""
        weights = settings["quant_config"]["weight_quant_params"]
        return cls(weights["nbits"], weights["group_size"], weights["axis"], weights["round_zero"])

    @property
    def parts(self) -> tuple[str, ...]:
        """The weight's three, and the settings."""
        return ("W_q", "scale", "zero", "shape", "round_zero", *FLAGS, *NUMBERS, *WORDS)

    def read(self, module: Module) -> Grouped:
        """As the library unpacks it."""
        shape = tuple(int(size) for size in module.words("shape", "I64", 2))
        module.check("shape", min(shape) > 0, shape, "two sizes")
        group_size = self._settings(module, shape)
        packing, dtype = PACKINGS[self.nbits], "I32" if self.nbits == 3 else "U8"
        rows, columns = (math.prod(shape) // group_size, group_size)[:: 1 if self.axis == 1 else -1]
        per_word, nbits = PER_WORD[packing]
        packed = module.words("W_q", dtype, -(-rows // per_word), columns)
        codes = _Blocks(packed.ravel(), per_word, nbits)
        unused = codes.unused(rows * columns)
        module.check("W_q", not unused, "bits set where no code is", "unused bits of 0")
        side = (rows, 1) if self.axis == 1 else (1, columns)
        scale, zero = (module.floats(part, *side).ravel() for part in ("scale", "zero"))

        def of_rows(start: int, stop: int) -> NDArray[np.uint8]:
            return codes.flat(start * shape[1], stop * shape[1]).reshape(stop - start, shape[1])

        return Grouped(shape, self.axis, of_rows, scale, zero)

    def _settings(self, module: Module, shape: tuple[int, ...]) -> int:
        """The group size of a layer whose settings are sound."""
        size = shape[1] if self.axis == 1 else shape[0]
        group_size = self.group_size or size
        module.check("group_size", size % group_size == 0, group_size, f"a divisor of {size}")
        numbers = {"nbits": self.nbits, "group_size": group_size, "axis": self.axis}
        flags = FLAGS | {"round_zero": int(self.round_zero)}
        for wanted, dtype in ((numbers, "I32"), (flags, "U8")):
            for part, value in wanted.items():
                found = int(module.words(part, dtype))
                module.check(part, found == value, found, value)
        words = {part: module.words(part, "U8", None).tobytes().decode("latin-1") for part in WORDS}
        packed = WORD_DTYPES.get(module.tensors["W_q"].dtype, "")
        module.check("packing", words["packing"] == PACKINGS[self.nbits], words["packing"], PACKINGS[self.nbits])
        module.check("compute_dtype", words["compute_dtype"] in COMPUTE_DTYPES, words["compute_dtype"], COMPUTE_DTYPES)
        module.check("unpack_view_dtype", words["unpack_view_dtype"] == packed, words["unpack_view_dtype"], packed)
        return group_size


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """Codes in the order of the weight: all that lie in the words' high bits, then the next ones."""

    words: NDArray[Any]
    per_word: int
    nbits: int

    def flat(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Codes `start` to `stop`."""
        codes = np.empty(stop - start, np.uint8)
        for block in range(start // len(self.words), -(-stop // len(self.words))):
            first = block * len(self.words)
            begin, end = max(start, first), min(stop, first + len(self.words))
            shift = (self.per_word - 1 - block) * self.nbits
            codes[begin - start : end - start] = self.words[begin - first : end - first] >> shift & (
                (1 << self.nbits) - 1
            )
        return codes

    def unused(self, numel: int) -> bool:
        """Whether a bit is set that belongs to no code."""
        whole = self.per_word * self.nbits
        above = self.words.view(f"u{self.words.itemsize}") >> whole if whole < 8 * self.words.itemsize else None
        behind = self.flat(numel, self.per_word * len(self.words))
        return bool(behind.any() or (above is not None and above.any()))
