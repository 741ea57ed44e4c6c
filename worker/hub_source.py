"""A source at a Hub: small files and headers in the job's folder, weight files by way of the cache.

The plan unit pins the commit and leaves snapshot.json beside source/; no later unit asks the Hub for anything but weight files.
"""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog

from hqq_core.checkpoint import Checkpoint, open_file
from hqq_core.safetensors_file import write_json
from service.common import repository
from service.common.errors import ResultDamaged, SourceDamaged
from service.common.repository import Claim
from worker.access import hub_of
from worker.hub import Hub, RemoteFile, Snapshot
from worker.kept_source import blob_of, forget_source, read_snapshot, snapshot_path
from worker.source_cache import Look, SourceCache
from worker.workplace import Workplace

logger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class HubSource:
    """One repo at one commit, as a job has it.

    Parameters
    ----------
    snapshot : Snapshot
    hub : Hub
    cache : SourceCache
    folder : Path
        The job's: all but the data of the weight files.
    """

    snapshot: Snapshot
    hub: Hub
    cache: SourceCache
    folder: Path
    _checked: set[str] = field(default_factory=set, init=False, repr=False)
    _checking: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def revision(self) -> str:
        """What pins the weights, whichever repo and commit they are in."""
        held = sorted((file.path, blob_of(file).key) for file in self.snapshot.weights)
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()

    def checkpoint(self, look: Look) -> Checkpoint:
        """All of it: weight files are downloaded when one of their tensors is read, and `look` is called meanwhile."""
        return Checkpoint.open(self.folder, lender=lambda name: self.lend(name, look))

    @contextmanager
    def lend(self, name: str, look: Look) -> Iterator[int]:
        """A descriptor of a whole weight file, downloaded first where it is not there."""
        file = self._file(name)
        with self.cache.lend(blob_of(file), self._download(file, look), look) as lent:
            self._check_header(lent, name)
            yield lent

    def has(self, name: str) -> bool:
        """Whether a weight file is here."""
        return self.cache.has(blob_of(self._file(name)))

    def drop(self, name: str) -> None:
        """Throw a weight file out, unless somebody is reading it."""
        self.cache.drop(blob_of(self._file(name)))

    def fetch_next(self, upcoming: Collection[str], look: Look) -> bool:
        """Download the first of these that is not there, if room for it costs none of those before: whether it was."""
        spare: set[str] = set()
        for name in upcoming:
            file = self._file(name)
            blob = blob_of(file)
            if not self.cache.has(blob):
                return self.cache.fetch_ahead(blob, self._download(file, look), look, spare=spare)
            spare.add(blob.key)
        return False

    def _file(self, name: str) -> RemoteFile:
        return next(file for file in self.snapshot.weights if file.path == name)

    def _download(self, file: RemoteFile, look: Look) -> Callable[[Path], None]:
        def download(path: Path) -> None:
            self.hub.download(self.snapshot, file, path, look=look)
            about = {"file": file.path, "nbytes": file.nbytes}
            logger.info("Downloaded a source file.", action="source_file_downloaded", **about)

        return download

    def _check_header(self, lent: int, name: str) -> None:
        """The plan went by a header that came alone: the whole file must have the same."""
        with self._checking:
            if name in self._checked:
                return
            alone = open_file(self.folder / name)
            try:
                if _header(alone) != _header(lent):
                    raise SourceDamaged(f"{name}: the Hub gave another header than the file has")
            finally:
                os.close(alone)
            self._checked.add(name)


def fetch_source(workplace: Workplace, claim: Claim, look: Look) -> HubSource:
    """The plan unit's: pin the commit, and fetch all but the weights; a start after a crash goes by the same commit."""
    hub = hub_of(workplace.settings, claim.source.get("credential"))
    revision = claim.source.get("commit") or claim.source["revision"]
    snapshot = hub.resolve(claim.source["repo_id"], revision, look=look)
    with workplace.database.write() as session:
        pinned = {**claim.source, "repo_id": snapshot.repo_id, "commit": snapshot.commit}
        repository.pin_source(session, claim, pinned)
    workplace.store.create(claim.job_id)
    folder, partial = workplace.store.source(claim.job_id), workplace.store.partial_source(claim.job_id, claim.fence)
    forget_source(workplace, claim.job_id)
    partial.mkdir(mode=0o700)
    hub.fetch_small(snapshot, partial, look=look)
    write_json(snapshot_path(folder), asdict(snapshot))
    partial.rename(folder)
    return HubSource(snapshot, hub, workplace.cache, folder)


def open_fetched(workplace: Workplace, claim: Claim) -> HubSource:
    """What the plan unit left."""
    folder = workplace.store.source(claim.job_id)
    if not folder.is_dir():
        raise ResultDamaged("the job's copy of its source is gone: submit the job again")
    return HubSource(
        read_snapshot(folder), hub_of(workplace.settings, claim.source.get("credential")), workplace.cache, folder
    )


def _header(file: int) -> bytes:
    return os.pread(file, 8 + struct.unpack("<Q", os.pread(file, 8, 0))[0], 0)
