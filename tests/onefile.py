"""A format of one file, for tests: header and all tensors in `model.one`, joined of what the shards left."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from hqq_core.checkpoint import Checkpoint
from hqq_core.formats.container import Finished, Layout, Part
from hqq_core.formats.hqq import HqqWriter
from hqq_core.results import ArtifactFile
from hqq_core.safetensors_file import CHUNK_NBYTES, DTYPES, tensor_nbytes, write_file

RESULT = "model.one"


class RawPart:
    """Tensors one after the other, in the order announced."""

    def __init__(self, path: Path, tensors: Layout) -> None:
        self._path, self._temporary = path, path.with_name(f".partial-{path.name}")
        self._at, self.nbytes = {}, 0
        for name, dtype, shape in tensors:
            self._at[name] = self.nbytes
            self.nbytes += tensor_nbytes(dtype, shape)
        self._file = self._temporary.open("wb")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self.append(name, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def append(self, name: str, piece: memoryview) -> None:
        self._file.seek(self._at[name])
        self._file.write(piece)
        self._at[name] += len(piece)

    def close(self) -> str:
        self._file.close()
        os.replace(self._temporary, self._path)
        return hashlib.sha256(self._path.read_bytes()).hexdigest()

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class OneFile:
    """A line of JSON, then the parts."""

    block_types = False

    def part_name(self, number: int, total: int) -> str:
        return f"{RESULT}.part{number}"

    def nbytes(self, tensors: Layout) -> int:
        return sum(tensor_nbytes(dtype, shape) for _, dtype, shape in tensors)

    def header_nbytes(self, tensors: Layout) -> int:
        return 0

    def finish_nbytes(self, nbytes: int) -> int:
        return nbytes

    def open(self, path: Path, tensors: Layout) -> RawPart:
        return RawPart(path, tensors)

    def finish(self, checkpoint: Checkpoint, parts: Sequence[Part], folder: Path) -> Finished:
        def pieces() -> Iterator[bytes]:
            yield json.dumps([tensor for part in parts for tensor in part.tensors]).encode() + b"\n"
            for part in parts:
                with (folder / part.file.name).open("rb") as file:
                    while piece := file.read(CHUNK_NBYTES):
                        yield piece

        return [ArtifactFile(RESULT, *write_file(folder / RESULT, pieces()))], []


class OneFileWriter(HqqWriter):
    """As `hqq`, in one file; what is copied lies in float32 under a name with the model's type, its rows upside down."""

    name = "one-file"

    @property
    def container(self) -> OneFile:
        return OneFile()

    def __init__(self, model_type: str = "") -> None:
        self._model_type = model_type

    def of_model(self, checkpoint: Checkpoint) -> OneFileWriter:
        return OneFileWriter(checkpoint.config["model_type"])

    def layout_copied(self, name: str, dtype: str, shape: tuple[int, ...]) -> Layout:
        return [(f"{self._model_type}.{name}", "F32", shape)]

    def encode_copied(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"{self._model_type}.{name}": tensor.float().flip(0)}


def read_one_file(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a result."""
    header, _, data = (folder / RESULT).read_bytes().partition(b"\n")
    tensors, at = {}, 0
    for name, dtype, shape in json.loads(header):
        nbytes = tensor_nbytes(dtype, shape)
        raw = torch.frombuffer(bytearray(data[at : at + nbytes]), dtype=torch.uint8)
        tensors[name] = raw.view(DTYPES[dtype]).reshape(shape)
        at += nbytes
    assert at == len(data)
    return tensors
