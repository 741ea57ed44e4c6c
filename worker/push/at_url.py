"""A result at a URL, in an order that tells at every moment what is there.

1. a marker with the job's id: there is at most one, and who wrote it goes on after a crash
2. an earlier result's manifests go, the marker remembers what they named
3. the files
4. what only the earlier result had goes
5. the manifests: from here on the result is complete
6. the marker goes

Each step may be done again with the same result.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from service.common.errors import RepoExists
from worker.push.files import PushFile, named_by
from worker.push.store import TEMPORARY, Store

MARKER = "halfquad_upload.json"
MANIFEST_LIMIT = 64 * 1024**2  # another's manifest is not read beyond this


@dataclass(frozen=True)
class Marker:
    """Who is uploading, and which files of an earlier result go at the end."""

    job_id: str
    stale: tuple[str, ...] = ()

    def encode(self) -> bytes:
        return json.dumps({"job_id": self.job_id, "stale": sorted(self.stale)}, indent=1).encode()


def check(store: Store, job_id: str, *, overwrite: bool) -> None:
    """RepoExists where a result, or anything else, is in the way."""
    _check(store, store.sizes(), job_id, overwrite=overwrite)


def _check(store: Store, names: dict[str, int], job_id: str, *, overwrite: bool) -> Marker | None:
    """The marker that is there."""
    marker = _read_marker(store, names)
    if overwrite or not names or (marker is not None and marker.job_id == job_id):
        return marker
    if marker is not None:
        raise RepoExists(
            f"{store.url}: {marker.job_id} has begun to write there and did not end; "
            "wait for it, or say overwrite to take its place"
        )
    raise RepoExists(f"{store.url}: {len(names)} files are there already; choose another place, or say overwrite")


def is_complete(store: Store, files: Sequence[PushFile]) -> bool:
    """Whether an earlier start came to the end: its manifests stand, byte for byte, and every file has its size."""
    return _is_complete(store, store.sizes(), files)


def _is_complete(store: Store, sizes: dict[str, int], files: Sequence[PushFile]) -> bool:
    if MARKER in sizes or any(sizes.get(file.name) != file.nbytes for file in files):
        return False
    return all(store.holds(file) for file in files if file.is_manifest)


def begin(store: Store, job_id: str, files: Sequence[PushFile], *, overwrite: bool) -> Marker | None:
    """Steps 1 and 2; None where an earlier start came to the end: there is nothing to do.

    All goes by one listing: what another writes meanwhile is found by `create`.
    """
    sizes = store.sizes()
    if _is_complete(store, sizes, files):
        return None
    marker = _check(store, sizes, job_id, overwrite=overwrite)
    ours = {file.name for file in files}
    earlier = [file.name for file in files if file.is_manifest and file.name in sizes]
    if marker is None or marker.job_id != job_id:
        marker = _take(store, job_id, {name: sizes[name] for name in earlier}, replaced=marker)
    for name in earlier:
        if name in marker.stale:
            store.remove(name)
    return Marker(job_id, tuple(name for name in marker.stale if name not in ours))


def _take(store: Store, job_id: str, manifests: dict[str, int], *, replaced: Marker | None) -> Marker:
    """`manifests`: those that ours take the place of; results in other folders are left alone."""
    stale = set(replaced.stale) if replaced else set()
    for name, nbytes in manifests.items():
        if nbytes <= MANIFEST_LIMIT:
            stale |= named_by(name, _json(store.read(name)))
    marker = Marker(job_id, tuple(sorted(stale)))
    try:
        store.create(MARKER, marker.encode(), replace=replaced is not None)
    except FileExistsError as error:
        raise RepoExists(f"{store.url}: another job began to write there at the same time") from error
    return marker


def upload(store: Store, files: Sequence[PushFile], progress: Callable[[int], None]) -> None:
    """Step 3: what is there already, from an earlier start, is not sent again. `progress` is told bytes done of all."""
    before = 0
    for file in files:
        if not store.holds(file):
            store.put(file, lambda nbytes, before=before: progress(before + nbytes))  # type: ignore[misc]
        before += file.nbytes
        progress(before)


def publish(store: Store, marker: Marker, manifests: Sequence[PushFile]) -> None:
    """Steps 4 to 6."""
    kept = {file.name for file in manifests}
    stale = set(marker.stale) - kept
    for name in store.sizes():
        if name in stale or name.rsplit("/", 1)[-1].startswith(TEMPORARY):
            store.remove(name)
    store.sync()
    upload(store, manifests, lambda nbytes: None)
    store.remove(MARKER)
    store.sync()


def _read_marker(store: Store, sizes: dict[str, int]) -> Marker | None:
    if MARKER not in sizes:
        return None
    found = _json(store.read(MARKER))
    if not isinstance(found, dict):
        found = {}
    stale = found.get("stale")
    names = [name for name in stale if isinstance(name, str)] if isinstance(stale, list) else []
    return Marker(str(found.get("job_id", "another job")), tuple(names))


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
