"""Jobs with a target, driven unit by unit: real steps and rows, real child processes, a Hub and an S3 server on loopback."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from hqq_core.outputs import output_folders
from hqq_core.recipe import Recipe
from service.common import repository
from service.common.models import Job
from service.common.settings import Settings
from service.common.status import JobStatus, Phase, UnitKind
from tests.checkpoints import folder_bytes
from tests.fakehub.server import FakeHub
from tests.worker.conftest import Foreman
from worker.heartbeat import Heartbeat
from worker.push import files as files_module
from worker.push.early import send_next
from worker.push.job import push_job
from worker.push.store import Store
from worker.reaper import reap
from worker.workplace import Workplace

REPO = "team-a/tiny"
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # where no row decides
COMMIT = rf"/{REPO}/commit/"


@pytest.fixture
def settings(settings: Settings, fakehub: FakeHub) -> Settings:
    return settings.model_copy(
        update={
            "hub_endpoint": fakehub.endpoint,
            "hub_token": SecretStr(fakehub.write_token),
        }
    )


class Publisher(Foreman):
    """A foreman whose jobs have a target."""

    def __init__(self, workplace: Workplace, fakehub: FakeHub) -> None:
        super().__init__(workplace)
        self.fakehub = fakehub

    def publish(self, source: Path, target: dict[str, Any], *recipes: Recipe, max_attempts: int = 3) -> Job:
        return self.submit(source, *recipes, target=target, max_attempts=max_attempts)

    def landed(self, job: Job) -> int:
        if REPO not in self.fakehub.state.repos:
            return 0
        commits = self.fakehub.repo(REPO).commits.values()
        return sum(f"Halfquad-Job: {job.id}" in commit.message.splitlines() for commit in commits)

    def there(self, revision: str = "main") -> dict[str, bytes]:
        files = {name: path.read_bytes() for name, path in self.fakehub.files(REPO, revision).items()}
        return {name: content for name, content in files.items() if name != ".gitattributes"}

    def succeeded(self, job: Job) -> dict[str, Any]:
        job = self.get(job)
        assert job.status == JobStatus.SUCCEEDED, job.error
        assert job.result is not None
        pushed: dict[str, Any] = job.result["pushed"]
        return pushed

    def lost(self) -> None:
        """The worker of what runs is gone; another takes it over."""
        with self.workplace.database.write() as session:
            repository.expire_units(session, "worker@here")
        reap(self.workplace)


@pytest.fixture
def foreman(workplace: Workplace, fakehub: FakeHub) -> Publisher:
    return Publisher(workplace, fakehub)


@pytest.fixture
def _all_is_left_to_the_push(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.steps.going_ahead", lambda workplace, claim: nullcontext())


LEFT_TO_THE_PUSH = pytest.mark.usefixtures("_all_is_left_to_the_push")


def children(of: int | None = None) -> set[int]:
    """Processes started by this one, or by `of`, that speak with a Hub or a store."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in found.splitlines()[1:]]
    ours = ("-m worker.hub", "-m worker.push")
    parent = str(of or os.getpid())
    return {
        int(pid) for pid, ppid, stat, command in rows if ppid == parent and stat[0] != "Z" and command.endswith(ours)
    }


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert children() == set()


def test_job_ends_as_one_commit(foreman: Publisher, source: Path) -> None:
    job = foreman.publish(source, {"repo_id": REPO, "private": True})
    foreman.run_all()
    pushed = foreman.succeeded(job)
    output = folder_bytes(foreman.workplace.store.output(job.id))
    assert foreman.there() == output
    assert pushed["commit"] == foreman.fakehub.commits(REPO)[0].oid
    assert foreman.landed(job) == 1
    assert foreman.fakehub.repo(REPO).private
    manifest = json.loads(foreman.there()["halfquad_manifest.json"])
    assert manifest["provenance"]["job_id"] == job.id
    job = foreman.get(job)
    assert job.phase == Phase.UPLOADING
    assert job.nbytes_done == job.nbytes_total == sum(map(len, output.values()))


