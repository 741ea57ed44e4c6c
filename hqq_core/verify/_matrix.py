"""What a reader finds: a weight of which the rows can be had a few at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Matrix(Protocol):
    """A weight with its leading sizes taken together: rows, and columns.

    `stored` is what a digest is over, row by row, with `trailer` behind all rows; `values` is what it stands for.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """As the weight's."""

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` as they are stored."""

    def trailer(self) -> Sequence[NDArray[Any]]:
        """What belongs to no row."""

    def values(self, stored: NDArray[Any], start: int) -> NDArray[np.float32]:
        """What rows from `start` on stand for."""

    def shift_norm(self) -> float:
        """Norm of what is added to codes times scale: where it is large, float32 loses digits of the sum."""


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """Codes with a scale, and a zero or an offset, for each group along `axis`.

    Parameters
    ----------
    shape : tuple of int
    axis : int
        1: a group is consecutive columns of a row; 0: numbers `n_groups` apart in the flattened weight.
    codes : callable
        Gives rows `start` to `stop`: ndarray [shape=(stop - start, columns)], uint8.
    scale, shift : ndarray [shape=(n_groups,)], float32
        In the order of the groups.
    is_offset : bool
        A weight is code * scale + shift; else (code - shift) * scale.
    """

    shape: tuple[int, ...]
    axis: int
    codes: Callable[[int, int], NDArray[np.uint8]]
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    is_offset: bool = False

    def stored(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Codes, one a byte."""
        return self.codes(start, stop)

    def trailer(self) -> Sequence[NDArray[np.float32]]:
        """Scales, then zeros or offsets."""
        return self.scale, self.shift

    def values(self, stored: NDArray[np.uint8], start: int) -> NDArray[np.float32]:
        """Dequantized, in float32."""
        grouped = self._grouped(stored.astype(np.float32))
        scale, shift = self._of_rows(self.scale, start, len(stored)), self._of_rows(self.shift, start, len(stored))
        if self.is_offset:
            grouped *= scale
            grouped += shift
        else:
            grouped -= shift
            grouped *= scale
        return grouped.reshape(stored.shape)

    def shift_norm(self) -> float:
        """||zero * scale||, or ||offset||."""
        shift = self.shift.astype(np.float64) * (1 if self.is_offset else self.scale)
        squares = float(np.square(shift).sum())  # not by BLAS, whose threads then spin beside the solver's
        return math.sqrt(squares * math.prod(self.shape) / len(shift))

    def _grouped(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.axis == 0:
            return values
        return values.reshape(len(values), -1, math.prod(self.shape) // len(self.scale))  # (rows, groups, group size)

    def _of_rows(self, groups: NDArray[np.float32], start: int, n: int) -> NDArray[np.float32]:
        """One number for each group of the rows, shaped to go with `_grouped`."""
        if self.axis == 0:
            by_row = groups.reshape(-1, self.shape[-1])
            return by_row[np.arange(start, start + n) % len(by_row)]
        return groups.reshape(-1, self.shape[-1] * len(groups) // math.prod(self.shape), 1)[start : start + n]


@dataclass(frozen=True, slots=True, eq=False)
class Dequantized:
    """A weight of which a library gives the values alone.

    Parameters
    ----------
    shape : tuple of int
    rows : callable
        Gives rows `start` to `stop`: ndarray [shape=(stop - start, columns)], float32.
    """

    shape: tuple[int, ...]
    rows: Callable[[int, int], NDArray[np.float32]]

    def stored(self, start: int, stop: int) -> NDArray[np.float32]:
        """The values."""
        return self.rows(start, stop)

    def trailer(self) -> Sequence[NDArray[Any]]:
        """Nothing."""
        return ()

    def values(self, stored: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """The same."""
        return stored

    def shift_norm(self) -> float:
        """Unknown: none."""
        return 0.0
