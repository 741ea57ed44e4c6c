"""Weight files of Hub sources, by what they hold: shared by all jobs and processes, within a budget of bytes.

<key>                  a whole file; key: hex SHA-256 (for files that are not in LFS: git's id)
<key>.lock             held (flock) shared while the file is read, exclusive while it is fetched or thrown out
<key>.<n>.partial/     a fetch of n bytes; without a holder of the lock it is what a broken one left, and the next goes on with it
room.lock              held while room is made
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from hqq_core.errors import Cancelled, StorageFullError

POLL_S = 0.05

Look = Callable[[], None]
Fetch = Callable[[Path], None]

logger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Blob:
    """What a file holds: its key, and its size in bytes."""

    key: str
    nbytes: int


@dataclass(frozen=True)
class SourceCache:
    """At most `limit_nbytes`, of which a fetch reserves its share before it begins; `min_free_nbytes` of the disk stay free.

    Nobody waits for room while holding a file, so all who wait come to their turn. A fetch gets a path, and leaves the whole,
    checked file there; what one that broke leaves beside that path is there for the next. `look` is called while somebody waits,
    and ends the waiting by what it raises.
    """

    folder: Path
    limit_nbytes: int
    min_free_nbytes: int = 0

    @contextmanager
    def lend(self, blob: Blob, fetch: Fetch, look: Look) -> Iterator[int]:
        """A descriptor of the file, fetched first where it is not there; nobody throws it out before it is given back."""
        while True:
            with self._locked(blob.key, fcntl.LOCK_SH, look):
                if (file := self._open(blob)) is not None:
                    try:
                        yield file
                    finally:
                        os.close(file)
                    return
            self.fetch(blob, fetch, look)

    def fetch(self, blob: Blob, fetch: Fetch, look: Look) -> None:
        """Have the file here: one process fetches it, the others wait for that one.

        Raises
        ------
        StorageFullError
            The file alone is larger than the budget, or than the disk has room.
        """
        with self._locked(blob.key, fcntl.LOCK_EX, look):
            while not self.has(blob):
                if (partial := self._reserve(blob, look)) is not None:
                    self._fill(blob, fetch, partial)
                    return
                look()
                time.sleep(POLL_S)

    def fetch_ahead(self, blob: Blob, fetch: Fetch, look: Look, *, spare: Collection[str]) -> bool:
        """The same, unless somebody is at it, or room for it would cost a file in use or in `spare`: whether it was fetched."""
        try:
            with self._locked(blob.key, fcntl.LOCK_EX):
                if self.has(blob) or (partial := self._reserve(blob, look, spare)) is None:
                    return False
                self._fill(blob, fetch, partial)
                return True
        except BlockingIOError:
            return False

    def has(self, blob: Blob) -> bool:
        return self._path(blob).is_file()

    def drop(self, blob: Blob) -> None:
        """Throw a file out, unless somebody is reading it."""
        self._evict(self._path(blob))

    def make_disk_room(self, nbytes: int) -> None:
        """Throw out what is not in use, as far as it helps so many bytes to be written beside the cache."""
        if not self.folder.is_dir() or self._disk_nbytes() >= nbytes:
            return
        with self._room(lambda: None):
            for path in self._oldest_first():
                if self._disk_nbytes() >= nbytes:
                    return
                self._evict(path)

    def sweep(self) -> None:
        """Remove what broken fetches left."""
        if self.folder.is_dir():
            with self._room(lambda: None):
                self._sweep()

    # room

    def _reserve(self, blob: Blob, look: Look, spare: Collection[str] = ()) -> Path | None:
        """A folder to fetch into, with room for all of the file; None where what stands in the way is in use."""
        if blob.nbytes > self.limit_nbytes:
            raise StorageFullError(
                f"a source file of {blob.nbytes} bytes: the cache for sources may hold {self.limit_nbytes}"
            )
        with self._room(look):
            partial = self.folder / f"{blob.key}.{blob.nbytes}.partial"
            if not partial.is_dir():
                if not self._make_room(blob.nbytes, spare):
                    return None
                partial.mkdir(mode=0o700)
            return partial

    def _make_room(self, nbytes: int, spare: Collection[str]) -> bool:
        if self._used_nbytes() + nbytes <= self.limit_nbytes and self._disk_nbytes() >= nbytes:
            return True
        self._sweep()
        candidates = [path for path in self._oldest_first() if path.name not in spare]
        removable = sum(_size(path) for path in candidates)
        if self._used_nbytes() - removable + nbytes > self.limit_nbytes:
            return False  # not for all of them
        while self._used_nbytes() + nbytes > self.limit_nbytes or self._disk_nbytes() < nbytes:
            if candidates:
                self._evict(candidates.pop(0))
                continue
            if not self._used_nbytes():
                raise StorageFullError(f"a source file of {nbytes} bytes: the disk has room for {self._disk_nbytes()}")
            return False
        return True

    def _used_nbytes(self) -> int:
        """Whole files, and what is reserved for those that are being fetched."""
        return sum(map(_size, self._blobs())) + sum(map(_reserved, self._partials()))

    def _disk_nbytes(self) -> int:
        """What may still be written, when all that is being fetched is there."""
        to_come = sum(_reserved(partial) - _written(partial) for partial in self._partials())
        return shutil.disk_usage(self.folder).free - self.min_free_nbytes - to_come

    def _evict(self, path: Path) -> bool:
        try:
            with self._locked(path.name, fcntl.LOCK_EX, keep=False):
                path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        logger.info("Threw a source file out.", action="source_file_dropped", key=path.name)
        return True

    def _sweep(self) -> None:
        unused = {path.stem for path in self.folder.glob("*.lock")} - {path.name for path in self._blobs()} - {"room"}
        for key in unused | {path.name.partition(".")[0] for path in self._partials()}:
            try:
                with self._locked(key, fcntl.LOCK_EX, keep=False):
                    for partial in self.folder.glob(f"{key}.*.partial"):
                        shutil.rmtree(partial, ignore_errors=True)
            except BlockingIOError:
                continue

    # files

    def _fill(self, blob: Blob, fetch: Fetch, partial: Path) -> None:
        try:
            fetch(partial / blob.key)
        except Cancelled:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / blob.key).replace(self._path(blob))
        _sync(self.folder)
        shutil.rmtree(partial, ignore_errors=True)

    def _open(self, blob: Blob) -> int | None:
        try:
            os.utime(self._path(blob))  # used last
            return os.open(self._path(blob), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None

    def _path(self, blob: Blob) -> Path:
        return self.folder / blob.key

    def _blobs(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if "." not in path.name]

    def _partials(self) -> list[Path]:
        return list(self.folder.glob("*.partial"))

    def _oldest_first(self) -> list[Path]:
        return sorted(self._blobs(), key=_used_at)

    # locks

    @contextmanager
    def _room(self, look: Look) -> Iterator[None]:
        with self._locked("room", fcntl.LOCK_EX, look):
            yield

    @contextmanager
    def _locked(self, key: str, mode: int, look: Look | None = None, *, keep: bool = True) -> Iterator[None]:
        """Hold the lock of a key; without `look` BlockingIOError where another holds it. `keep`: leave its file behind."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.folder / f"{key}.lock"
        while (held := _lock(path, mode)) is None:
            if look is None:
                raise BlockingIOError(f"{key} is in use")
            look()
            time.sleep(POLL_S)
        try:
            yield
            if not keep:
                path.unlink(missing_ok=True)
        finally:
            os.close(held)


def _lock(path: Path, mode: int) -> int | None:
    """A descriptor that holds the lock, and whose file is still the one under that name."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except FileNotFoundError:
            pass
        os.close(file)  # whoever had the lock before us removed its file


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _used_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _reserved(partial: Path) -> int:
    return int(partial.name.split(".")[1])


def _written(partial: Path) -> int:
    """Bytes on the disk, of a file that may be written with holes."""
    found = 0
    with suppress(FileNotFoundError):  # it has just become whole
        for path in partial.rglob("*"):
            found += path.stat().st_blocks * 512
    return min(found, _reserved(partial))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
