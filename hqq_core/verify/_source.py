"""The source's tensors, as a result is held against them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hqq_core.checkpoint import Checkpoint
from hqq_core.errors import VerificationError
from hqq_core.safetensors_file import TensorEntry, read_exactly
from hqq_core.verify._expected import Expected
from hqq_core.verify._weights import StoredTensor, floats, read_metadata, read_tensors

NUMBERS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint, and the factors that a result's weights were multiplied with.

    Parameters
    ----------
    checkpoint : Checkpoint
    entries : dict of str to (str, TensorEntry)
        By tensor name, its file and place.
    factors : dict of str to StoredTensor
        By "columns NAME" and "rows NAME".
    """

    checkpoint: Checkpoint
    entries: dict[str, tuple[str, TensorEntry]]
    factors: dict[str, StoredTensor] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, factors: Path | None) -> Source:
        """With the factors that a file holds."""
        entries = {
            name: (file, entry) for file, header in checkpoint.headers().items() for name, entry in header.items()
        }
        return cls(checkpoint, entries, _factors(factors) if factors else {})

    def check(self, expected: list[Expected]) -> None:
        """A VerificationError unless the source has these tensors and no others."""
        found = {name: (entry.dtype, entry.shape) for name, (_, entry) in self.entries.items()}
        wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in expected}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise VerificationError(
                    name, f"{_kind(found.get(name))} in the source: the result is of {_kind(wanted.get(name))}"
                )

    def pieces(self, tensor: Expected) -> Iterator[memoryview]:
        """Bytes of a tensor, a piece at a time."""
        file, _ = self.entries[tensor.name]
        with self.checkpoint.shard(file) as reader:
            yield from reader.pieces(tensor.name)

    def rows(self, tensor: Expected, step: int) -> Iterator[NDArray[np.float32]]:
        """The weight as it was solved, times its factors, `step` rows at a time.

        The product is rounded after each factor, as the solver has it: what rounding there is, is the same.
        """
        file, entry = self.entries[tensor.name]
        by_columns, by_rows = self._factors(tensor, "columns"), self._factors(tensor, "rows")
        n_rows, n_columns = math.prod(entry.shape[:-1]), entry.shape[-1]
        with self.checkpoint.shard(file) as reader, reader.data() as data:
            for start in range(0, n_rows, step):
                stored = np.empty((min(step, n_rows - start), n_columns), NUMBERS[entry.dtype])
                offset = entry.begin + start * n_columns * stored.itemsize
                read_exactly(data, stored.data.cast("B"), offset, reader.name)
                W = floats(stored, entry.dtype)
                if by_columns is not None:
                    W *= by_columns
                if by_rows is not None:
                    W *= by_rows[start : start + len(W), None]
                yield W

    def _factors(self, tensor: Expected, part: str) -> NDArray[np.float32] | None:
        if part not in tensor.folded:
            return None
        stored = self.factors.get(f"{part} {tensor.name}")
        size = tensor.shape[1 if part == "columns" else 0]
        if stored is None or stored.dtype != "F32" or stored.shape != (size,):
            raise VerificationError(tensor.name, f"its {part} are folded: wanted {size} factors beside the result")
        return floats(stored.read(), "F32")


def _factors(path: Path) -> dict[str, StoredTensor]:
    """Each vector by every name it goes by."""
    vectors = read_tensors(path)
    try:
        places: dict[str, str] = json.loads(read_metadata(path)["places"])
        return {place: vectors[home] for place, home in places.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise VerificationError(path.name, f"no factors of folds: {type(error).__name__}: {error}") from error


def _kind(found: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{found[0]} of shape {found[1]}" if found else "no such tensor"
