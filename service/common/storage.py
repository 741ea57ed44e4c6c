"""The artifact store: a private folder for each job.

plan.json               what the plan unit wrote, for each recipe
plan.profiled.json      the same with input energies: the profile unit's, where the job has one
energies.safetensors    the profile unit's too, until the shards are done
source/                 of a source at a Hub, all but the data of its weight files, until the job's end
snapshot.json           which repo, commit and files that is
solved/                 shards that were solved before their turn, each under the hash of its problem, until the job's end
checks/                 which shards' results were held against their source already, until then
output/                 the result, of several recipes a folder each
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hqq_core.errors import StorageFullError
from service.common.errors import StorageReadOnly
from service.common.models import JOB_ID

CHECKS_VERSION = 1


class ArtifactStore:
    """Files of jobs below `<data_dir>/jobs`."""

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir / "jobs"

    def create(self, job_id: str) -> Path:
        """The job's folder, there and private."""
        folder = self.folder(job_id)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for part in (self.output(job_id), self.solved(job_id), self._checks(job_id)):
            part.mkdir(mode=0o700, exist_ok=True)
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

    def solved(self, job_id: str) -> Path:
        """Where shards are that were solved before their turn."""
        return self.folder(job_id) / "solved"

    def write_check(self, job_id: str, index: int, parts: list[dict[str, Any] | None]) -> None:
        """What each plan's part of a shard was found to be, or None; FileNotFoundError where nobody waits for it any more."""
        _write_json(self._checks(job_id) / f"{index}.json", {"version": CHECKS_VERSION, "parts": parts})

    def read_checks(self, job_id: str) -> dict[int, list[dict[str, Any] | None]]:
        """By shard; what another version wrote is none."""
        found = {int(path.stem): json.loads(path.read_bytes()) for path in self._checks(job_id).glob("[0-9]*.json")}
        return {index: check["parts"] for index, check in sorted(found.items()) if check["version"] == CHECKS_VERSION}

    def remove_ahead(self, job_id: str) -> None:
        """What was solved and found out before its time."""
        for folder in (self.solved(job_id), self._checks(job_id)):
            shutil.rmtree(folder, ignore_errors=True)

    def write_plan(self, job_id: str, plan: dict[str, Any], *, profiled: bool = False) -> None:
        """Whole or not at all; each unit has a file of its own, so one that wakes late undoes nobody's work."""
        _write_json(self._plan(job_id, profiled), plan)

    def read_plan(self, job_id: str, *, profiled: bool = False) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads(self._plan(job_id, profiled).read_text(encoding="utf-8"))
        return plan

    def _checks(self, job_id: str) -> Path:
        return self.folder(job_id) / "checks"

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
        return shutil.disk_usage(self._existing).free

    def check_writable(self) -> None:
        """StorageReadOnly where nothing can be written."""
        if not os.access(self._existing, os.W_OK):
            raise StorageReadOnly("the data directory cannot be written to")

    @property
    def _existing(self) -> Path:
        return next(path for path in (self.root, *self.root.parents) if path.is_dir())

    def check_room(self, nbytes: int, *, reserve_nbytes: int) -> None:
        """StorageFullError unless nbytes fit and leave the reserve free."""
        free = self.free_nbytes()
        if free - nbytes < reserve_nbytes:
            raise StorageFullError(f"{nbytes} bytes to write, {free} free, {reserve_nbytes} of them kept in reserve")


def _write_json(path: Path, value: Any) -> None:
    """Durably, whole or not at all; hqq_core's own way would load torch here."""
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
