"""ShardOutput: the files that one plan makes of one shard."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

import torch

from hqq_core.checkpoint import Checkpoint
from hqq_core.energy import Energies
from hqq_core.formats import writer_for
from hqq_core.formats.container import Layout, PartWriter
from hqq_core.plan import Plan, TensorPlan, stored_tensors
from hqq_core.results import ArtifactFile, CopiedTensor, ShardResult, TensorResult
from hqq_core.safetensors_file import discard_temporaries
from hqq_core.tensors import QuantizedTensor
from hqq_core.weighting import Weighting


class ShardOutput:
    """Takes a shard's tensors in the order of the plan, one file open at a time; files appear whole or not at all.

    Parameters
    ----------
    checkpoint : Checkpoint
    plan : Plan
    index : int
        Which of `plan.shards`.
    output : Path
        The job's; the plan's own folder is made in it.
    energies : Energies or None
        What `plan.with_energies` had.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, index: int, output: Path, energies: Energies | None) -> None:
        shard = plan.shards[index]
        self.weighting = Weighting.of(shard, energies if plan.recipe.weighted else None)
        self.writer = writer_for(plan.recipe, checkpoint)
        self._index, self._folder = index, output / plan.folder
        self._layouts: dict[str, Layout] = defaultdict(list)
        for tensor in shard.tensors:
            self._layouts[tensor.file] += stored_tensors(tensor, self.writer)
        if plan.folder:
            self._folder.mkdir(exist_ok=True)
        for name in self._layouts:
            discard_temporaries(self._folder / name)
        self._name, self._part = "", None  # type: str, PartWriter | None
        self._files: list[ArtifactFile] = []
        self._tensors: list[TensorResult] = []
        self._copied: list[CopiedTensor] = []

    def encodes(self, tensor: TensorPlan) -> bool:
        """Whether a copied tensor is wanted whole, to be stored otherwise than it is."""
        return self.writer.layout_copied(tensor.name, tensor.dtype, tensor.shape) is not None

    def append(self, tensor: TensorPlan, piece: memoryview) -> None:
        """The next bytes of a tensor that stays as it is."""
        self._part_of(tensor).append(tensor.name, piece)

    def copy(self, tensor: TensorPlan, value: torch.Tensor) -> None:
        """A whole tensor that is not quantized."""
        stored = self.writer.encode_copied(tensor.name, value) if self.encodes(tensor) else {tensor.name: value}
        self._write(tensor, stored)
        digest = hashlib.sha256()
        for part in stored.values():
            digest.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
        self.note(CopiedTensor(tensor.name, digest.hexdigest()))

    def fold(self, tensor: TensorPlan) -> None:
        """A tensor that takes up a fold and is not quantized: its values as they become."""
        self.copy(tensor, self.weighting.values[tensor.name])

    def quantized(self, tensor: TensorPlan, quantized: QuantizedTensor) -> None:
        """A tensor as it was solved."""
        self._write(tensor, self.writer.encode(tensor.module, quantized))

    def note(self, result: TensorResult | CopiedTensor) -> None:
        """What is to be said of a tensor that was written."""
        if isinstance(result, TensorResult):
            self._tensors.append(result)
        else:
            self._copied.append(result)

    def close(self) -> ShardResult:
        """All is there."""
        self._close_part()
        return ShardResult(self._index, tuple(self._files), tuple(self._tensors), tuple(self._copied))

    def discard(self) -> None:
        """Leave nothing half written behind."""
        if self._part:
            self._part.discard()

    def _write(self, tensor: TensorPlan, stored: dict[str, torch.Tensor]) -> None:
        part = self._part_of(tensor)
        for name, value in stored.items():
            part.write(name, value)

    def _part_of(self, tensor: TensorPlan) -> PartWriter:
        if self._part is None or self._name != tensor.file:
            self._close_part()
            self._name = tensor.file
            self._part = self.writer.container.open(self._folder / self._name, self._layouts[self._name])
        return self._part

    def _close_part(self) -> None:
        if self._part:
            digest = self._part.close()
            self._files.append(ArtifactFile(self._name, self._part.nbytes, digest))
            self._part = None
