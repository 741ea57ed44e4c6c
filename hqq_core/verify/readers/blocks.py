"""ggml's block types, from the description of their structs in ggml-common.h: codes, scales and what is added to them.

A field of codes is runs of bytes: byte j of a run holds elements j, j + width, j + 2 width and so on, the first in the lowest
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[Any]  # [shape=(n_blocks, bytes)], uint8
Floats = NDArray[np.float32]  # (n_blocks, groups)
Fields = dict[str, Bytes]


@dataclass(frozen=True, slots=True)
class Block:
    """One type.

    Parameters
    ----------
    numel : int
        Weights of a block.
    fields : dict of str to int
        Its parts in order, in bytes.
    codes : callable
    scale, shift : callable
        Of each group. Where there is an offset the shift is that, else the code of zero.
    is_offset : bool
    """

    numel: int
    fields: dict[str, int]
    codes: Callable[[Fields], Bytes] = field(repr=False)
    scale: Callable[[Fields], Floats] = field(repr=False)
    shift: Callable[[Fields], Floats] = field(repr=False)
    is_offset: bool

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return sum(self.fields.values())

    def split(self, rows: Bytes) -> Fields:
        """The parts of all blocks of some rows."""
        blocks = rows.reshape(-1, self.nbytes)
        ends = np.cumsum(list(self.fields.values()))
        return dict(zip(self.fields, np.split(blocks, ends[:-1], axis=1), strict=True))


def _unpacked(packed: Bytes, nbits: int, width: int) -> Bytes:
    shifts = np.arange(0, 8, nbits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, width)
    return (runs >> shifts & np.uint8((1 << nbits) - 1)).reshape(len(packed), -1)


def _joined(low: Bytes, high: Bytes, shift: int) -> Bytes:
    found: Bytes = np.bitwise_or(low, np.left_shift(high, np.uint8(shift)), dtype=np.uint8)
    return found


def _half(name: str) -> Callable[[Fields], Floats]:
    return lambda f: np.ascontiguousarray(f[name]).view("<f2").astype(np.float32)


def _middle(code: int, groups: int = 1) -> Callable[[Fields], Floats]:
    return lambda f: np.full((len(next(iter(f.values()))), groups), code, np.float32)


def _nibbles(f: Fields) -> Bytes:
    return _unpacked(f["qs"], 4, 16)


def _five(f: Fields) -> Bytes:
    return _joined(_nibbles(f), _unpacked(f["qh"], 1, 1), 4)


def _sixes(f: Fields) -> tuple[Bytes, Bytes]:
    """Q4_K and Q5_K: scales and mins of 6 bits in 12 bytes."""
    first, second, rest = np.split(f["scales"], 3, axis=1)
    scales = np.concatenate([first & 63, _joined(rest & 15, first >> 6, 4)], axis=1)
    mins = np.concatenate([second & 63, _joined(rest >> 4, second >> 6, 4)], axis=1)
    return scales, mins


def _fours(f: Fields) -> tuple[Bytes, Bytes]:
    """Q2_K: both in a byte."""
    return f["scales"] & 15, f["scales"] >> 4


def _threes(f: Fields) -> NDArray[np.int8]:
    """Q3_K: 6 bits around 32 in 12 bytes."""
    low = np.concatenate([f["scales"][:, :8] & 15, f["scales"][:, :8] >> 4], axis=1)
    high = _unpacked(f["scales"][:, 8:], 2, 4)
    signed: NDArray[np.int8] = _joined(low, high, 4).view(np.int8) - np.int8(32)
    return signed


def _times(unit: str, integers: Callable[[Fields], NDArray[np.generic]], sign: int = 1) -> Callable[[Fields], Floats]:
    def product(f: Fields) -> Floats:
        found: Floats = _half(unit)(f) * integers(f).astype(np.float32)
        return found if sign > 0 else -found

    return product


BLOCKS = {
    "Q4_0": Block(32, {"d": 2, "qs": 16}, _nibbles, _half("d"), _middle(8), False),
    "Q4_1": Block(32, {"d": 2, "m": 2, "qs": 16}, _nibbles, _half("d"), _half("m"), True),
    "Q5_0": Block(32, {"d": 2, "qh": 4, "qs": 16}, _five, _half("d"), _middle(16), False),
    "Q5_1": Block(32, {"d": 2, "m": 2, "qh": 4, "qs": 16}, _five, _half("d"), _half("m"), True),
    "Q8_0": Block(
        32, {"d": 2, "qs": 32}, lambda f: f["qs"] + np.uint8(128), _half("d"), _middle(128), False
    ),
    "Q2_K": Block(
        256, {"scales": 16, "qs": 64, "d": 2, "dmin": 2}, lambda f: _unpacked(f["qs"], 2, 32),
        _times("d", lambda f: _fours(f)[0]), _times("dmin", lambda f: _fours(f)[1], -1), True,
    ),
    "Q3_K": Block(
        256, {"hmask": 32, "qs": 64, "scales": 12, "d": 2},
        lambda f: _joined(_unpacked(f["qs"], 2, 32), _unpacked(f["hmask"], 1, 32), 2),
        _times("d", _threes), _middle(4, 16), False,
    ),
    "Q4_K": Block(
        256, {"d": 2, "dmin": 2, "scales": 12, "qs": 128}, lambda f: _unpacked(f["qs"], 4, 32),
        _times("d", lambda f: _sixes(f)[0]), _times("dmin", lambda f: _sixes(f)[1], -1), True,
    ),
    "Q5_K": Block(
        256, {"d": 2, "dmin": 2, "scales": 12, "qh": 32, "qs": 128},
        lambda f: _joined(_unpacked(f["qs"], 4, 32), _unpacked(f["qh"], 1, 32), 4),
        _times("d", lambda f: _sixes(f)[0]), _times("dmin", lambda f: _sixes(f)[1], -1), True,
    ),
    "Q6_K": Block(
        256, {"ql": 128, "qh": 64, "scales": 16, "d": 2},
        lambda f: _joined(_unpacked(f["ql"], 4, 64), _unpacked(f["qh"], 2, 32), 4),
        _times("d", lambda f: np.ascontiguousarray(f["scales"]).view(np.int8)), _middle(32, 16), False,
    ),
    "TQ2_0": Block(256, {"qs": 64, "d": 2}, lambda f: _unpacked(f["qs"], 2, 32), _half("d"), _middle(1), False),
}  # fmt: skip
