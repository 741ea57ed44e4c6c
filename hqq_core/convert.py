"""The one loop: read a tensor, solve it, write it; then the files that make a folder a checkpoint.

`quantize_shard` and `finish_checkpoint` are the two steps a service runs apart; `quantize_checkpoint` runs them in a row. Each
may run twice with the same result, and the manifest is written last: its presence means complete.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hqq_core.architectures import Role, with_older_names
from hqq_core.checkpoint import CONFIG, INDEX, MANIFEST, REPORT, Checkpoint, ShardReader
from hqq_core.energy import Energies, profile
from hqq_core.errors import CheckpointError
from hqq_core.formats import writer_of
from hqq_core.plan import Plan, ShardPlan, TensorPlan, build_plan, stored_tensors
from hqq_core.recipe import Recipe
from hqq_core.report import metrics_of, report_of
from hqq_core.results import ArtifactFile, Manifest, ShardResult, TensorResult
from hqq_core.safetensors_file import (
    TEMPORARY_PREFIX,
    SafetensorsWriter,
    discard_temporaries,
    read_header,
    sha256_file,
    write_file,
)
from hqq_core.weighting import Weighting

CLAIM = f"{TEMPORARY_PREFIX}claim"
WITH_POINTERS_TO_CODE = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)

Progress = Callable[[int], None]


def quantize_checkpoint(
    source: Path,
    output: Path,
    recipe: Recipe,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Convert the checkpoint in the folder `source` into the new folder `output`.

    Parameters
    ----------
    source, output : Path
        `output` must not exist yet, or be empty, and not lie in `source`. On any error it is left as it was found.
    recipe : Recipe
    threads : int, optional
        Solver threads; default: one per core.
    progress : callable, optional
        Gets source bytes done and in total, which counts them twice where they are read for input energies first; what it
        raises stops the work.

    Returns
    -------
    Manifest
    """
    checkpoint = Checkpoint.open(source)
    plan = build_plan(checkpoint, recipe)
    if output.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{output.name}: lies in the source: wanted a folder beside it")
    existed = output.exists()
    _claim(output)
    try:
        energies, profiled = _profile(checkpoint, plan, output, progress)
        plan = plan.with_energies(energies)
        results = []
        for shard in plan.shards:
            before = profiled + sum(earlier.nbytes_in for earlier in plan.shards[: shard.index])
            report = _from(before, profiled + plan.nbytes_in, progress)
            results.append(
                quantize_shard(checkpoint, plan, shard.index, output, energies, threads=threads, progress=report)
            )
        return finish_checkpoint(checkpoint, plan, results, output)
    except BaseException:
        _empty(output, remove=not existed)
        raise


def _profile(
    checkpoint: Checkpoint, plan: Plan, output: Path, progress: Callable[[int, int], None] | None
) -> tuple[Energies, int]:
    """Input energies, and the bytes that having them counts for; correlations lie in `output` until the end."""
    if not plan.recipe.weighted:
        return profile(checkpoint, "none"), 0
    report = _from(0, 2 * plan.nbytes_in, progress)
    if report:
        report(0)  # transformers takes seconds to load
    correlations = output / f"{TEMPORARY_PREFIX}correlations" if plan.recipe.correlated else None
    return profile(checkpoint, plan.recipe.energy, correlations=correlations, progress=report), plan.nbytes_in


def _from(before: int, total: int, progress: Callable[[int, int], None] | None) -> Progress | None:
    """Progress of a part that `before` bytes come before."""
    return (lambda done: progress(before + done, total)) if progress else None


# --- one shard -----------------------------------------------------------------------------------------------------------


