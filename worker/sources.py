"""The one door to a job's source, a folder below an allowed root or a repo: no other code of ours opens what a user names."""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hqq_core.checkpoint import Checkpoint
from hqq_core.provenance import Provenance
from service.common import repository
from service.common.errors import SourceNotFound
from service.common.repository import Claim
from service.common.roots import SourceRoots
from service.common.status import UnitKind
from worker.heartbeat import Heartbeat
from worker.hub_source import HubSource, fetch_source, open_fetched
from worker.source_cache import Look
from worker.workplace import Workplace

UNREADABLE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG})


@dataclass(frozen=True)
class Source:
    """A job's source, open for one unit.

    Parameters
    ----------
    checkpoint : Checkpoint
    fetched : HubSource, optional
        Where it comes from, if from a repo.
    """

    checkpoint: Checkpoint
    fetched: HubSource | None = None

    @property
    def revision(self) -> str | None:
        """What pins the weights; without it only their bytes tell them apart."""
        return self.fetched.revision if self.fetched else None


@contextmanager
def opened_source(workplace: Workplace, claim: Claim, heartbeat: Heartbeat) -> Iterator[Source]:
    """The source as a unit needs it; of a repo, what comes next is downloaded while the unit computes."""
    if claim.source["type"] != "hub":
        yield Source(open_source(claim.source, workplace.roots))
    else:
        plans = claim.kind == UnitKind.PLAN
        fetched = fetch_source(workplace, claim, heartbeat.look) if plans else open_fetched(workplace, claim)
        reading = _Reading(fetched, heartbeat.look)
        checkpoint = Checkpoint.open(reading.source.folder, lender=reading.lend)
        upcoming = _upcoming(workplace, claim, checkpoint.files, reading)
        with ExitStack() as unit:
            unit.enter_context(workplace.prefetcher.during(claim.job_id, _errand(reading.source, upcoming)))
            if claim.kind == UnitKind.SHARD:  # it is in use between two of its tensors, too
                unit.enter_context(reading.lend(checkpoint.files[claim.index]))
            yield Source(checkpoint, fetched)


def open_source(source: dict[str, Any], roots: SourceRoots) -> Checkpoint:
    """A folder, its config and index read; every file of it, now and later, is opened by the roots."""
    folder = roots.resolve(source["path"])
    try:
        if not folder.is_dir():
            raise SourceNotFound(f"{folder.name}: no such folder")
        return Checkpoint.open(folder, opener=roots.open)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise SourceNotFound(f"{folder.name}: cannot be read: {error.strerror}") from error


def provenance_of(source: dict[str, Any], job_id: str) -> Provenance:
    """What a result says of its source: a repository and its commit, or a folder's name, never its path."""
    if "repo_id" in source:
        return Provenance(repo_id=source["repo_id"], commit=source.get("commit"), job_id=job_id)
    return Provenance(folder=PurePath(source["path"]).name, job_id=job_id)


@dataclass
class _Reading:
    """A unit's way to the weight files, and where it is."""

    source: HubSource
    look: Look
    at: str | None = None

    def lend(self, name: str) -> AbstractContextManager[int]:
        self.at = name
        return self.source.lend(name, self.look)


def _upcoming(
    workplace: Workplace, claim: Claim, files: Sequence[str], reading: _Reading
) -> Callable[[], Sequence[str]]:
    """Weight files in the order in which they will be wanted, the one in use first."""

    def unclaimed() -> Sequence[str]:
        with workplace.database.read() as session:
            waiting = repository.queued_shards(session, claim.job_id)
        return [files[claim.index], *(files[index] for index in waiting)]

    def following() -> Sequence[str]:
        return files[files.index(reading.at) :] if reading.at else ()

    if claim.kind == UnitKind.FINISH:  # it reads what was not verified before, here and there
        return lambda: ()
    return unclaimed if claim.kind == UnitKind.SHARD else following


def _errand(source: HubSource, upcoming: Callable[[], Sequence[str]]) -> Callable[[Look], bool]:
    return lambda look: source.fetch_next(upcoming(), look)
