"""Errors of quantized tensors, and what a weight costs."""

from __future__ import annotations

import math


def relative_error(squared_error: float, squared_norm: float) -> float | None:
    """Relative Frobenius error ||W - W_r|| / ||W||; None where W is zero and W_r is not."""
    if squared_error == 0:
        return 0.0
    return math.sqrt(squared_error / squared_norm) if squared_norm else None


def sqnr_db(squared_error: float, squared_norm: float) -> float | None:
    """Signal to quantization noise ratio in dB; None where there is no noise or no signal."""
    if squared_error == 0 or squared_norm == 0:
        return None
    return 10 * math.log10(squared_norm / squared_error)


def bits_per_weight(nbytes: int, numel: int) -> float:
    """Stored bits per weight, scales, zeros and all."""
    return 8 * nbytes / numel if numel else 0.0
