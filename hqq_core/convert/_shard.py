"""quantize_shard(): each tensor of a shard is read once, solved once for each way it is to be solved, and written."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import torch

from hqq_core.checkpoint import Checkpoint, ShardReader
from hqq_core.convert._output import ShardOutput
from hqq_core.convert._progress import Counter, Progress
from hqq_core.energy import Energies
from hqq_core.errors import CheckpointError
from hqq_core.plan import Plan, ShardPlan, TensorPlan
from hqq_core.results import CopiedTensor, ShardResult, TensorResult
from hqq_core.tensors import QuantizedTensor

Work = list[tuple[ShardOutput, TensorPlan]]  # one tensor, as each plan has it


def quantize_shard(
    checkpoint: Checkpoint,
    plans: Sequence[Plan],
    index: int,
    output: Path,
    energies: Energies | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[ShardResult, ...]:
    """Read, solve and write the tensors of one input shard.

    Memory holds the tensor in work, the next one, and one result of the solver at a time, for any number of plans.

    Parameters
    ----------
    checkpoint : Checkpoint
    plans : sequence of Plan
        As `build_plans` made them for one job. What they have solved alike is solved once.
    index : int
        Which of their `shards`.
    output : Path
        Existing folder of the job. Files appear in it, or in the folder of each plan below, whole or not at all.
    energies : Energies, optional
        What `Plan.with_energies` had.
    threads : int, optional
        Solver threads; default: one per core.
    progress : callable, optional
        Gets the source bytes done so far; what it raises stops the work.

    Returns
    -------
    tuple of ShardResult
        One for each plan.

    Raises
    ------
    CheckpointError, EnergyError, TensorError, StorageFullError
    """
    shards = [plan.shards[index] for plan in plans]
    done = Counter(progress)
    with checkpoint.shard(shards[0].file) as reader, ThreadPoolExecutor(2) as aside, ExitStack() as on_error:
        for shard in shards:
            _check_unchanged(reader, shard)
        outputs = [ShardOutput(checkpoint, plan, index, output, energies) for plan in plans]
        for opened in outputs:
            on_error.callback(opened.discard)
        tensors = [
            list(zip(outputs, planned, strict=True)) for planned in zip(*(s.tensors for s in shards), strict=True)
        ]
        weights = _read_ahead(reader, [work[0][1].name for work in tensors if _whole(work)], aside)
        for work in tensors:
            if _whole(work):
                _convert(work, next(weights), threads, done, aside)
            else:
                _copy(work, reader, done)
        results = tuple(opened.close() for opened in outputs)
        on_error.pop_all()
    return results


def _check_unchanged(reader: ShardReader, shard: ShardPlan) -> None:
    found = {name: (entry.dtype, entry.shape) for name, entry in reader.entries.items()}
    if found != {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}:
        raise CheckpointError(f"{shard.file}: holds other tensors than when it was planned")


def _whole(work: Work) -> bool:
    """Whether some plan wants the tensor in memory."""
    return any(tensor.spec or (not tensor.folded and output.encodes(tensor)) for output, tensor in work)


def _read_ahead(reader: ShardReader, names: Sequence[str], pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
    """Whole tensors, in order; the next one is read while this one is solved."""
    following = pool.submit(reader.read, names[0]) if names else None
    for name in [*names[1:], None]:
        assert following is not None
        weight = following.result()
        following = pool.submit(reader.read, name) if name else None
        yield weight


def _copy(work: Work, reader: ShardReader, done: Counter) -> None:
    """A tensor that no plan wants whole: pieces of it for those that leave it as it is."""
    _fold(work)
    as_it_is = [(output, tensor) for output, tensor in work if not tensor.folded]
    name, nbytes = work[0][1].name, work[0][1].nbytes_in
    digest = hashlib.sha256()
    for piece in reader.pieces(name) if as_it_is else ():
        digest.update(piece)
        for output, tensor in as_it_is:
            output.append(tensor, piece)
        done.add(len(piece))
    for output, _ in as_it_is:
        output.note(CopiedTensor(name, digest.hexdigest()))
    if not as_it_is:
        done.add(nbytes)


def _convert(work: Work, W: torch.Tensor, threads: int | None, done: Counter, aside: ThreadPoolExecutor) -> None:
    """A tensor in memory: copies of it first, then what is solved, one result at a time, hashed while it is written."""
    _fold(work)
    for output, tensor in work:
        if tensor.spec is None and not tensor.folded:
            output.copy(tensor, W)
    problems: dict[object, Work] = defaultdict(list)
    for output, tensor in work:
        if tensor.spec:
            problems[tensor.problem, type(output.writer).solve].append((output, tensor))
    for asking in problems.values():
        quantized = _solve(W, *asking[0], Fraction(W.itemsize, len(problems)), threads, done)
        digest = aside.submit(quantized.digest)
        for output, tensor in asking:
            output.quantized(tensor, quantized)
        errors = quantized.squared_error, quantized.squared_norm
        result = TensorResult(work[0][1].name, quantized.numel, *errors, digest.result())
        for output, _ in asking:
            output.note(result)
    if not problems:
        done.add(W.nbytes)


def _fold(work: Work) -> None:
    for output, tensor in work:
        if tensor.spec is None and tensor.folded:
            output.fold(tensor)


def _solve(
    W: torch.Tensor, output: ShardOutput, tensor: TensorPlan, share: Fraction, threads: int | None, done: Counter
) -> QuantizedTensor:
    """`share` is what one solved weight counts for, in bytes."""
    assert tensor.spec is not None
    energy, columns, rows = output.weighting.of_tensor(tensor.name)
    return output.writer.solve(
        W,
        tensor.spec,
        energy=energy,
        columns=columns,
        rows=rows,
        correlation=output.weighting.correlation(tensor.name),
        name=tensor.name,
        threads=threads,
        progress=lambda numel: done.add(numel * share),
    )
