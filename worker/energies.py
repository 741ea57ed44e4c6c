"""The input energies of a job's source: measured, in a thread of their own, or found in the cache."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from hqq_core.checkpoint import Checkpoint
from hqq_core.energy import Energies, fingerprint, profile
from hqq_core.plan import Plan
from hqq_core.safetensors_file import discard_temporaries, temporary_path
from worker.energy_cache import EnergyCache
from worker.heartbeat import Heartbeat

T = TypeVar("T")
LOOK_S = 0.2

# One at a time: what a stopped unit left behind, an import or a large product, ends before the next begins.
_aside = ThreadPoolExecutor(1, thread_name_prefix="energies")


def obtain(
    checkpoint: Checkpoint, plans: Sequence[Plan], path: Path, cache: EnergyCache, heartbeat: Heartbeat
) -> tuple[Energies, bool]:
    """The energies that a job's recipes ask for, also saved at `path`, and whether an earlier job had left them."""
    mode = next(plan.recipe.energy for plan in plans if plan.recipe.weighted)  # on which they agree
    correlated = any(plan.recipe.correlated for plan in plans)
    kind = f"{mode}, correlated" if correlated else mode
    before = _state(checkpoint)
    discard_temporaries(path)
    source = _stoppable(lambda: fingerprint(checkpoint, progress=heartbeat.progress), heartbeat)
    if (found := cache.fetch(source, kind, path)) is not None:
        return found, True

    def progress(nbytes: int) -> None:
        heartbeat.progress(plans[0].nbytes_in + nbytes)

    beside = temporary_path(path) if correlated else None
    energies = _stoppable(lambda: profile(checkpoint, mode, correlations=beside, progress=progress), heartbeat)
    try:
        energies.save(path, source)
    finally:
        if beside:
            beside.unlink(missing_ok=True)
    if correlated:
        energies = Energies.load(path, fingerprint=source)
    # analytic ones for "auto" come of a bad moment, of which others should not suffer
    if (mode != "auto" or "synthetic" in energies.sources.values()) and _state(checkpoint) == before:
        cache.keep(source, kind, path)
    return energies, False


def _state(checkpoint: Checkpoint) -> list[tuple[int, int, int]]:
    """Of the weight files: another one if they were touched, so what was hashed may not be what was measured."""
    states = []
    for file in checkpoint.files:
        with checkpoint.shard(file) as reader:
            status = os.fstat(reader.file)
        states.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return states


def _stoppable(work: Callable[[], T], heartbeat: Heartbeat) -> T:
    """The result of work that may be silent for many seconds; where the unit has to stop, nobody waits for it."""
    future = _aside.submit(work)
    while not wait([future], LOOK_S).done:
        heartbeat.look()
    heartbeat.look()  # what is no longer ours writes nothing
    return future.result()
