"""What a job's plan unit left of its source at a Hub, and how to be rid of it. Loads no torch: housekeeping comes here, too."""

import json
import shutil
from pathlib import Path

from worker.hub import RemoteFile, Snapshot
from worker.source_cache import Blob
from worker.workplace import Workplace


def forget_source(workplace: Workplace, job_id: str) -> None:
    """Remove what the plan unit left."""
    folder = workplace.store.source(job_id)
    for path in (folder, *workplace.store.partial_sources(job_id)):
        shutil.rmtree(path, ignore_errors=True)
    snapshot_path(folder).unlink(missing_ok=True)


def drop_weights(workplace: Workplace, job_id: str) -> None:
    """Throw out the job's weight files, but what others are reading."""
    folder = workplace.store.source(job_id)
    if snapshot_path(folder).is_file():
        for file in read_snapshot(folder).weights:
            workplace.cache.drop(blob_of(file))


def blob_of(file: RemoteFile) -> Blob:
    return Blob(file.sha256 or file.blob_id, file.nbytes)


def snapshot_path(folder: Path) -> Path:
    return folder.with_name("snapshot.json")


def read_snapshot(folder: Path) -> Snapshot:
    fields = json.loads(snapshot_path(folder).read_bytes())
    files = tuple(RemoteFile(**file) for file in fields["files"])
    return Snapshot(**{**fields, "files": files, "left_out": tuple(fields.get("left_out", ()))})
