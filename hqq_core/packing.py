"""Pack codes into words and back: pure, exact inverses.

Two layouts cover the formats written here:

- *dense*: along the last axis as one bit stream, element i at bit i * nbits, lowest bit first (compressed-tensors >= 0.18, MLX).
- *strided*: along the first axis in blocks of equal height, first block in the highest bits (`hqq`, BitPack).

All in numpy on bytes: one thread, so that it runs beside a solver that has the cores.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

STRIDED_PER_WORD = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # hqq leaves 5 and 6 bits unpacked
_STRIDED_WORD = {3: np.int32}  # ten codes of 3 bits in 32; all others use bytes


def pack_dense(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack codes along the last axis into a little-endian bit stream of 32-bit words.

    Parameters
    ----------
    codes : Tensor [shape=(..., n)], uint8
        Codes below 2 ** nbits; not checked.
    nbits : int
        1 .. 8.

    Returns
    -------
    Tensor [shape=(..., ceil(n * nbits / 32))], int32
        Unused high bits of the last word are zero.

    Examples
    --------
    >>> pack_dense(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[801]]
    """
    period, n_bytes = _period(nbits)
    n = codes.shape[-1]
    padded = _pad_last(codes.numpy(), 32)  # 32 codes fill whole words at any width
    blocks = padded.reshape(*padded.shape[:-1], -1, period)  # (..., n_blocks, period)
    packed = np.zeros((*blocks.shape[:-1], n_bytes), dtype=np.uint8)
    for i in range(period):
        byte, shift = divmod(i * nbits, 8)
        packed[..., byte] |= blocks[..., i] << shift
        if shift + nbits > 8:  # the code straddles two bytes
            packed[..., byte + 1] |= blocks[..., i] >> (8 - shift)
    words = packed.reshape(*padded.shape[:-1], -1).view("<i4")
    return torch.from_numpy(np.ascontiguousarray(words[..., : math.ceil(n * nbits / 32)]))


def unpack_dense(packed: torch.Tensor, nbits: int, n: int) -> torch.Tensor:
    """Inverse of `pack_dense`: uint8 [shape=(..., n)] from int32 [shape=(..., ceil(n * nbits / 32))]."""
    period, n_bytes = _period(nbits)
    words = _pad_last(packed.numpy(), nbits)
    blocks = words.view(np.uint8).reshape(*words.shape[:-1], -1, n_bytes)
    codes = np.empty((*blocks.shape[:-1], period), dtype=np.uint8)
    for i in range(period):
        byte, shift = divmod(i * nbits, 8)
        code = blocks[..., byte] >> shift
        if shift + nbits > 8:
            code |= blocks[..., byte + 1] << (8 - shift)
        codes[..., i] = code & ((1 << nbits) - 1)
    return torch.from_numpy(np.ascontiguousarray(codes.reshape(*words.shape[:-1], -1)[..., :n]))


def pack_strided(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack codes along the first axis as `hqq.core.bitpack.BitPack` does.

    Parameters
    ----------
    codes : Tensor [shape=(rows, columns)], uint8
        Codes below 2 ** nbits. `rows` must fill whole bytes; at 3 bits it is padded with zeros to a multiple of ten.
    nbits : int
        1, 2, 3, 4, 5, 6 or 8.

    Returns
    -------
    Tensor [shape=(ceil(rows / STRIDED_PER_WORD[nbits]), columns)], uint8, int32 at 3 bits
    """
    per_word = STRIDED_PER_WORD[nbits]
    if per_word == 1:
        return codes
    height = math.ceil(codes.shape[0] / per_word)
    packed = np.zeros((height, codes.shape[1]), dtype=_STRIDED_WORD.get(nbits, np.uint8))
    for i in range(per_word):
        block = codes.numpy()[i * height : (i + 1) * height]
        packed[: len(block)] |= block.astype(packed.dtype, copy=False) << _strided_shift(nbits, i)
    return torch.from_numpy(packed)


def unpack_strided(packed: torch.Tensor, nbits: int, rows: int) -> torch.Tensor:
    """Inverse of `pack_strided`: uint8 [shape=(rows, columns)]."""
    per_word = STRIDED_PER_WORD[nbits]
    if per_word == 1:
        return packed
    mask = (1 << nbits) - 1
    blocks = [(packed.numpy() >> _strided_shift(nbits, i) & mask).astype(np.uint8) for i in range(per_word)]
    return torch.from_numpy(np.concatenate(blocks)[:rows])


def _period(nbits: int) -> tuple[int, int]:
    """Codes and bytes after which the dense layout repeats."""
    common = math.gcd(nbits, 8)
    return 8 // common, nbits // common


def _pad_last(values: NDArray[Any], multiple: int) -> NDArray[Any]:
    missing = -values.shape[-1] % multiple
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]) if missing else np.ascontiguousarray(values)


def _strided_shift(nbits: int, block: int) -> int:
    return (STRIDED_PER_WORD[nbits] - 1 - block) * nbits
