"""A whole job in this process: the steps that a service runs apart, one after the other."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from hqq_core.checkpoint import Checkpoint
from hqq_core.convert._folder import finish_checkpoint
from hqq_core.convert._progress import JobProgress, progress_from
from hqq_core.convert._shard import quantize_shard
from hqq_core.energy import Energies, profile
from hqq_core.errors import CheckpointError
from hqq_core.folding import write_folding
from hqq_core.plan import Plan, build_plans
from hqq_core.provenance import Provenance
from hqq_core.recipe import Recipe
from hqq_core.results import Manifest
from hqq_core.safetensors_file import TEMPORARY_PREFIX

CLAIM = f"{TEMPORARY_PREFIX}claim"


def quantize_checkpoint(
    source: Path,
    output: Path,
    *recipes: Recipe,
    threads: int | None = None,
    progress: JobProgress | None = None,
    provenance: Provenance | None = None,
    repo_id: str | None = None,
) -> tuple[Manifest, ...]:
    """Convert the checkpoint in the folder `source` into the new folder `output`, for each recipe, reading it once for all.

    Parameters
    ----------
    source, output : Path
        `output` must not exist yet, or be empty, and not lie in `source`. On any error it is left as it was found.
    recipes : Recipe
        The result of one alone is `output` itself, those of several are sub-folders: see `outputs.output_folders`.
    threads : int, optional
        Solver threads; default: one per core.
    progress : callable, optional
        Gets source bytes done and in total, which counts them twice where they are read for input energies first; what it
        raises stops the work.
    provenance, repo_id
        As in `finish_checkpoint`.

    Returns
    -------
    tuple of Manifest
        One for each recipe.
    """
    checkpoint = Checkpoint.open(source)
    plans = build_plans(checkpoint, recipes)
    if output.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{output.name}: lies in the source: wanted a folder beside it")
    existed = output.exists()
    _claim(output)
    try:
        energies, profiled = _profile(checkpoint, plans, output, progress)
        plans = tuple(plan.with_energies(energies) for plan in plans)
        for plan in plans:
            write_folding(plan, energies, output)
        nbytes_in, before, results = plans[0].nbytes_in, profiled, []
        for shard in plans[0].shards:
            report = progress_from(before, profiled + nbytes_in, progress)
            results.append(
                quantize_shard(checkpoint, plans, shard.index, output, energies, threads=threads, progress=report)
            )
            before += shard.nbytes_in
        manifests = tuple(
            finish_checkpoint(checkpoint, plan, own, output, provenance=provenance, repo_id=repo_id)
            for plan, own in zip(plans, zip(*results, strict=True), strict=True)
        )
        for left in output.glob(f"{TEMPORARY_PREFIX}*"):
            left.unlink()
    except BaseException:
        _empty(output, remove=not existed)
        raise
    return manifests


def _profile(
    checkpoint: Checkpoint, plans: Sequence[Plan], output: Path, progress: JobProgress | None
) -> tuple[Energies, int]:
    """Input energies, and the bytes that having them counts for; correlations lie in `output` until the end."""
    weighted = [plan.recipe for plan in plans if plan.recipe.weighted]
    if not weighted:
        return profile(checkpoint, "none"), 0
    nbytes_in = plans[0].nbytes_in
    report = progress_from(0, 2 * nbytes_in, progress)
    if report:
        report(0)  # transformers takes seconds to load
    correlated = any(recipe.correlated for recipe in weighted)
    correlations = output / f"{TEMPORARY_PREFIX}correlations" if correlated else None
    return profile(checkpoint, weighted[0].energy, correlations=correlations, progress=report), nbytes_in


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
