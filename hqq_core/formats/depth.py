"""Which layers a mix of widths gives more bits: llama.cpp's rule (src/llama-quant.cpp, use_more_bits), which mlx-lm took over."""

from __future__ import annotations


def more_bits(layer: int, n_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
