"""Codes out of packed words, by looking up a few codes at once: numpy on bytes, at about a nanosecond a code."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INDEX_BITS = {1: 8, 2: 8, 3: 12, 4: 8, 5: 10, 6: 12, 7: 7}  # whole codes that one look-up gives


def unpack_stream(words: NDArray[Any], nbits: int) -> NDArray[np.uint8]:
    """Codes of a bit stream along the last axis, lowest bit first.

    Parameters
    ----------
    words : ndarray [shape=(..., n)], of any little-endian words
    nbits : int
        1 to 8.

    Returns
    -------
    ndarray [shape=(..., m)], uint8
        All codes that begin in these words; the last ones may be padding, and what is missing of the very last is zero.
    """
    stream = np.ascontiguousarray(words).view(np.uint8)
    if nbits == 8:
        return stream
    table = _table(nbits)
    index = stream if _INDEX_BITS[nbits] == 8 else _indices(stream, _INDEX_BITS[nbits])
    return np.take(table, index).view(np.uint8)


def _indices(stream: NDArray[np.uint8], nbits: int) -> NDArray[np.uint16]:
    """The bit stream in pieces of `nbits` bits, 12 at most."""
    n = 8 // math.gcd(nbits, 8)
    period = n * nbits // 8  # bytes that n pieces fill
    missing = -stream.shape[-1] % period
    if missing:
        stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, missing)])
    blocks = stream.reshape(*stream.shape[:-1], -1, period).astype(np.uint16)
    index = np.empty((*blocks.shape[:-1], n), np.uint16)
    for i in range(n):
        byte, shift = divmod(i * nbits, 8)
        word = blocks[..., byte] | (blocks[..., byte + 1] << 8 if shift + nbits > 8 else 0)
        index[..., i] = (word >> shift) & ((1 << nbits) - 1)
    return index.reshape(*stream.shape[:-1], -1)


@cache
def _table(nbits: int) -> NDArray[Any]:
    """For each piece of the stream its codes, one a byte, as one word."""
    size = _INDEX_BITS[nbits]
    codes = np.arange(1 << size)[:, None] >> np.arange(0, size, nbits) & ((1 << nbits) - 1)
    return codes.astype(np.uint8).view(f"<u{size // nbits}")[:, 0]
