"""What tests of jobs on a repo ask."""

import hashlib
import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hqq_core.checkpoint import MANIFEST, README
from service.common import repository
from service.common.settings import Settings
from service.common.status import JobStatus
from tests.checkpoints import folder_bytes
from tests.fakehub.server import FakeHub
from tests.worker.conftest import Foreman
from worker.reaper import reap
from worker.workplace import Workplace

REPO = "team-a/tiny"
N_SHARDS = 4


both = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)


def of_repo(**more: Any) -> dict[str, Any]:
    return {"type": "hub", "repo_id": REPO, "revision": "main", "credential": None, "keep": True, **more}


def downloads(fakehub: FakeHub) -> list[str]:
    """SHA-256 of the weight files that were asked for whole, in order; headers come by ranges."""
    asked = [request for request in fakehub.requests.find(r"^/storage/", "GET") if request.range is None]
    return [request.path.removeprefix("/storage/") for request in asked]


def sources(workplace: Workplace) -> dict[str, Path]:
    """Whole files of the cache."""
    folder = workplace.cache.folder
    return {path.name: path for path in folder.iterdir() if "." not in path.name} if folder.is_dir() else {}


def left_over(workplace: Workplace) -> list[str]:
    """What nobody works on and nobody reads, but locks."""
    partial = workplace.cache.folder.rglob("*.partial")
    jobs = (path for path in workplace.store.root.glob("*/*") if path.name not in ("output", "plan.json"))
    return [path.name for path in (*partial, *jobs) if path.name != "plan.profiled.json"]


def solved(workplace: Workplace, job_id: str) -> list[int]:
    """Shards that are solved, before their turn or after."""
    notes = workplace.store.solved(job_id).glob("*/solved.json")
    return sorted(json.loads(note.read_bytes())["outputs"][0]["index"] for note in notes)


def shard_keys(source: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")}


def converted(folder: Path) -> dict[str, bytes]:
    """All of a result but the two files that tell where its source was."""
    return {
        name: content for name, content in folder_bytes(folder).items() if Path(name).name not in (README, MANIFEST)
    }


def result(foreman: Foreman, job: Any) -> dict[str, bytes]:
    assert foreman.get(job).error is None
    assert foreman.get(job).status == JobStatus.SUCCEEDED
    return converted(foreman.workplace.store.output(job.id))


def hub_processes(fakehub: FakeHub) -> list[str]:
    """Clients of this Hub that are still there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"HF_ENDPOINT={fakehub.endpoint}".encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found


def work(settings: Settings, die_at: str) -> None:
    """A worker that does all there is to do, unless it dies before it can write that down."""
    if die_at:
        setattr(repository, die_at, lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL))
    Foreman(Workplace.open(settings)).run_all()


def go_on_without(workplace: Workplace, foreman: Foreman) -> None:
    """As housekeeping and another worker do after the loss of one."""
    with workplace.database.write() as session:
        repository.expire_units(session, "worker@here")
    reap(workplace)
    foreman.run_all()