def quantize_shard(
    checkpoint: Checkpoint,
    plan: Plan,
    index: int,
    output: Path,
    energies: Energies | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ShardResult:
    """Read, solve and write the tensors of one input shard.

    Parameters
    ----------
    checkpoint : Checkpoint
    plan : Plan
    index : int
        Which of `plan.shards`.
    output : Path
        Existing folder. Files appear there whole or not at all.
    energies : Energies, optional
        What `plan.with_energies` had.
    threads : int, optional
        Solver threads; default: one per core.
    progress : callable, optional
        Gets the source bytes done so far; what it raises stops the work.

    Returns
    -------
    ShardResult

    Raises
    ------
    CheckpointError, EnergyError, TensorError, StorageFullError
    """
    shard = plan.shards[index]
    weighting = Weighting.of(shard, energies)
    done = _Counter(progress)
    files, results = [], []
    with checkpoint.shard(shard.file) as reader, ThreadPoolExecutor(1) as ahead:
        _check_unchanged(reader, shard)
        for name in {tensor.file for tensor in shard.tensors}:
            discard_temporaries(output / name)
        weights = _read_ahead(reader, shard, ahead)
        for name, tensors in itertools.groupby(shard.tensors, key=lambda tensor: tensor.file):
            group = list(tensors)
            writer = SafetensorsWriter(
                output / name, [stored for tensor in group for stored in stored_tensors(tensor, plan.recipe)]
            )
            try:
                for tensor in group:
                    if tensor.spec is None and tensor.folded:
                        writer.write(tensor.name, weighting.values[tensor.name])
                        done.add(tensor.nbytes_in)
                    elif tensor.spec is None:
                        writer.write_pieces(tensor.name, done.counting(reader.pieces(tensor.name)))
                    else:
                        results.append(_write_quantized(plan, tensor, next(weights), weighting, writer, threads, done))
                digest = writer.close()
            except BaseException:
                writer.discard()
                raise
            files.append(ArtifactFile(name, writer.nbytes, digest))
    return ShardResult(index, tuple(files), tuple(results))


def _check_unchanged(reader: ShardReader, shard: ShardPlan) -> None:
    found = {name: (entry.dtype, entry.shape) for name, entry in reader.entries.items()}
    if found != {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}:
        raise CheckpointError(f"{shard.file}: holds other tensors than when it was planned")


def _write_quantized(
    plan: Plan,
    tensor: TensorPlan,
    W: torch.Tensor,
    weighting: Weighting,
    writer: SafetensorsWriter,
    threads: int | None,
    done: _Counter,
) -> TensorResult:
    assert tensor.spec is not None
    energy, columns, rows = weighting.of_tensor(tensor.name)
    format_writer = writer_of(plan.recipe)
    quantized = format_writer.solve(
        W,
        tensor.spec,
        energy=energy,
        columns=columns,
        rows=rows,
        correlation=weighting.correlation(tensor.name),
        name=tensor.name,
        threads=threads,
        progress=lambda numel: done.add(numel * W.itemsize),
    )
    for name, value in format_writer.encode(tensor.module, quantized).items():
        writer.write(name, value)
    return TensorResult(tensor.name, quantized.numel, quantized.squared_error, quantized.squared_norm)


def _read_ahead(reader: ShardReader, shard: ShardPlan, pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
    """Weights to quantize, in order; the next one is read while this one is solved."""
    names = [tensor.name for tensor in shard.tensors if tensor.spec]
    following = pool.submit(reader.read, names[0]) if names else None
    for name in [*names[1:], None]:
        assert following is not None
        weight = following.result()
        following = pool.submit(reader.read, name) if name else None
        yield weight


class _Counter:
    """Counts source bytes and reports the sum."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._done = progress, 0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress:
            self._progress(self._done)

    def counting(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        for piece in pieces:
            yield piece
            self.add(len(piece))


def verify_shard(result: ShardResult, output: Path, *, progress: Progress | None = None) -> None:
    """Read back what a shard became: headers sound, bytes as they were when written.

    Raises
    ------
    CheckpointError
        Names the file.
    """
    done = _Counter(progress)
    for file in result.files:
        path = output / file.name
        if not path.is_file():
            raise CheckpointError(f"{file.name}: written before, but gone")
        with path.open("rb") as opened:
            read_header(opened.fileno(), file.name)
        digest = sha256_file(path, done.add)
        if digest != file.sha256:
            raise CheckpointError(f"{file.name}: sha256 {digest}: wanted {file.sha256}, as when it was written")


# --- the whole folder ----------------------------------------------------------------------------------------------------


def finish_checkpoint(checkpoint: Checkpoint, plan: Plan, results: list[ShardResult], output: Path) -> Manifest:
    """Write index, config, carried files and report beside the shards, and the manifest last.

    Parameters
    ----------
    checkpoint : Checkpoint
    plan : Plan
    results : list of ShardResult
        One for each of `plan.shards`, in any order.
    output : Path

    Returns
    -------
    Manifest
    """
    results = sorted(results, key=lambda result: result.index)
    assert [result.index for result in results] == [shard.index for shard in plan.shards], "a shard is missing"
    written = [file for result in results for file in result.files]
    metrics = metrics_of(plan, results, written)
    for path in output.rglob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)
    files = [*written, *(_carry(checkpoint, name, output) for name in plan.carried)]
    ours = {CONFIG: _config(checkpoint, plan), REPORT: report_of(checkpoint, plan, results, metrics)}
    if len(written) > 1:
        ours[INDEX] = _index(plan)
    files += [ArtifactFile(name, *write_file(output / name, [_json(value)])) for name, value in ours.items()]
    manifest = Manifest(tuple(sorted(files, key=lambda file: file.name)), metrics)
    write_file(output / MANIFEST, [_json(manifest.to_dict())])
    return manifest


def _carry(checkpoint: Checkpoint, name: str, output: Path) -> ArtifactFile:
    """Copy one file, without pointers to code in the repository where such files have them."""
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    pieces = checkpoint.file_pieces(name)
    if name in WITH_POINTERS_TO_CODE:
        pieces = iter([_without_auto_map(b"".join(pieces))])
    return ArtifactFile(name, *write_file(output / name, pieces))


def _without_auto_map(raw: bytes) -> bytes:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return raw  # not ours to mend
    if not isinstance(fields, dict) or "auto_map" not in fields:
        return raw
    return _json({key: value for key, value in fields.items() if key != "auto_map"})


def _config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The source's config.json with what its format's readers look for, old and new, and without pointers to code."""
    quantized = [tensor.module for tensor in plan.tensors if tensor.spec]
    copied = [tensor.module for tensor in plan.tensors if tensor.spec is None and _may_be_linear(tensor)]
    kept = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    return with_older_names(kept) | writer_of(plan.recipe).config(plan.spec, quantized, copied)


def _may_be_linear(tensor: TensorPlan) -> bool:
    """Whether a reader would take the copied tensor for the weight of a linear layer."""
    no_linear = (Role.EMBEDDING.value, Role.NORM.value, Role.CONV1D.value)
    return len(tensor.shape) == 2 and tensor.name.endswith(".weight") and tensor.reason not in no_linear


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: tensor.file for tensor in plan.tensors for name, _, _ in stored_tensors(tensor, plan.recipe)}
    return {"metadata": {"total_size": plan.nbytes_out}, "weight_map": dict(sorted(weight_map.items()))}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _claim(output: Path) -> None:
    """Take an empty or new folder for this run alone."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        (output / CLAIM).open("x").close()
    except FileExistsError as error:
        raise CheckpointError(f"{output.name}: another run is writing there") from error
    if sorted(path.name for path in output.iterdir()) != [CLAIM]:
        (output / CLAIM).unlink()
        raise CheckpointError(f"{output.name}: exists and is not empty: wanted a new folder for the result")


def _empty(folder: Path, *, remove: bool) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if remove:
        folder.rmdir()
