"""The file of format `gguf`: shards write parts, and what they hold becomes one file, header first, in one pass.

Format: ggml's docs/gguf.md, version 3. A part is a safetensors file of bytes, which is checked as one. Tensors of the result are
in the order of their layers, whatever the shards of the source, so the same model gives the same file.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hqq_core.checkpoint import Checkpoint
from hqq_core.formats.container import Layout, Part, PartWriter
from hqq_core.formats.gguf.blocks import BLOCK_TYPES
from hqq_core.results import ArtifactFile
from hqq_core.safetensors_file import (
    CHUNK_NBYTES,
    SafetensorsWriter,
    TensorEntry,
    header_nbytes,
    read_exactly,
    read_header,
    write_file,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
ALIGNMENT = 32  # bytes, of each tensor
MAX_KEYS_NBYTES = 1 << 26  # no tokenizer takes more
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a number

Keys = Callable[["GGUFWriter"], None]  # adds all keys but those of the tensors


class GgufContainer:
    """How tensors become `model.gguf`.

    Parameters
    ----------
    architecture : str
        llama.cpp's name of the family; without it there are names and sizes, but no `header`.
    keys : callable, optional
    extra : dict of str to Tensor, optional
        float32 tensors that the source does not have.
    """

    block_types = True

    def __init__(
        self, architecture: str = "", keys: Keys | None = None, extra: dict[str, torch.Tensor] | None = None
    ) -> None:
        self._architecture, self._keys, self._extra = architecture, keys, extra or {}

    def part_name(self, number: int, total: int) -> str:
        """Parts are gone when the result is there."""
        return f"{FILE}.part-{number:05d}-of-{total:05d}"

    def nbytes(self, tensors: Layout) -> int:
        """Whole rows of blocks."""
        return sum(stored_nbytes(dtype, shape) for _, dtype, shape in tensors)

    def header_nbytes(self, tensors: Layout) -> int:
        """Entries of a part's JSON header."""
        return header_nbytes(_as_bytes(tensors))

    def finish_nbytes(self, nbytes: int) -> int:
        """All of it once more, before the parts go."""
        return nbytes + MAX_KEYS_NBYTES

    def open(self, path: Path, tensors: Layout) -> PartWriter:
        """A part, whose tensors are bytes."""
        return _BytesWriter(path, _as_bytes(tensors))

    def finish(
        self, checkpoint: Checkpoint, parts: Sequence[Part], folder: Path
    ) -> tuple[list[ArtifactFile], list[ArtifactFile]]:
        """Header and parts in one file."""
        places: dict[str, tuple[Path, TensorEntry]] = {}
        for part in parts:
            with (folder / part.file.name).open("rb") as file:
                found = read_header(file.fileno(), part.file.name)
            places |= {name: (folder / part.file.name, found[name]) for name, _, _ in part.tensors}
        tensors = [stored for part in parts for stored in part.tensors]
        tensors += [(name, "F32", tuple(tensor.shape)) for name, tensor in self._extra.items()]
        tensors.sort(key=lambda stored: _place(stored[0]))

        def pieces() -> Iterator[bytes | memoryview]:
            header = self.header(tensors)
            yield header + _padding(len(header))
            for name, dtype, shape in tensors:
                yield from _read(*places[name]) if name in places else [_bytes_of(self._extra[name])]
                yield _padding(stored_nbytes(dtype, shape))

        return [ArtifactFile(FILE, *write_file(folder / FILE, pieces()))], []

    def header(self, tensors: Layout) -> bytes:
        """What comes before the data: keys and the table of tensors, as the gguf library writes them."""
        from gguf import GGMLQuantizationType, GGUFWriter

        assert self._keys is not None, "the container of a model alone has a header"
        writer = GGUFWriter(None, self._architecture)
        self._keys(writer)
        for name, dtype, shape in tensors:
            kind, nbytes = GGMLQuantizationType[dtype], stored_nbytes(dtype, shape)
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        with tempfile.TemporaryDirectory(prefix="halfquad-") as folder:  # the library writes to files alone
            path = Path(folder, FILE)
            with contextlib.closing(writer):
                writer.write_header_to_file(path)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
            return path.read_bytes()


class _BytesWriter:
    """A part: tensors as the bytes that they consist of."""

    def __init__(self, path: Path, tensors: Layout) -> None:
        self._writer = SafetensorsWriter(path, tensors)
        self.nbytes = self._writer.nbytes

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._writer.append(name, memoryview(_bytes_of(tensor)))

    def append(self, name: str, piece: memoryview) -> None:
        self._writer.append(name, piece)

    def close(self) -> str:
        return self._writer.close()

    def discard(self) -> None:
        self._writer.discard()


def stored_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor by ggml's name of its type."""
    numel = 1
    for size in shape:
        numel *= size
    if dtype in PLAIN:
        return numel * PLAIN[dtype]
    return numel // shape[-1] * BLOCK_TYPES[dtype].row_nbytes(shape[-1])


def _as_bytes(tensors: Layout) -> Layout:
    return [(name, "U8", (stored_nbytes(dtype, shape),)) for name, dtype, shape in tensors]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _padding(nbytes: int) -> bytes:
    return bytes(-nbytes % ALIGNMENT)


def _place(name: str) -> tuple[int, str]:
    """By layer, what is in none first."""
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, name)


def _read(path: Path, entry: TensorEntry) -> Iterator[memoryview]:
    """One tensor's bytes in pieces of a few MiB; each piece is valid until the next is asked for."""
    with path.open("rb") as file:
        buffer = memoryview(bytearray(min(CHUNK_NBYTES, entry.nbytes)))
        for begin in range(entry.begin, entry.end, CHUNK_NBYTES):
            piece = buffer[: min(CHUNK_NBYTES, entry.end - begin)]
            read_exactly(file.fileno(), piece, begin, path.name)
            yield piece
