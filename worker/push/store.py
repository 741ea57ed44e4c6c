"""A folder or a prefix of a bucket, through fsspec: every file there whole or not at all, and known to be right."""

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
from fsspec.callbacks import Callback

from worker.push.files import PushFile

PROTOCOLS = ("file", "s3")  # those that are tested: a rename that replaces, or objects that appear whole
PART_NBYTES = 32 * 1024**2  # S3 takes 10,000 parts of a file; as many as PARTS_AT_ONCE are held in memory
PARTS_AT_ONCE = 4
READ_NBYTES = 4 * 1024**2
TEMPORARY = ".halfquad-"
TAKEN = frozenset({errno.EEXIST, errno.EINVAL})  # s3fs has the latter for a condition that does not hold


class Store:
    """The files below one URL, by name."""

    def __init__(self, url: str) -> None:
        """Credentials and endpoints of a bucket come from the process's environment, never from the URL.

        Raises ValueError for a URL that is none of ours.
        """
        check_url(url)
        self.url = url.rstrip("/")
        self._files, root = fsspec.url_to_fs(self.url, **_options(url))
        self._root = str(root).rstrip("/")
        self._renames = url.startswith("file:")

    def sizes(self) -> dict[str, int]:
        """Every file there and its bytes; none where nothing is."""
        self._files.invalidate_cache()
        found = self._files.find(self._root, detail=True)
        return {key.removeprefix(f"{self._root}/"): int(info["size"]) for key, info in found.items()}

    def read(self, name: str) -> bytes:
        return bytes(self._files.cat_file(self._key(name)))

    def create(self, name: str, content: bytes, *, replace: bool = False) -> None:
        """FileExistsError where it is there already and not to be replaced, and where another writes it meanwhile."""
        if self._renames:
            self._files.makedirs(self._root, exist_ok=True)
        try:
            self._files.pipe_file(self._key(name), content, mode="overwrite" if replace else "create")
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            raise FileExistsError(f"{self.url}/{name}") from error
        if self.read(name) != content:  # a store that knows no condition kept the later one
            raise FileExistsError(f"{self.url}/{name}")

    def put(self, file: PushFile, progress: Callable[[int], None]) -> None:
        """Write the file and make sure of it; OSError where the store has other bytes afterwards."""
        self._copy(file, _Counter(progress))
        if not self.holds(file):
            raise OSError(f"{self.url}/{file.name}: other bytes are there than were written")

    def holds(self, file: PushFile) -> bool:
        """Whether exactly this file is there: by the store's own checksum where it is of a kind that we know, else read."""
        try:
            info = self._files.info(self._key(file.name), **({} if self._renames else {"refresh": True}))
        except FileNotFoundError:
            return False
        if int(info["size"]) != file.nbytes:
            return False
        etag = str(info.get("ETag", "")).strip('"')
        return (bool(etag) and etag == _etag(Path(file.path))) or self._sha256(file.name) == file.sha256

    def remove(self, name: str) -> None:
        """Gone, also where it was gone before."""
        try:
            self._files.rm_file(self._key(name))
        except FileNotFoundError:
            return

    def sync(self) -> None:
        """What was renamed stays so, whatever happens to the machine."""
        for folder in [self._root, *self._files.find(self._root, withdirs=True)] if self._renames else []:
            if os.path.isdir(folder):
                _fsync(folder)

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _copy(self, file: PushFile, callback: Callback) -> None:
        key = self._key(file.name)
        if not self._renames:
            self._files.put_file(
                file.path, key, callback=callback, chunksize=PART_NBYTES, max_concurrency=PARTS_AT_ONCE
            )
            return
        folder, _, name = key.rpartition("/")
        self._files.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/{TEMPORARY}{secrets.token_hex(4)}-{name}"
        try:
            with open(file.path, "rb") as source, self._files.open(temporary, "wb") as target:
                for block in _blocks(source):
                    target.write(block)
                    callback.relative_update(len(block))
            _fsync(temporary)
            self._files.mv(temporary, key)
        except BaseException:
            if os.path.exists(temporary):
                self._files.rm_file(temporary)
            raise

    def _sha256(self, name: str) -> str:
        sha256 = hashlib.sha256()
        with self._files.open(self._key(name), "rb", cache_type="readahead") as file:
            for block in _blocks(file):
                sha256.update(block)
        return sha256.hexdigest()


class _Counter(Callback):  # type: ignore[misc]
    """fsspec's reports as bytes done of one file."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        super().__init__()
        self._progress = progress

    def call(self, *arguments: Any, **options: Any) -> None:
        self._progress(int(self.value))


def check_url(url: str) -> None:
    """ValueError unless the URL is a folder or a prefix of a bucket, written plainly."""
    parts = urlsplit(url)
    if parts.scheme not in PROTOCOLS:
        raise ValueError(f"{url!r}: a target is one of {', '.join(f'{name}://' for name in PROTOCOLS)}")
    if parts.query or parts.fragment or "@" in parts.netloc or "::" in url:
        raise ValueError(f"{url!r}: a target has no options, no user and no link to another")
    if parts.scheme == "file" and (parts.netloc or parts.path.rstrip("/") == ""):
        raise ValueError(f"{url!r}: a folder of this machine is named file:///path")
    if parts.scheme == "s3" and not parts.netloc:
        raise ValueError(f"{url!r}: no bucket is named")
    if any(part in (".", "..") for part in parts.path.split("/")):
        raise ValueError(f"{url!r}: a target's path does not lead back")


def _options(url: str) -> dict[str, Any]:
    # Listings are asked for anew each time: others write there too. Nothing anonymous, nothing shared between calls.
    return {"use_listings_cache": False, "skip_instance_cache": True} if url.startswith("s3:") else {}


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(READ_NBYTES):
        yield block


def _etag(path: Path) -> str:
    """What S3 calls an object that was written as `put` does: its MD5, or of several parts the MD5 of their MD5s."""
    size, digests = path.stat().st_size, []
    part = size if size < 2 * PART_NBYTES else PART_NBYTES  # as s3fs decides
    with path.open("rb") as file:
        while block := file.read(part):
            digests.append(hashlib.md5(block, usedforsecurity=False))
    if size < 2 * PART_NBYTES:
        return (digests or [hashlib.md5(usedforsecurity=False)])[0].hexdigest()
    whole = hashlib.md5(b"".join(digest.digest() for digest in digests), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(digests)}"


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
