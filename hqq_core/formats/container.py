"""Container: the files that a format's tensors lie in. Safetensors files here; another format may bring its own.

Shards are written apart, maybe on several machines, so each writes part files of its own, and `finish` makes of all parts what
readers look for. Safetensors parts are that already, and an index joins them. Where readers want one file, shards write raw
tensors, in order, and `finish` writes header and parts into that file in one pass, hashed as it goes. Parts that it does not
return are removed once the manifest is there, so the step may run twice, also after a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from hqq_core.checkpoint import INDEX, SINGLE, Checkpoint
from hqq_core.results import ArtifactFile
from hqq_core.safetensors_file import SafetensorsWriter, header_nbytes, tensor_nbytes, write_json

Layout = list[tuple[str, str, tuple[int, ...]]]  # (name, dtype in the container's words, shape) of each stored tensor


@dataclass(frozen=True, slots=True)
class Part:
    """A file that was written of a shard, and the tensors in it, in the order of the source."""

    file: ArtifactFile
    tensors: Layout


Finished = tuple[list[ArtifactFile], list[ArtifactFile]]


class PartWriter(Protocol):
    """One open part; its name appears when all is there."""

    nbytes: int

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """One whole tensor, as it was announced."""

    def append(self, name: str, piece: memoryview) -> None:
        """The next bytes of one tensor, which is never held whole."""

    def close(self) -> str:
        """Make the file durable under its final name; its SHA-256."""

    def discard(self) -> None:
        """Leave nothing behind."""


class Container(Protocol):
    """How tensors become files."""

    @property
    def block_types(self) -> bool:
        """Whether its tensors have types that say more than a dtype, which a report names."""

    def part_name(self, number: int, total: int) -> str:
        """What the `number`-th of `total` parts is called, from 1."""

    def nbytes(self, tensors: Layout) -> int:
        """Bytes of their data."""

    def header_nbytes(self, tensors: Layout) -> int:
        """No fewer bytes than they take in a part beside their data."""

    def finish_nbytes(self, nbytes: int) -> int:
        """Bytes that `finish` needs on the disk beside parts of `nbytes`."""

    def open(self, path: Path, tensors: Layout) -> PartWriter:
        """A new part that will hold these tensors."""

    def finish(self, checkpoint: Checkpoint, parts: Sequence[Part], folder: Path) -> Finished:
        """Make of all parts what readers look for, from the same parts the same bytes: weight files, and others beside."""


class Safetensors:
    """As `save_pretrained` writes it: one file, or several and an index."""

    block_types = False

    def part_name(self, number: int, total: int) -> str:
        """As transformers numbers them."""
        return SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"

    def nbytes(self, tensors: Layout) -> int:
        """Dense tensors."""
        return sum(tensor_nbytes(dtype, shape) for _, dtype, shape in tensors)

    def header_nbytes(self, tensors: Layout) -> int:
        """Entries of the JSON header."""
        return header_nbytes(tensors)

    def finish_nbytes(self, nbytes: int) -> int:
        """Parts stay where they are."""
        return 0

    def open(self, path: Path, tensors: Layout) -> PartWriter:
        """A file whose tensors are written at their places."""
        return SafetensorsWriter(path, tensors)

    def finish(self, checkpoint: Checkpoint, parts: Sequence[Part], folder: Path) -> Finished:
        """The parts, and an index of several."""
        files = [part.file for part in parts]
        if len(parts) == 1:
            return files, []
        weight_map = {name: part.file.name for part in parts for name, _, _ in part.tensors}
        total = sum(self.nbytes(part.tensors) for part in parts)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return files, [ArtifactFile(INDEX, *write_json(folder / INDEX, index))]
