"""A result in format `gguf`, as the gguf library reads it: names, keys and places are the library's, blocks `readers.blocks`'."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hqq_core.errors import VerificationError
from hqq_core.verify._check import Count, check_bytes, check_digest
from hqq_core.verify._expected import Expected
from hqq_core.verify._matrix import Grouped, Matrix
from hqq_core.verify._source import Source
from hqq_core.verify._weights import PIECE_NBYTES, floats
from hqq_core.verify.readers.blocks import BLOCKS

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor, TensorNameMap

GGUF = ".gguf"
NOTHING = hashlib.sha256().hexdigest()
PLAIN = ("F32", "F16", "BF16")
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # from the config


@dataclass(frozen=True, slots=True)
class GgufResult:
    """One file.

    Parameters
    ----------
    reader : GGUFReader
    left : dict of str to ReaderTensor
        What has not been taken yet.
    names : TensorNameMap
        From names of the source.
    """

    reader: GGUFReader
    left: dict[str, ReaderTensor]
    names: TensorNameMap

    @classmethod
    def of(cls, path: Path) -> GgufResult:
        """From the folder's only such file; a VerificationError where it is none, or of a family that the library lacks."""
        from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

        for other in path.parent.glob(f"*{GGUF}"):
            if other.name != path.name:
                raise VerificationError(other.name, f"beside {path.name}: readers may load it")
        try:
            reader = GGUFReader(path)
            found = reader.fields["general.architecture"].contents()
            architecture = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == found)
            names = get_tensor_name_map(architecture, reader.fields[f"{found}.block_count"].contents())
        except (ArithmeticError, LookupError, StopIteration, TypeError, ValueError) as error:
            raise VerificationError(path.name, f"no GGUF file of a model: {type(error).__name__}: {error}") from error
        return cls(reader, {tensor.name: tensor for tensor in reader.tensors}, names)

    def weight(self, tensor: Expected) -> Callable[[], Matrix]:
        """Rows of blocks, in the order of the source's rows."""
        name = self._stored_name(tensor)
        if name not in self.left:
            raise VerificationError(tensor.name, f"no {name} in the file")
        return functools.partial(self._read, tensor, self.left.pop(name))

    def copied(self, tensor: Expected, source: Source | None) -> Callable[[Count], None]:
        """The check of one that was not quantized; of some there is no place in the file, and nothing was written."""
        name = self._stored_name(tensor)
        if name not in self.left:
            return functools.partial(_check_left_out, tensor)
        return functools.partial(self._check_copied, tensor, self.left.pop(name), source)

    def check_all_taken(self) -> None:
        """Names the first one that is left, but for what is computed from the config."""
        for name in sorted(self.left.keys() - set(_COMPUTED)):
            raise VerificationError(name, "no tensor of the source becomes it")

    def _stored_name(self, tensor: Expected) -> str | None:
        return self.names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))

    def _read(self, expected: Expected, tensor: ReaderTensor) -> Grouped:
        block = BLOCKS[tensor.tensor_type.name]
        shape = tuple(int(size) for size in tensor.shape[::-1])
        order = self._order(expected, shape[0])
        rows = self._raw(tensor).reshape(shape[0], shape[1] // block.numel * block.nbytes)
        scale, shift = [], []
        step = max(PIECE_NBYTES // rows.shape[1], 1)
        for start in range(0, len(rows), step):
            parts = block.split(rows[order[start : start + step]])
            scale.append(block.scale(parts).ravel())
            shift.append(block.shift(parts).ravel())

        def codes(start: int, stop: int) -> NDArray[np.uint8]:
            return block.codes(block.split(rows[order[start:stop]])).reshape(stop - start, shape[1])

        return Grouped(shape, 1, codes, np.concatenate(scale), np.concatenate(shift), is_offset=block.is_offset)

    def _check_copied(self, expected: Expected, tensor: ReaderTensor, source: Source | None, count: Count) -> None:
        """Digest of what was written and, with a source, that it is what the source's numbers become."""
        kind, shape = tensor.tensor_type.name, tuple(int(size) for size in tensor.shape[::-1])
        wanted = "F32" if len(expected.shape) < 2 or expected.dtype == "F64" else expected.dtype
        if (kind, shape) != (wanted, expected.shape) or kind not in PLAIN:
            raise VerificationError(expected.name, f"{kind} of shape {shape}: wanted {wanted} of {expected.shape}")
        raw = self._raw(tensor)
        check_digest(expected, hashlib.sha256(raw.data).hexdigest(), "what was copied")
        count(expected.nbytes)
        if source is None or expected.folded:
            return
        if kind == expected.dtype and len(shape) > 1 and not self._permuted(expected):
            check_bytes(expected, hashlib.sha256(raw.data).digest(), source, count)
            return
        numbers = np.frombuffer(b"".join(map(bytes, source.pieces(expected))), _WORDS[expected.dtype])
        count(expected.nbytes)
        becomes = floats(numbers.reshape(expected.shape), expected.dtype)
        if self._architecture.startswith("gemma") and expected.name.endswith("norm.weight"):
            becomes = becomes + np.float32(1)
        stored = floats(raw.view(_WORDS[kind]).reshape(shape), kind)[self._order(expected, shape[0])]
        if not np.array_equal(stored.view(np.uint32), becomes.view(np.uint32)):
            raise VerificationError(expected.name, "its numbers are not what the source's become")

    def _raw(self, tensor: ReaderTensor) -> NDArray[np.uint8]:
        offset = int(tensor.data_offset)
        found: NDArray[np.uint8] = self.reader.data[offset : offset + int(tensor.n_bytes)]
        return found

    @property
    def _architecture(self) -> str:
        return str(self.reader.fields["general.architecture"].contents())

    def _permuted(self, expected: Expected) -> bool:
        return self._architecture == "llama" and expected.module.rpartition(".")[2] in ("q_proj", "k_proj")

    def _order(self, expected: Expected, n_rows: int) -> NDArray[np.intp]:
        """Where each row of the source lies: a llama's rotated rows are stored in pairs of the two halves of a head."""
        rows = np.arange(n_rows)
        if not self._permuted(expected):
            return rows
        key = "head_count_kv" if expected.module.endswith("k_proj") else "head_count"
        half = n_rows // int(self._key(f"llama.attention.{key}")) // 2
        return rows.reshape(-1, half, 2).swapaxes(1, 2).reshape(-1)

    def _key(self, name: str) -> Any:
        return self.reader.fields[name].contents()


_WORDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _check_left_out(expected: Expected, count: Count) -> None:
    if expected.digest != NOTHING:
        raise VerificationError(expected.name, f"not in the file: wanted {math.prod(expected.shape)} numbers")
    count(expected.nbytes)
