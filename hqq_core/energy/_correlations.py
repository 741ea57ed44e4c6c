"""Correlations between the columns that a weight is multiplied with, in a file: n x n numbers of one byte for n of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hqq_core.energy._stored import Fed
from hqq_core.energy._threads import Multiply
from hqq_core.safetensors_file import read_exactly, room

ONE = 127  # what a correlation of 1 is stored as
MAX_FEATURES = 1 << 14  # two gigabytes of float32 while it is measured
MIN_TOKENS = 512  # fewer say more of themselves than of the model


@dataclass(frozen=True, slots=True)
class Correlations:
    """Where each weight's correlations are.

    Parameters
    ----------
    path : Path
    places : dict of str to (int, int)
        By tensor name, the first byte and n; weights that share an input share a place.
    """

    path: Path
    places: dict[str, tuple[int, int]]

    def only(self, names: set[str]) -> Correlations:
        """Of these tensors."""
        return Correlations(self.path, {name: place for name, place in self.places.items() if name in names})

    def read(self, name: str) -> torch.Tensor:
        """Tensor [shape=(n, n)], int8: correlations times 127."""
        start, n = self.places[name]
        correlation = torch.empty((n, n), dtype=torch.int8)
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_exactly(file, memoryview(correlation.numpy().data).cast("B"), start, self.path.name)
        finally:
            os.close(file)
        return correlation


class CorrelationFile:
    """Takes what passes through a model, an input at a time, and writes its correlations.

    Parameters
    ----------
    path : Path
        A new file, or one to overwrite.
    product : callable
        As `_threads.row_products` gives it: multiplies on several threads, the same for any number of them.
    """

    def __init__(self, path: Path, product: Callable[[Multiply, torch.Tensor], torch.Tensor]) -> None:
        self._path, self._product = path, product
        self._places: dict[str, tuple[int, int]] = {}
        self._last, self._place = torch.empty(0), (0, 0)  # kept, so that no other input lies at its address
        self._file, self._nbytes = path.open("wb"), 0

    def add(self, fed: Fed, x: torch.Tensor) -> None:
        """Tensor [shape=(n_tokens, n)]; of an input that comes twice only the first is taken, of single experts none."""
        names, expert = fed
        n_tokens, n = x.shape
        if expert is not None or n > MAX_FEATURES or n_tokens < MIN_TOKENS or names[0] in self._places:
            return
        if x.data_ptr() == self._last.data_ptr() and x.shape == self._last.shape:  # query, key and value share one
            self._places |= dict.fromkeys(names, self._place)
            return
        self._last, self._place = x, (self._nbytes, n)
        x = x / x.square().sum(0).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
        moments = self._product(lambda rows: rows @ x, x.T.contiguous())
        correlation = moments.mul_(ONE).round_().clamp_(-ONE, ONE).to(torch.int8)
        correlation = correlation.triu() + correlation.triu(1).T  # sums of two orders may round to two sides
        with room(self._path):
            self._file.write(correlation.numpy().data)
        self._places |= dict.fromkeys(names, self._place)
        self._nbytes += n * n

    def close(self) -> Correlations:
        """All that was written."""
        with room(self._path):
            self._file.close()
        return Correlations(self._path, self._places)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._path.unlink(missing_ok=True)