@ON_SQLITE
def test_several_recipes_have_a_folder_each_and_one_card(foreman: Publisher, source: Path) -> None:
    recipes = [Recipe(format="mlx", energy="none"), Recipe(format="hqq", axis=0, energy="none")]
    job = foreman.publish(source, {"repo_id": REPO, "create_pr": True}, *recipes)
    foreman.run_all()
    pushed = foreman.succeeded(job)
    assert pushed["pull_request"] == f"{foreman.fakehub.endpoint}/{REPO}/discussions/1"
    there = foreman.there("refs/pr/1")
    card = there.pop("README.md").decode()
    assert there == folder_bytes(foreman.workplace.store.output(job.id))
    assert all(folder in card for folder in output_folders(recipes))
    assert foreman.there() == {}, "main waits for the merge"


@ON_SQLITE
def test_job_ends_at_a_url(foreman: Publisher, source: Path, url: str) -> None:
    settings = foreman.workplace.settings.model_copy(update={"target_urls": (url.rsplit("/", 1)[0],)})
    foreman.workplace = dataclasses.replace(foreman.workplace, settings=settings)
    job = foreman.publish(source, {"url": url})
    foreman.run_all()
    assert foreman.succeeded(job) == {"url": url}
    store = Store(url)
    assert {name: store.read(name) for name in store.sizes()} == folder_bytes(foreman.workplace.store.output(job.id))
    second = foreman.publish(source, {"url": url})
    foreman.run_all()
    error = foreman.get(second).error
    assert error is not None
    assert (error["code"], error["retryable"]) == ("repo_exists", False)


