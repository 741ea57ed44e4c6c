"""The artifact store: a private folder for each job.

plan.json               what the plan unit wrote, for each recipe
plan.profiled.json      the same with input energies: the profile unit's, where the job has one
energies.safetensors    the profile unit's too, until the shards are done
source/                 of a source at a Hub, all but the data of its weight files, until the job's end
snapshot.json           which repo, commit and files that is
solved/                 which shards were solved while others were measured, until the job's end
checks/                 which shards' results were held against their source already, until the job's end
output/                 the result, of several recipes a folder each
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from hqq_core.errors import StorageFullError
from service.common.models import JOB_ID

Note = Literal["solved", "checks"]


class ArtifactStore:
    """Files of jobs below `<data_dir>/jobs`."""

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir / "jobs"

    def create(self, job_id: str) -> Path:
        """The job's folder, there and private."""
        folder = self.folder(job_id)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        self.output(job_id).mkdir(mode=0o700, exist_ok=True)
        return folder

    def folder(self, job_id: str) -> Path:
        if not JOB_ID.fullmatch(job_id):
            raise ValueError(f"not a job id: {job_id!r}")
        return self.root / job_id

    def output(self, job_id: str) -> Path:
        """Where the job's checkpoint is written."""
        return self.folder(job_id) / "output"

    def source(self, job_id: str) -> Path:
        """Where a job has what its plan unit fetched of a source at a Hub."""
        return self.folder(job_id) / "source"

    def partial_source(self, job_id: str, fence: int) -> Path:
        """Where one start of the plan unit fetches it."""
        return self.folder(job_id) / f".source.{fence}.tmp"

    def partial_sources(self, job_id: str) -> Iterator[Path]:
        """What starts left that came to no end."""
        return self.folder(job_id).glob(".source.*.tmp")

    def energies(self, job_id: str) -> Path:
        """Where the job's input energies are kept until its last shard is done."""
        return self.folder(job_id) / "energies.safetensors"

    def write_note(self, job_id: str, kind: Note, index: int, note: Any) -> None:
        """What was found out of a shard ahead of its time; FileNotFoundError where the job is gone."""
        folder = self.folder(job_id) / kind
        folder.mkdir(mode=0o700, exist_ok=True)
        _write_json(folder / f"{index}.json", note)

    def read_note(self, job_id: str, kind: Note, index: int) -> Any:
        """None where there is none."""
        try:
            return json.loads((self.folder(job_id) / kind / f"{index}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def noted(self, job_id: str, kind: Note) -> list[int]:
        """Shards of which there is such a note."""
        return sorted(int(path.stem) for path in (self.folder(job_id) / kind).glob("[0-9]*.json"))

    def remove_notes(self, job_id: str) -> None:
        for kind in get_args(Note):
            shutil.rmtree(self.folder(job_id) / kind, ignore_errors=True)

    def write_plan(self, job_id: str, plan: dict[str, Any], *, profiled: bool = False) -> None:
        """Whole or not at all; each unit has a file of its own, so one that wakes late undoes nobody's work."""
        _write_json(self._plan(job_id, profiled), plan)

    def read_plan(self, job_id: str, *, profiled: bool = False) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads(self._plan(job_id, profiled).read_text(encoding="utf-8"))
        return plan

    def _plan(self, job_id: str, profiled: bool) -> Path:
        return self.folder(job_id) / ("plan.profiled.json" if profiled else "plan.json")

    def remove(self, job_id: str) -> None:
        """All that the job left; nothing where nothing is."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def job_ids(self) -> Iterator[str]:
        """Jobs that have a folder."""
        if self.root.is_dir():
            yield from (path.name for path in self.root.iterdir() if JOB_ID.fullmatch(path.name))

    def free_nbytes(self) -> int:
        folder = next(path for path in (self.root, *self.root.parents) if path.is_dir())
        return shutil.disk_usage(folder).free

    def check_room(self, nbytes: int, *, reserve_nbytes: int) -> None:
        """StorageFullError unless nbytes fit and leave the reserve free."""
        free = self.free_nbytes()
        if free - nbytes < reserve_nbytes:
            raise StorageFullError(f"{nbytes} bytes to write, {free} free, {reserve_nbytes} of them kept in reserve")


def _write_json(path: Path, value: Any) -> None:
    """Durably, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
