"""From a move of a head to a pull request with the result, step by step on the Hub of the tests."""

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from hqq_core.recipe import Recipe
from service.common import repository
from service.common.models import Job
from service.common.settings import Settings
from service.common.status import JobStatus
from tests.checkpoints import folder_bytes, save_llama
from tests.fakehub.server import FakeHub
from tests.worker.conftest import Foreman, at_hub
from tests.worker.test_watcher import Follower
from worker.watcher import Watcher
from worker.workplace import Workplace

REPO, RESULTS = "team-a/tiny", "team-b/tiny-4bit"
CANARY = b"hf_canary"


@pytest.fixture
def settings(settings: Settings, fakehub: FakeHub, tmp_path: Path) -> Settings:
    return at_hub(settings, fakehub, tmp_path)


def add_watch(workplace: Workplace) -> None:
    with workplace.database.write() as session:
        repository.insert_watch(
            session,
            source={"type": "hub", "repo_id": REPO, "revision": "main", "credential": "reader", "keep": True},
            recipes=[Recipe(energy="none").to_dict()],
            target={"repo_id": RESULTS, "branch": "main", "create_pr": True, "credential": None},
            labels={},
            priority=5,
            interval_s=900,
            run_now=False,
        )


def upload(fakehub: FakeHub, folder: Path) -> str:
    """Someone else's commit of a whole model."""
    return fakehub.commit(REPO, {path.name: path for path in folder.iterdir()})


def newest(workplace: Workplace) -> Job:
    with workplace.database.read() as session:
        job = session.scalars(select(Job).order_by(Job.id.desc())).first()
    assert job is not None
    return job


def proposed(fakehub: FakeHub, number: int) -> dict[str, bytes]:
    """The files of a pull request, but the Hub's own."""
    files = fakehub.files(RESULTS, f"refs/pr/{number}")
    return {name: path.read_bytes() for name, path in files.items() if name != ".gitattributes"}


def test_each_new_head_ends_in_a_pull_request_of_its_own(
    fakehub: FakeHub,
    workplace: Workplace,
    foreman: Foreman,
    source: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fakehub.add_repo(REPO, source, private=True)
    follower, watcher = Follower(workplace), Watcher(workplace)
    add_watch(workplace)
    watcher.check_next()
    assert foreman.units() == [], "the head of the first look is where the following begins"
    second = upload(fakehub, save_llama(tmp_path / "second", layers=3, n_shards=1))
    follower.make_due()
    watcher.check_next()
    upload(fakehub, save_llama(tmp_path / "third", layers=1, n_shards=1))  # before the job begins
    foreman.run_all()
    job = newest(workplace)
    assert job.status == JobStatus.SUCCEEDED, job.error
    result: dict[str, Any] = job.result or {}
    assert result["pushed"]["pull_request"] == f"{fakehub.endpoint}/{RESULTS}/discussions/1"
    there = proposed(fakehub, 1)
    assert there == folder_bytes(workplace.store.output(job.id))
    provenance = json.loads(there["halfquad_manifest.json"])["provenance"]
    assert (provenance["repo_id"], provenance["commit"], provenance["job_id"]) == (REPO, second, job.id)
    assert json.loads(there["config.json"])["num_hidden_layers"] == 3
    assert fakehub.contents(RESULTS) == {}, "main waits for the merge"
    follower.make_due()
    watcher.check_next()
    foreman.run_all()
    assert newest(workplace).status == JobStatus.SUCCEEDED
    assert json.loads(proposed(fakehub, 2)["config.json"])["num_hidden_layers"] == 1
    follower.make_due()
    watcher.check_next()
    assert foreman.units() == []
    assert [job.status for job in follower.jobs()] == [JobStatus.SUCCEEDED] * 2
    told = capfd.readouterr()
    assert CANARY not in (told.out + told.err).encode()
    kept = [path for path in workplace.settings.data_dir.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if CANARY in path.read_bytes()]
