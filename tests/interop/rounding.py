"""Activations as runtimes with integer kernels round them, each vector before it is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Rounding = Callable[[torch.Tensor], torch.Tensor]
PER_TOKEN = "token"  # BitNet: 8 bit, one scale for each vector
BLOCKS = "blocks"  # ggml: 8 bit, one scale for each block, as long as those of the weights want it


def block_size(block_type: str) -> int:
    """Activations in a scale, beside weights of a ggml type: Q8_K has 256, Q8_0 and Q8_1 32."""
    return 256 if block_type.endswith("_K") or block_type.startswith("TQ") else 32


def in_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Rounded to 255 steps of each block's largest value; ggml keeps a scale of 32 in half precision."""
    blocks = x.unflatten(-1, (-1, size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    held = scale.half().float() if size == 32 else scale
    return ((blocks / torch.where(scale == 0, 1, scale)).round() * held).flatten(-2)


def per_token(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 255 steps of each vector's largest value."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
    return (x / scale).round().clamp(-128, 127) * scale


def round_inputs(model: Any, roundings: Mapping[str, Rounding]) -> None:
    """Let modules round what they are given."""
    for name, rounding in roundings.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, rounding=rounding: (rounding(arguments[0]), *arguments[1:])
        )
