"""A result of format `gguf`, read by ggml's own Python library: what it dequantizes is held against what was solved.

Names and order of rows are those of llama.cpp's converter: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hqq_core.errors import VerificationError
from hqq_core.verify._expected import Expected
from hqq_core.verify._matrix import Dequantized
from hqq_core.verify._weights import PIECE_NBYTES, WORDS, floats

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor, TensorNameMap

SUFFIX = ".gguf"
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # of no tensor of a source
PAIRED = {"llama"}  # rows of query and key lie in pairs, as the rotation takes them
GAIN_PLUS_ONE = {"gemma", "gemma2", "gemma3"}


@dataclass(frozen=True, slots=True)
class Model:
    """What a file says of its model.

    Parameters
    ----------
    architecture : str
    n_heads, n_kv_heads : int
        Query and key heads of a layer.
    names : TensorNameMap
        From a source's names to the file's.
    """

    architecture: str
    n_heads: int
    n_kv_heads: int
    names: TensorNameMap

    @classmethod
    def of(cls, reader: GGUFReader) -> Model:
        """From the file's keys."""
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = str(_value(reader, "general.architecture"))
        known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        n_layers = int(_value(reader, f"{architecture}.block_count"))
        n_heads = int(_value(reader, f"{architecture}.attention.head_count"))
        n_kv_heads = int(_value(reader, f"{architecture}.attention.head_count_kv"))
        names = get_tensor_name_map(MODEL_ARCH(known[architecture]), n_layers)
        return cls(architecture, n_heads, n_kv_heads, names)

    def place(self, name: str) -> str:
        """Where a tensor of the source lies; empty where the file has no place for it."""
        return self.names.get_name(name, try_suffixes=(".weight", ".bias")) or ""

    def order(self, name: str, n_rows: int) -> NDArray[np.intp] | None:
        """The stored row of each row, by the source's name; None: the same."""
        heads = {"q_proj": self.n_heads, "k_proj": self.n_kv_heads}.get(name.split(".")[-2] if "." in name else "")
        if heads is None or self.architecture not in PAIRED:
            return None
        stored = np.arange(n_rows).reshape(heads, -1, 2)  # head, place in its half, half
        return stored.swapaxes(1, 2).reshape(-1)

    def gain(self, name: str) -> float:
        """What is added to a vector of the source."""
        return 1.0 if self.architecture in GAIN_PLUS_ONE and name.endswith("norm.weight") else 0.0


@dataclass(frozen=True, slots=True)
class GgufCopy:
    """A tensor that was not quantized.

    Parameters
    ----------
    tensor : Expected
    model : Model
    shape : tuple of int
        As stored.
    data : ndarray, uint8, or None
        Its bytes; None: the file has no place for it.
    """

    tensor: Expected
    model: Model
    shape: tuple[int, ...]
    data: NDArray[np.uint8] | None

    @property
    def dtype(self) -> str:
        """As the source's: a vector's float32 is of the same numbers."""
        return self.tensor.dtype

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes."""
        if self.data is not None:
            for begin in range(0, len(self.data), PIECE_NBYTES):
                yield np.ascontiguousarray(self.data[begin : begin + PIECE_NBYTES]).data

    def of_source(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """What the source's bytes become in the file."""
        order = self.model.order(self.tensor.name, self.tensor.shape[0])
        if self.data is None:
            return iter(())
        if len(self.tensor.shape) > 1 and order is None and self.tensor.dtype != "F64":
            return pieces
        words = np.frombuffer(b"".join(pieces), WORDS[self.tensor.dtype]).reshape(self.tensor.shape)
        if order is not None:
            words = words[np.argsort(order)]
        if words.ndim < 2 or self.tensor.dtype == "F64":
            words = floats(words, self.tensor.dtype)
            words += np.float32(self.model.gain(self.tensor.name) if words.ndim < 2 else 0)
        return iter([np.ascontiguousarray(words).view(np.uint8).data.cast("B")])


@dataclass(frozen=True, slots=True)
class GgufResult:
    """The one file.

    Parameters
    ----------
    left : dict of str to ReaderTensor
        What has not been taken yet.
    model : Model
    """

    left: dict[str, ReaderTensor]
    model: Model

    @classmethod
    def of(cls, folder: Path, files: dict[str, Path]) -> GgufResult:
        """The only one among `files`, which must be the only one in the folder."""
        from gguf import GGUFReader

        found = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
        stored = sorted(name for name in files if name.endswith(SUFFIX))
        if len(stored) != 1 or found != stored:
            raise VerificationError(", ".join(found), f"GGUF files: wanted {', '.join(stored)} and no other")
        try:
            reader = GGUFReader(files[stored[0]])
            return cls({tensor.name: tensor for tensor in reader.tensors}, Model.of(reader))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, OSError, MemoryError) as error:
            raise VerificationError(stored[0], f"no GGUF file: {type(error).__name__}: {error}") from error

    def weight(self, tensor: Expected) -> Callable[[], Dequantized]:
        """Dequantized when its turn comes, in the source's order of rows."""
        return functools.partial(_matrix, self._take(tensor), self.model.order(tensor.name, tensor.shape[0]))

    def copy(self, tensor: Expected) -> GgufCopy:
        """By its place, or nothing."""
        if self.model.place(tensor.name) not in self.left:
            return GgufCopy(tensor, self.model, tensor.shape, None)
        stored = self._take(tensor)
        return GgufCopy(tensor, self.model, _shape(stored), stored.data.reshape(-1).view(np.uint8))

    def check_all_taken(self) -> None:
        """Names the first one that is left."""
        if left := sorted(self.left.keys() - set(COMPUTED)):
            raise VerificationError(left[0], "no tensor of the source becomes it")

    def _take(self, tensor: Expected) -> ReaderTensor:
        place = self.model.place(tensor.name)
        if place not in self.left:
            raise VerificationError(tensor.name, f"{place or 'it'} is not in the file")
        return self.left.pop(place)


def _matrix(stored: ReaderTensor, order: NDArray[np.intp] | None) -> Dequantized:
    from gguf.quants import dequantize

    shape = _shape(stored)
    data = stored.data.reshape(math.prod(shape[:-1]), -1)

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        wanted = data[start:stop] if order is None else data[order[start:stop]]
        return dequantize(np.ascontiguousarray(wanted), stored.tensor_type) + np.float32(0)  # one zero, not two

    return Dequantized(shape, rows)


def _shape(stored: ReaderTensor) -> tuple[int, ...]:
    """Ggml names the columns first."""
    return tuple(int(size) for size in reversed(stored.shape))


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise LookupError(f"no key {key}")
    return field.contents()
