"""Weight files as the format's own description has them, read apart from the code that wrote them.

Format: https://github.com/huggingface/safetensors#format. Tensors come as numpy arrays of the stored words; bfloat16, which numpy
lacks, as its 16 bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqq_core.errors import VerificationError

PIECE_NBYTES = 1 << 20
MAX_HEADER_NBYTES = 100_000_000  # the safetensors library's limit
WORDS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "BOOL": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: bytes `begin` to `end` of the file at `path`.

    Parameters
    ----------
    name, dtype : str
        dtype in safetensors' words.
    shape : tuple of int
    path : Path
    begin, end : int
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin

    def read(self) -> NDArray[Any]:
        """All of it: ndarray [shape=self.shape], of the stored words."""
        raw = np.empty(self.nbytes, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            _fill(file.fileno(), raw.data, self.begin, self)
        return raw.view(WORDS[self.dtype]).reshape(self.shape)

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, a piece at a time; each is valid until the next is asked for."""
        buffer = memoryview(bytearray(min(PIECE_NBYTES, self.nbytes)))
        with self.path.open("rb", buffering=0) as file:
            for begin in range(self.begin, self.end, PIECE_NBYTES):
                piece = buffer[: self.end - begin]
                _fill(file.fileno(), piece, begin, self)
                yield piece


def floats(words: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored words of a safetensors type F32, F16 or BF16 as float32, exactly; those of F64 rounded."""
    if dtype == "BF16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    return words.astype(np.float32)


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself."""
    metadata = _header(path)[0].get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name; a VerificationError where the file is none of the format."""
    header, length, size = _header(path)
    header.pop("__metadata__", None)
    try:
        tensors = [_tensor(name, fields, path, 8 + length) for name, fields in header.items()]
    except (ValueError, LookupError, TypeError) as error:
        raise VerificationError(path.name, f"no safetensors file: {type(error).__name__}: {error}") from error
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != end:
            raise VerificationError(tensor.name, f"begins at byte {tensor.begin} of {path.name}: wanted {end}")
        end = tensor.end
    if end != size:
        raise VerificationError(path.name, f"{size} bytes: wanted {end}, as its header says")
    return {tensor.name: tensor for tensor in tensors}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a file, its length, and the file's."""
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_NBYTES, size):
            raise VerificationError(path.name, f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise VerificationError(path.name, f"its header is no JSON text: {error}") from error
    if not isinstance(header, dict):
        raise VerificationError(path.name, f"its header is a JSON {type(header).__name__}: wanted an object")
    return header, length, size


def _tensor(name: str, fields: dict[str, Any], path: Path, start: int) -> StoredTensor:
    begin, end = fields["data_offsets"]
    shape = tuple(int(size) for size in fields["shape"])
    wanted = math.prod(shape) * np.dtype(WORDS[fields["dtype"]]).itemsize
    if end - begin != wanted or begin < 0:
        raise ValueError(f"{name}: bytes {begin} to {end}: wanted {wanted} bytes")
    return StoredTensor(name, fields["dtype"], shape, path, start + begin, start + end)


def _fill(file: int, buffer: memoryview, offset: int, tensor: StoredTensor) -> None:
    done = 0
    while done < len(buffer):
        got = os.preadv(file, [buffer[done : done + (1 << 30)]], offset + done)
        if not got:
            raise VerificationError(tensor.name, f"{tensor.path.name} ends at byte {offset + done}")
        done += got
