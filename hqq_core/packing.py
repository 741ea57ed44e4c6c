"""Pack codes into words and back: pure, exact inverses.

Two layouts cover the formats written here:

- *dense*: along the last axis as one bit stream, element i at bit i * nbits, lowest bit first (compressed-tensors >= 0.18, MLX).
- *strided*: along the first axis in blocks of equal height, value of the first block in the highest bits (`hqq`, BitPack).
"""

from __future__ import annotations

import math

import torch

STRIDED_PER_WORD = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # hqq leaves 5 and 6 bits unpacked
_STRIDED_WORD = {3: torch.int32}  # ten codes of 3 bits in 32; all others use bytes


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
    period, words = _period(nbits)
    n = codes.shape[-1]
    n_words = math.ceil(n * nbits / 32)
    blocks = torch.nn.functional.pad(codes, (0, -n % period)).unflatten(-1, (-1, period))  # (..., n_blocks, period)
    packed = torch.zeros((*blocks.shape[:-1], words), dtype=torch.int32)
    for i in range(period):
        word, shift = divmod(i * nbits, 32)
        code = blocks[..., i].to(torch.int32)
        packed[..., word] |= code << shift
        if shift + nbits > 32:  # the code straddles two words
            packed[..., word + 1] |= code >> (32 - shift)
    return packed.flatten(-2)[..., :n_words].contiguous()


def unpack_dense(packed: torch.Tensor, nbits: int, n: int) -> torch.Tensor:
    """Inverse of `pack_dense`: uint8 [shape=(..., n)] from int32 [shape=(..., ceil(n * nbits / 32))]."""
    period, words = _period(nbits)
    blocks = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % words)).unflatten(-1, (-1, words))
    codes = torch.empty((*blocks.shape[:-1], period), dtype=torch.uint8)
    for i in range(period):
        word, shift = divmod(i * nbits, 32)
        code = blocks[..., word] >> shift  # arithmetic: the sign bit is masked off below
        if shift + nbits > 32:
            code = code & ((1 << (32 - shift)) - 1) | blocks[..., word + 1] << (32 - shift)
        codes[..., i] = (code & ((1 << nbits) - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :n].contiguous()


def pack_strided(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack codes along the first axis as `hqq.core.bitpack.BitPack` does.

    Parameters
    ----------
    codes : Tensor [shape=(rows, columns)], uint8
        Codes below 2 ** nbits. `rows` must be a multiple of the codes per byte; at 3 bits it is padded with zeros to one of ten.
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
    packed = torch.zeros((height, codes.shape[1]), dtype=_STRIDED_WORD.get(nbits, torch.uint8))
    for i, block in enumerate(codes.split(height)):
        packed[: block.shape[0]] |= block.to(packed.dtype) << _strided_shift(nbits, i)
    return packed


def unpack_strided(packed: torch.Tensor, nbits: int, rows: int) -> torch.Tensor:
    """Inverse of `pack_strided`: uint8 [shape=(rows, columns)]."""
    per_word = STRIDED_PER_WORD[nbits]
    if per_word == 1:
        return packed
    mask = (1 << nbits) - 1
    blocks = [(packed >> _strided_shift(nbits, i) & mask).to(torch.uint8) for i in range(per_word)]
    return torch.cat(blocks)[:rows].contiguous()


def _period(nbits: int) -> tuple[int, int]:
    """Codes and words after which the dense layout repeats."""
    common = math.gcd(nbits, 32)
    return 32 // common, nbits // common


def _strided_shift(nbits: int, block: int) -> int:
    return (STRIDED_PER_WORD[nbits] - 1 - block) * nbits
