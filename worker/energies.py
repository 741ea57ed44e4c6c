"""The input energies of a job's source: measured, in a thread of their own, or found in the cache."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from hqq_core.checkpoint import Checkpoint
from hqq_core.energy import Energies, Passed, fingerprint, profile
from hqq_core.errors import HalfquadError
from hqq_core.plan import Plan
from hqq_core.safetensors_file import discard_temporaries, temporary_path
from worker.energy_cache import EnergyCache
from worker.heartbeat import Heartbeat
from worker.sources import Source

T = TypeVar("T")
LOOK_S = 0.2

# One at a time: what a stopped unit left behind, an import or a large product, ends before the next begins.
_aside = ThreadPoolExecutor(1, thread_name_prefix="energies")


def obtain(
    opened: Source,
    plans: Sequence[Plan],
    path: Path,
    cache: EnergyCache,
    heartbeat: Heartbeat,
    passed: Passed | None = None,
) -> tuple[Energies, bool]:
    """The energies that a job's recipes ask for, also saved at `path`, and whether an earlier job had left them."""
    mode = next(plan.recipe.energy for plan in plans if plan.recipe.weighted)  # on which they agree
    correlated = any(plan.recipe.correlated for plan in plans)
    kind = f"{mode}, correlated" if correlated else mode
    checkpoint = _open_or_fail(opened.checkpoint)
    before = _state(opened)
    discard_temporaries(path)
    source = _stoppable(lambda: fingerprint(checkpoint, opened.revision, progress=heartbeat.progress), heartbeat)
    if (found := cache.fetch(source, kind, path)) is not None:
        return found, True

    def progress(nbytes: int) -> None:
        heartbeat.progress(plans[0].nbytes_in + nbytes)

    beside = temporary_path(path) if correlated else None
    try:
        energies = _stoppable(
            lambda: profile(checkpoint, mode, correlations=beside, passed=passed, progress=progress), heartbeat
        )
        energies.save(path, source)
    except _NotLent as error:
        raise error.why from None
    finally:
        if beside:
            beside.unlink(missing_ok=True)
    if correlated:
        energies = Energies.load(path, fingerprint=source)
    # analytic ones for "auto" come of a bad moment, of which others should not suffer
    if (mode != "auto" or "synthetic" in energies.sources.values()) and _state(opened) == before:
        cache.keep(source, kind, path)
    return energies, False


class _NotLent(HalfquadError):
    """Carries why a weight file could not be had past code that takes every other error for a model it cannot run."""

    def __init__(self, why: Exception) -> None:
        super().__init__(str(why))
        self.why = why


def _open_or_fail(checkpoint: Checkpoint) -> Checkpoint:
    """The same; where a weight file cannot be had, there is no other way to energies."""
    lender = checkpoint.lender
    if lender is None:
        return checkpoint

    @contextmanager
    def lend(name: str) -> Iterator[int]:
        with ExitStack() as lent:
            try:
                file = lent.enter_context(lender(name))
            except HalfquadError:
                raise
            except Exception as error:
                raise _NotLent(error) from error
            yield file

    return replace(checkpoint, lender=lend)


def _state(opened: Source) -> list[tuple[int, int, int]]:
    """Of weight files that nothing pins: another one if they were touched, so what was hashed may not be what was measured."""
    states = []
    for file in opened.checkpoint.files if opened.revision is None else ():
        with opened.checkpoint.shard(file) as reader:
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
