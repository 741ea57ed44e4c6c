"""Checkpoint: a safetensors folder, read lazily and with distrust.

Headers first, one tensor at a time, by `pread`: no file is mapped. Nothing is unpickled and no code from the folder runs.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hqq_core.errors import CheckpointError
from hqq_core.results import MANIFEST as MANIFEST
from hqq_core.safetensors_file import CHUNK_NBYTES, DTYPES, TensorEntry, read_exactly, read_header
from hqq_core.source_files import CONFIG as CONFIG
from hqq_core.source_files import INDEX as INDEX
from hqq_core.source_files import MAX_CARRIED_NBYTES as MAX_CARRIED_NBYTES
from hqq_core.source_files import MAX_FOLDER_DEPTH, MAX_JSON_NBYTES, indexed_weights, is_carried, single_weights
from hqq_core.source_files import SINGLE as SINGLE

REPORT = "halfquad_report.json"
FOLDING = "halfquad_folding.dat"  # a safetensors file under a name that no runtime takes for weights
README = "README.md"  # a model card
SOURCE_README = "SOURCE_README.md"  # the source's card, in a result, which has one of its own
CHART = "halfquad_errors.png"
OURS = (CONFIG, INDEX, REPORT, MANIFEST, FOLDING, SOURCE_README, CHART)  # written anew for every result

Opener = Callable[[Path], int]
Lender = Callable[[str], AbstractContextManager[int]]


def open_file(path: Path) -> int:
    """Open a file for reading, as the default opener does; the service puts its own in its place."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang us


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with a config and the names of its weight files; headers are read when asked for.

    Parameters
    ----------
    folder : Path
    config : dict
        Contents of config.json.
    files : tuple of str
        Names of the weight files, sorted.
    weight_map : dict of str to str
        The index's: tensor name to file name; empty where there is no index.
    opener : callable
        Opens a path for reading and returns the descriptor; every byte of the folder passes through it.
    lender : callable, optional
        Where the folder has no more than the headers of the weight files: gives, by name, a descriptor of the whole file for as
        long as a tensor is read.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[str, ...]
    weight_map: dict[str, str] = field(repr=False)
    opener: Opener = field(default=open_file, repr=False)
    lender: Lender | None = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: Path, opener: Opener | None = None, lender: Lender | None = None) -> Checkpoint:
        """Read config and index of `folder`.

        Raises
        ------
        CheckpointError
            Names the file, with what was got and wanted.
        """
        opener = opener or open_file
        if not folder.is_dir():
            raise CheckpointError(f"{folder.name}: no such folder")
        files, weight_map = _weight_files(folder, opener)
        config = _read_json(folder, CONFIG, opener)
        _check_not_quantized(config)
        return cls(folder, config, tuple(files), weight_map, opener, lender)

    def headers(self) -> dict[str, dict[str, TensorEntry]]:
        """Headers of all weight files, which must agree with each other and with the index.

        Returns
        -------
        dict of str to dict of str to TensorEntry
            By file name, then by tensor name, in the order of the data.
        """
        headers = {}
        for name in self.files:
            with self.shard(name) as reader:
                headers[name] = reader.entries
        _check_agreement(headers, self.weight_map)
        return headers

    @contextmanager
    def shard(self, name: str) -> Iterator[ShardReader]:
        """Open one weight file, check its header, and read tensors from it."""
        with _opened(self.folder / name, self.opener, missing=f"{name}: no such weight file in the folder") as file:
            yield ShardReader(name, file, read_header(file, name), self.lender)

    def carried_files(self) -> tuple[list[str], list[str]]:
        """Names of the files to carry over, each opened once to see that it can be, and of those left out; relative, sorted."""
        carried: list[str] = []
        left_out: list[str] = []
        for path in _walk(self.folder, MAX_FOLDER_DEPTH):
            relative = path.relative_to(self.folder)
            if relative.parts[0] in OURS or relative.as_posix() in self.files:
                continue
            wanted = relative.as_posix().isprintable() and is_carried(path.name) and self._is_small(relative.as_posix())
            (carried if wanted else left_out).append(relative.as_posix())
        return sorted(carried), sorted(name.encode("utf-8", "backslashreplace").decode() for name in left_out)

    def file_pieces(self, name: str) -> Iterator[bytes]:
        """Bytes of a carried file, a few MiB at a time."""
        with _opened(self.folder / name, self.opener, missing=f"{name}: gone since it was planned") as file:
            offset = 0
            while piece := os.pread(file, CHUNK_NBYTES, offset):
                offset += len(piece)
                yield piece

    def file_bytes(self, name: str) -> bytes:
        """All of a file that is carried; a CheckpointError where it is too large to be."""
        with _opened(self.folder / name, self.opener, missing=f"{name}: gone since it was planned") as file:
            return _read_all(file, name, MAX_CARRIED_NBYTES)

    def _is_small(self, name: str) -> bool:
        with _opened(self.folder / name, self.opener, missing=f"{name}: a link to nowhere") as file:
            return os.fstat(file).st_size <= MAX_CARRIED_NBYTES


