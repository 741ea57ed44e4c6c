"""Which block type each tensor of a file type gets, by the rules of llama.cpp's quantizer (src/llama-quant.cpp, v0.5).

A file type such as Q4_K_M names a mix: most matrices get its main block type, and those that suffer most get more bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from hqq_core.formats.depth import more_bits
from hqq_core.formats.gguf.blocks import BLOCK_TYPES
from hqq_core.formats.gguf.file_types import main_type

# What takes their place where the columns fill no super-block.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True, slots=True)
class Mix:
    """A file type in one model.

    Parameters
    ----------
    file_type : str
        By its full name.
    n_layers : int
    grouped : int
        Query heads that share a key head.
    tied : bool
        The embedding is the output head, too.
    large : bool
        A model that llama.cpp takes for one of 70B parameters, whose attn_v is small beside the rest.
    """

    file_type: str
    n_layers: int
    grouped: int
    tied: bool
    large: bool = False

    def block_type(self, name: str, columns: int) -> str | None:
        """Block type of a matrix by its GGUF name, such as `blk.0.attn_v.weight`; None: its columns fill no block."""
        kind, layer = _kind(name)
        wanted = self._wanted(kind, layer, columns)
        if columns % _size(wanted):
            wanted = _FALLBACKS.get(wanted, wanted)
        return None if columns % _size(wanted) else wanted

    def _wanted(self, kind: str, layer: int, columns: int) -> str:
        main = main_type(self.file_type)
        if kind == "output" or (kind == "token_embd" and self.tied):
            return "Q8_0" if columns % _size(main) or main == "Q8_0" else "Q6_K"
        if kind == "token_embd":
            return "Q4_K" if main == "TQ2_0" else main
        if kind in ("attn_v", "attn_qkv"):
            found = self._value(layer)
            return "Q5_K" if self.large and found in ("Q3_K", "Q4_K") else found
        if kind == "ffn_down":
            return self._down(layer)
        if kind == "attn_output":
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.file_type, main)
        return main

    def _value(self, layer: int) -> str:
        """Values are what attention lets through; the projection that gives them, alone or with queries and keys."""
        chosen = {
            "Q2_K": "Q4_K" if self.grouped >= 4 else "Q3_K",
            "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if layer < 4 else "Q4_K",
            "Q4_K_M": "Q6_K" if more_bits(layer, self.n_layers) else "Q4_K",
            "Q5_K_M": "Q6_K" if more_bits(layer, self.n_layers) else "Q5_K",
        }
        return chosen.get(self.file_type, main_type(self.file_type))

    def _down(self, layer: int) -> str:
        chosen = {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q5_K" if layer < self.n_layers // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if layer < self.n_layers // 8 else "Q4_K",
            "Q4_K_M": "Q6_K" if more_bits(layer, self.n_layers) else "Q4_K",
            "Q5_K_M": "Q6_K" if more_bits(layer, self.n_layers) else "Q5_K",
        }
        return chosen.get(self.file_type, main_type(self.file_type))


def _size(block_type: str) -> int:
    return BLOCK_TYPES[block_type].block_size


def _kind(name: str) -> tuple[str, int]:
    """(attn_v, 3) of `blk.3.attn_v.weight`; layer -1 outside the layers."""
    parts = name.split(".")
    return (parts[2], int(parts[1])) if parts[0] == "blk" else (parts[0], -1)