@ON_SQLITE
@pytest.mark.parametrize(
    ("target", "code"),
    [
        ({"repo_id": "somebody/tiny"}, "namespace_not_allowed"),
        ({"repo_id": REPO, "credential": "unknown"}, "credential_unknown"),
        ({"repo_id": "team-a/taken"}, "repo_exists"),
        ({"repo_id": REPO, "create_pr": True, "branch": "x"}, "hub_refused"),
        ({"url": "file:///etc/halfquad"}, "target_not_allowed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_target_that_cannot_be_is_refused_before_the_work(
    foreman: Publisher, source: Path, target: dict[str, Any], code: str
) -> None:
    foreman.fakehub.add_repo("team-a/taken")
    foreman.fakehub.commit("team-a/taken", {"notes.txt": b"mine"})
    job = foreman.publish(source, target)
    foreman.run_next()
    job = foreman.get(job)
    assert job.error is not None
    assert (job.status, job.error["code"], job.attempt) == (JobStatus.FAILED, code, 1)


def test_hub_that_is_down_is_asked_again_later(foreman: Publisher, source: Path) -> None:
    job = foreman.publish(source, {"repo_id": REPO}, max_attempts=2)
    foreman.run_up_to(UnitKind.PUSH)
    foreman.fakehub.faults.add(COMMIT, method="POST", count=None, status=503)
    foreman.run_next()
    assert foreman.get(job).status == JobStatus.RUNNING
    foreman.fakehub.faults.clear()
    foreman.run_all()
    foreman.succeeded(job)
    assert foreman.landed(job) == 1


def test_zombie_cannot_publish(foreman: Publisher, workplace: Workplace, source: Path) -> None:
    """A start whose lease ran out goes on at last, before and after its successor has published."""
    job = foreman.publish(source, {"repo_id": REPO})
    foreman.run_up_to(UnitKind.PUSH)
    claim = foreman.claim_next()
    foreman.lost()
    with pytest.raises(Exception, match="taken over"):
        push_job(workplace, claim, Heartbeat(workplace, claim, leaving=foreman.leaving))
    assert foreman.landed(job) == 0
    foreman.run_all()
    foreman.succeeded(job)
    with pytest.raises(Exception, match="taken over"):
        push_job(workplace, claim, Heartbeat(workplace, claim, leaving=foreman.leaving))
    assert foreman.landed(job) == 1


SLOW = {"upload_rate": 2000.0, "count": None}


@LEFT_TO_THE_PUSH
@ON_SQLITE
@pytest.mark.parametrize(
    ("path", "fault"),
    [("/storage/", SLOW), (COMMIT, {"delay_s": 30.0}), ("/api/models/", {"delay_s": 30.0})],
    ids=["in an upload", "in the commit", "in a look"],
)
def test_cancel_stops_within_seconds_and_leaves_no_process(
    foreman: Publisher, source: Path, path: str, fault: dict[str, Any]
) -> None:
    job = foreman.publish(source, {"repo_id": REPO})
    foreman.run_up_to(UnitKind.PUSH)
    foreman.fakehub.requests.clear()
    foreman.fakehub.faults.add(path, **fault)
    runner = threading.Thread(target=foreman.run_next)
    runner.start()
    foreman.fakehub.requests.wait(path)
    foreman.cancel(job)
    runner.join(timeout=20)
    assert not runner.is_alive()
    assert foreman.get(job).status == JobStatus.CANCELLED
    assert children() == set()
    assert not foreman.workplace.store.folder(job.id).exists()


@LEFT_TO_THE_PUSH
def test_commit_that_landed_before_the_cancel_stands(foreman: Publisher, source: Path) -> None:
    job = foreman.publish(source, {"repo_id": REPO})
    foreman.run_up_to(UnitKind.PUSH)
    foreman.fakehub.faults.add(COMMIT, method="POST", delay_s=30.0, after=True)
    runner = threading.Thread(target=foreman.run_next)
    runner.start()
    deadline = time.monotonic() + 60
    while not foreman.landed(job):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    foreman.cancel(job)
    runner.join(timeout=20)
    assert not runner.is_alive()
    foreman.succeeded(job)
    assert "cancel_too_late" in foreman.actions(job)


POINTS = {
    "before the upload": (r"/preupload/", "POST", {"delay_s": 60.0}),
    "in the upload": (r"/storage/", "PUT", {"upload_rate": 2000.0}),
    "before the commit is taken": (COMMIT, "POST", {"delay_s": 60.0}),
    "after the commit was taken": (COMMIT, "POST", {"delay_s": 60.0, "after": True}),
}


@LEFT_TO_THE_PUSH
@ON_SQLITE
@pytest.mark.parametrize("point", POINTS)
def test_child_killed_anywhere_around_the_commit(foreman: Publisher, source: Path, point: str) -> None:
    path, method, fault = POINTS[point]
    job = foreman.publish(source, {"repo_id": REPO})
    foreman.run_up_to(UnitKind.PUSH)
    foreman.fakehub.requests.clear()
    foreman.fakehub.faults.add(path, method=method, **fault)
    runner = threading.Thread(target=foreman.run_next)
    runner.start()
    foreman.fakehub.requests.wait(path, method)
    while "after" in fault and not foreman.landed(job):
        time.sleep(0.02)
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    runner.join(timeout=60)
    assert not runner.is_alive()
    foreman.run_all()
    foreman.succeeded(job)
    assert foreman.landed(job) == 1
    assert foreman.there() == folder_bytes(foreman.workplace.store.output(job.id))


STEP = """
import sys, threading
from service.common.settings import Settings
from worker.steps import run_unit
from worker.workplace import Workplace
run_unit(Workplace.open(Settings()), sys.argv[1], owner="worker@here", leaving=threading.Event())
"""


@LEFT_TO_THE_PUSH
@pytest.mark.parametrize("point", POINTS)
def test_step_killed_anywhere_around_the_commit(foreman: Publisher, source: Path, point: str) -> None:
    path, method, fault = POINTS[point]
    settings = foreman.workplace.settings
    job = foreman.publish(source, {"repo_id": REPO})
    foreman.run_up_to(UnitKind.PUSH)
    foreman.fakehub.requests.clear()
    foreman.fakehub.faults.add(path, method=method, **fault)
    environment = {
        **os.environ,
        "HALFQUAD_DATA_DIR": str(settings.data_dir),
        "HALFQUAD_DATABASE_URL": settings.database_url,
        "HALFQUAD_BROKER_URL": settings.broker_url,
        "HALFQUAD_HUB_ENDPOINT": settings.hub_endpoint,
        "HALFQUAD_HUB_TOKEN": foreman.fakehub.write_token,
        "HALFQUAD_MIN_FREE_NBYTES": "0",
    }
    command = [sys.executable, "-c", STEP, foreman.units()[0].id]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as step:
        foreman.fakehub.requests.wait(path, method, timeout_s=120)
        while "after" in fault and not foreman.landed(job):
            time.sleep(0.02)
        left = children(step.pid)
        assert left
        step.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)
    foreman.lost()
    foreman.run_all()
    foreman.succeeded(job)
    assert foreman.landed(job) == 1
    assert foreman.there() == folder_bytes(foreman.workplace.store.output(job.id))


@ON_SQLITE
def test_shards_sent_early_are_not_sent_again(foreman: Publisher, workplace: Workplace, source: Path) -> None:
    recipes = [Recipe(format="mlx", energy="none"), Recipe(format="hqq", axis=0, energy="none")]
    job = foreman.publish(source, {"repo_id": REPO}, *recipes)
    foreman.run_up_to(UnitKind.FINISH)
    workplace.sender.stop()
    claim = foreman.claim_next()
    while send_next(workplace, claim, lambda: None):
        pass
    assert foreman.landed(job) == 0
    early = [request.path for request in foreman.fakehub.requests.find("/storage/", "PUT") if request.status == 200]
    assert len(early) == 4, "two shards of each"
    foreman.lost()
    foreman.run_all()
    foreman.succeeded(job)
    sent = [request.path for request in foreman.fakehub.requests.find("/storage/", "PUT") if request.status == 200]
    assert sorted(sent) == sorted(set(sent)), "nothing twice"
    assert set(early) < set(sent), "the rest"
    assert foreman.landed(job) == 1


@ON_SQLITE
def test_what_is_on_its_way_when_the_push_begins_is_not_sent_twice(foreman: Publisher, source: Path) -> None:
    job = foreman.publish(source, {"repo_id": REPO}, Recipe(energy="none"))
    foreman.fakehub.faults.add("/storage/", method="PUT", delay_s=8)
    foreman.run_up_to(UnitKind.FINISH)
    (request,) = foreman.fakehub.requests.wait("/storage/", "PUT")
    foreman.run_next()
    assert request.status is None, "it is on its way"
    foreman.run_all()
    foreman.succeeded(job)
    sent = [request.path for request in foreman.fakehub.requests.find("/storage/", "PUT")]
    assert len(sent) == len(set(sent))


@ON_SQLITE
def test_token_is_nowhere(foreman: Publisher, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    canary = foreman.fakehub.write_token
    seen: list[bytes] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for pid in children():
                for name in ("cmdline", "environ"):
                    try:
                        seen.append(Path(f"/proc/{pid}/{name}").read_bytes())
                    except OSError:
                        continue

    foreman.fakehub.faults.add(COMMIT, method="POST", status=500, message=f"no such token: {canary}")
    watcher = threading.Thread(target=watch)
    watcher.start()
    job = foreman.publish(source, {"repo_id": REPO})
    foreman.run_all()
    over.set()
    watcher.join()
    foreman.succeeded(job)
    assert seen
    assert not any(canary.encode() in each for each in seen)
    with foreman.workplace.database.read() as session:
        rows = [str(event.data) for event in repository.list_events(session, job.id)]
    told = capfd.readouterr()
    assert canary not in "".join(rows) + told.out + told.err + str(foreman.get(job).result)
    files = [path for path in foreman.workplace.settings.data_dir.rglob("*") if path.is_file()]
    assert not any(canary.encode() in path.read_bytes() for path in files)


def test_manifest_has_the_librarys_name() -> None:
    from hqq_core.checkpoint import MANIFEST

    assert files_module.MANIFEST == MANIFEST
