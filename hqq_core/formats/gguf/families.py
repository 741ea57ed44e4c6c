"""Model families that GGUF holds here: the name of each in llama.cpp, and what its converter does to their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hqq_core.architectures import text_config


@dataclass(frozen=True, slots=True)
class Family:
    """What is special about a family.

    Parameters
    ----------
    architecture : str
        Its name in `gguf.MODEL_ARCH`.
    activation : tuple of str
        What the feed-forward layers of llama.cpp compute, in the words of config.json.
    permuted : bool
        Rows of the query and key projections are stored in pairs as the rotation takes them, not in halves.
    norm_offset : float
        What is added to the gains of norms, which the model itself adds in another place.
    windows : int
        Every how many layers attention sees all, the others a window; 0: all do.
    """

    architecture: str
    activation: tuple[str, ...] = ("silu", "swish")
    permuted: bool = False
    norm_offset: float = 0.0
    windows: int = 0

    def gain(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of one axis as float32, and with the offset where it is a norm's gain."""
        return tensor.float() + (self.norm_offset if name.endswith("norm.weight") else 0.0)


_GELU = ("gelu_pytorch_tanh",)
FAMILIES = {
    "llama": Family("LLAMA", permuted=True),
    "mistral": Family("LLAMA", permuted=True),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
    "gemma": Family("GEMMA", (*_GELU, "gelu"), norm_offset=1.0),
    "gemma2": Family("GEMMA2", _GELU, norm_offset=1.0, windows=2),
    "gemma3_text": Family("GEMMA3", _GELU, norm_offset=1.0, windows=6),
    "phi3": Family("PHI3"),
}


def family_of(config: dict[str, Any]) -> Family | None:
    """The family of a config.json, or None: not held here."""
    if text_config(config) is not config:
        return None  # with vision or audio
    return FAMILIES.get(str(config.get("model_type")))
