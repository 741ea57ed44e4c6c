"""One safetensors file: its header read with distrust, its tensors written at their places.

Format: https://github.com/huggingface/safetensors#format. A header is checked before a byte of data is believed: length, JSON
depth and size, duplicate keys, known dtypes, sizes that match shapes, ranges that tile the file exactly.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import reprlib
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hqq_core.errors import CheckpointError, StorageFullError
from hqq_core.results import ArtifactFile
from hqq_core.source_files import MAX_HEADER_NBYTES

MAX_NAME_LENGTH = 1024
MAX_AXES = 16
MAX_NBYTES = 1 << 62
CHUNK_NBYTES = 1 << 23  # copies and hashes go in 8 MiB pieces

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors header.

    `begin` and `end` are byte offsets from the start of the file (not of the data, as the header has them).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a dense tensor of safetensors type `dtype`."""
    return math.prod(shape) * DTYPES[dtype].itemsize


# --- reading -------------------------------------------------------------------------------------------------------------


def read_header(file: int, name: str) -> dict[str, TensorEntry]:
    """Read and check the header of an open file.

    Parameters
    ----------
    file : int
        File descriptor, open for reading.
    name : str
        What errors call the file.

    Returns
    -------
    dict of TensorEntry by name, in the order of the data

    Raises
    ------
    CheckpointError
        Names the file and the tensor, with what was got and wanted.
    """
    size = os.fstat(file).st_size
    if size < 8:
        raise CheckpointError(f"{name}: {size} bytes are too few for a safetensors file: wanted 8 or more")
    (length,) = struct.unpack("<Q", os.pread(file, 8, 0))
    if not 0 < length <= min(MAX_HEADER_NBYTES, size - 8):
        raise CheckpointError(
            f"{name}: header of {length} bytes in a file of {size}: wanted 1 to {MAX_HEADER_NBYTES}, inside the file"
        )
    fields = _parse_header(os.pread(file, length, 8), name)
    _check_metadata(fields.pop("__metadata__", {}), name)
    entries = [_entry(key, value, 8 + length, name) for key, value in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_tiling(entries, 8 + length, size, name)
    return {entry.name: entry for entry in entries}


def _parse_header(raw: bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{name}: header has the key {twice[:MAX_NAME_LENGTH]!r} twice")
        return dict(pairs)

    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of thousands of digits
        raise CheckpointError(f"{name}: header is no JSON text: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{name}: header is a JSON {type(fields).__name__}: wanted an object")
    return fields


def _check_metadata(metadata: Any, name: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{name}: __metadata__ must map strings to strings")


def _entry(key: str, value: Any, data_start: int, name: str) -> TensorEntry:
    where = f"{name}: tensor {key[:MAX_NAME_LENGTH]!r}"
    if not 0 < len(key) <= MAX_NAME_LENGTH or not key.isprintable():
        raise CheckpointError(f"{where}: name of {len(key)} characters: wanted 1 to {MAX_NAME_LENGTH} printable ones")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: wanted exactly the keys dtype, shape, data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {reprlib.repr(dtype)}: wanted one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise CheckpointError(f"{where}: shape {reprlib.repr(shape)}: wanted a list of at most {MAX_AXES} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {reprlib.repr(offsets)}: wanted two byte offsets")
    wanted = tensor_nbytes(dtype, shape)
    if offsets[1] - offsets[0] != wanted:
        raise CheckpointError(f"{where}: {offsets[1] - offsets[0]} bytes of data: {dtype} {shape} wants {wanted}")
    return TensorEntry(key, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < MAX_NBYTES for size in value)


def _check_tiling(entries: list[TensorEntry], data_start: int, size: int, name: str) -> None:
    end = data_start
    for entry in entries:
        if entry.begin != end:
            what = "overlaps the tensor before it" if entry.begin < end else "leaves a gap before it"
            raise CheckpointError(f"{name}: tensor {entry.name!r} {what}: begins at {entry.begin}, wanted {end}")
        end = entry.end
    if end != size:
        raise CheckpointError(f"{name}: {size} bytes on disk, but the header wants {end}: truncated or padded")


def read_exactly(file: int, buffer: memoryview, offset: int, name: str) -> None:
    """Fill `buffer` from `offset`; a file that ends early is a CheckpointError."""
    done = 0
    while done < len(buffer):
        got = os.preadv(file, [buffer[done : done + (1 << 30)]], offset + done)
        if got == 0:
            raise CheckpointError(f"{name}: ended at byte {offset + done}: wanted {offset + len(buffer)}")
        done += got


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file; `progress` gets the bytes of each piece."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_NBYTES))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
            if progress:
                progress(got)
    return digest.hexdigest()


# --- writing -------------------------------------------------------------------------------------------------------------


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Lay out (name, dtype, shape) triples: widest types first so that all are aligned, then in the order given.

    Returns
    -------
    header : bytes
        Length prefix and JSON, padded with spaces to a multiple of 8.
    entries : dict of TensorEntry by name
    """
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]].itemsize)
    assert len({name for name, _, _ in ordered}) == len(ordered), "a name stands twice"
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    begin = 0
    for name, dtype, shape in ordered:
        end = begin + tensor_nbytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {
        name: TensorEntry(name, dtype, shape, *(start + offset for offset in fields[name]["data_offsets"]))
        for name, dtype, shape in ordered
    }
    return struct.pack("<Q", len(text)) + text, entries


def header_nbytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """No fewer bytes than these tensors take in a header."""
    return sum(len(json.dumps(name)) + len(str(shape)) + 96 for name, _, shape in tensors)


class SafetensorsWriter:
    """Write one file tensor by tensor, in any order, each at its final place; the name appears when all is there.

    Parameters
    ----------
    path : Path
        Final name. Until `close` the bytes live beside it under a name that begins with `TEMPORARY_PREFIX`.
    tensors : iterable of (name, dtype, shape)
        Everything the file will hold; dtype in safetensors' words.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        header, self.entries = build_header(tensors)
        self.nbytes = max((entry.end for entry in self.entries.values()), default=len(header))
        self.path = path
        self._ends = {name: entry.begin for name, entry in self.entries.items()}  # of what is written
        self._temporary = temporary_path(path)
        self._file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with self._room(), self._discarded_on_error():
            reserve(self._file, self.nbytes)
            self._pwrite(memoryview(header), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; its dtype and shape must be those announced."""
        entry = self.entries[name]
        assert NAMES[tensor.dtype] == entry.dtype, f"{name}: {tensor.dtype}, announced {entry.dtype}"
        assert tuple(tensor.shape) == entry.shape, f"{name}: {tuple(tensor.shape)}, announced {entry.shape}"
        flat = tensor.contiguous().as_strided(
            (tensor.numel(),), (1,)
        )  # contiguous, a single number may have any stride
        self.append(name, flat.view(torch.uint8).numpy().data)

    def append(self, name: str, piece: memoryview) -> None:
        """Write the next bytes of one tensor, which need never be held whole."""
        offset = self._ends[name]
        assert offset + len(piece) <= self.entries[name].end, f"{name}: more bytes than announced"
        with self._room():
            self._pwrite(piece, offset)
        self._ends[name] += len(piece)

    def close(self) -> str:
        """Make the file durable under its final name and return its SHA-256, read back from the file system."""
        missing = [name for name, entry in self.entries.items() if self._ends[name] != entry.end]
        assert not missing, f"{self.path.name}: never written to the end: {missing[:3]}"
        with self._room():
            os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        digest = sha256_file(self._temporary)
        publish(self._temporary, self.path)
        return digest

    def discard(self) -> None:
        """Leave nothing behind."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._temporary.unlink(missing_ok=True)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done : done + (1 << 30)], offset + done)

    @contextlib.contextmanager
    def _discarded_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.discard()
            raise

    def _room(self) -> contextlib.AbstractContextManager[None]:
        return room(self.path)


TEMPORARY_PREFIX = ".partial-"


def temporary_path(path: Path) -> Path:
    """A fresh name beside `path`: two attempts at one file never write into each other."""
    return path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")


def discard_temporaries(path: Path) -> None:
    """Remove what earlier, killed attempts at `path` left beside it."""
    for left in path.parent.glob(f"{TEMPORARY_PREFIX}*-{glob.escape(path.name)}"):
        left.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Rename and make the rename durable."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file as its bytes come: temporary name, fsync, final name. Returns its size and SHA-256."""
    temporary, digest, nbytes = temporary_path(path), hashlib.sha256(), 0
    try:
        with room(path), temporary.open("xb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                nbytes += len(piece)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return nbytes, digest.hexdigest()


def artifact_of(path: Path) -> ArtifactFile:
    """A file that is there, read for its hash."""
    return ArtifactFile(path.name, path.stat().st_size, sha256_file(path))


def write_json(path: Path, value: dict[str, Any]) -> tuple[int, str]:
    """`write_file` of an object, for people to read too."""
    return write_file(path, [json_bytes(value)])


def json_bytes(value: dict[str, Any]) -> bytes:
    """An object as JSON text, always the same for the same."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def reserve(file: int, nbytes: int) -> None:
    """Reserve the file's full size, so that a full disk is met before the work and not in the middle of it."""
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot reserve
            raise
        os.ftruncate(file, nbytes)


@contextlib.contextmanager
def room(path: Path) -> Iterator[None]:
    """Turn "no space", "quota" and "file too large" into a StorageFullError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFullError(
                f"{path.name}: no room left on the device it is written to ({error.strerror})"
            ) from error
        raise