@dataclass(frozen=True, slots=True)
class ShardReader:
    """One open weight file; `file` is where its header was read."""

    name: str
    file: int
    entries: dict[str, TensorEntry]
    lender: Lender | None = None

    @contextmanager
    def data(self) -> Iterator[int]:
        """A descriptor of the whole file, to read tensors from within the `with`."""
        if self.lender is None:
            yield self.file
        else:
            with self.lender(self.name) as file:
                yield file

    def read(self, tensor: str) -> torch.Tensor:
        """One whole tensor in memory of its own."""
        entry = self.entries[tensor]
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        if entry.nbytes:
            with self.data() as file:
                read_exactly(file, memoryview(buffer.numpy().data), entry.begin, self.name)
        return buffer.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def rows(self, tensor: str, rows: list[int]) -> torch.Tensor:
        """Some rows of a tensor, read one by one: Tensor [shape=(len(rows), ...)]."""
        entry = self.entries[tensor]
        size = entry.nbytes // entry.shape[0]
        buffer = torch.empty(len(rows) * size, dtype=torch.uint8)
        places = memoryview(buffer.numpy().data)
        with self.data() as file:
            for i, row in enumerate(rows):
                read_exactly(file, places[i * size : (i + 1) * size], entry.begin + row * size, self.name)
        return buffer.view(DTYPES[entry.dtype]).reshape(len(rows), *entry.shape[1:])

    def pieces(self, tensor: str) -> Iterator[memoryview]:
        """One tensor's bytes in pieces of a few MiB; each piece is valid until the next is asked for."""
        entry = self.entries[tensor]
        buffer = memoryview(bytearray(min(CHUNK_NBYTES, entry.nbytes)))
        with self.data() as file:
            for begin in range(entry.begin, entry.end, CHUNK_NBYTES):
                piece = buffer[: min(CHUNK_NBYTES, entry.end - begin)]
                read_exactly(file, piece, begin, self.name)
                yield piece


def _weight_files(folder: Path, opener: Opener) -> tuple[list[str], dict[str, str]]:
    """Names of the weight files, and the index's map where there is one."""
    present = sorted(path.name for path in folder.iterdir())
    if INDEX not in present:
        return [single_weights(present)], {}
    weight_map = indexed_weights(_read_json(folder, INDEX, opener))
    return sorted(set(weight_map.values())), weight_map


def _check_agreement(headers: dict[str, dict[str, TensorEntry]], weight_map: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for file, entries in headers.items():
        for name in entries:
            if name in seen:
                raise CheckpointError(f"{file}: tensor {name!r} is in {seen[name]} already")
            seen[name] = file
    for name, file in weight_map.items():
        if seen.get(name) != file:
            raise CheckpointError(f"{INDEX}: {name!r} is said to be in {file}, which does not hold it")


def _check_not_quantized(config: dict[str, Any]) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):
        if config.get(key):
            method = config[key].get("quant_method", "?") if isinstance(config[key], dict) else config[key]
            raise CheckpointError(f"{CONFIG}: {key} says {method!r}: wanted weights that are not quantized yet")


def _read_json(folder: Path, name: str, opener: Opener) -> dict[str, Any]:
    with _opened(folder / name, opener, missing=f"no {name} in the folder") as file:
        raw = _read_all(file, name, MAX_JSON_NBYTES)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of thousands of digits
        raise CheckpointError(f"{name}: no JSON text: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: a JSON {type(value).__name__}: wanted an object")
    return value


def _read_all(file: int, name: str, limit: int) -> bytes:
    size = os.fstat(file).st_size
    if size > limit:
        raise CheckpointError(f"{name}: {size} bytes: wanted at most {limit}")
    buffer = bytearray(size)
    read_exactly(file, memoryview(buffer), 0, name)
    return bytes(buffer)


@contextmanager
def _opened(path: Path, opener: Opener, missing: str) -> Iterator[int]:
    try:
        file = opener(path)
    except FileNotFoundError as error:
        raise CheckpointError(missing) from error
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be opened: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise CheckpointError(f"{path.name}: no regular file")
        yield file
    finally:
        os.close(file)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Files below `folder`, hidden ones and linked folders left out."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth > 1:
                yield from _walk(Path(entry.path), depth - 1)
        elif entry.is_symlink() or entry.is_file():
            yield Path(entry.path)
