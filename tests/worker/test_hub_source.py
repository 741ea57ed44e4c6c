"""Jobs on a repo at a Hub: the steps of a worker, the real client, a real server."""

import hashlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from hqq_core.checkpoint import MANIFEST, README
from hqq_core.convert import quantize_checkpoint
from hqq_core.recipe import Recipe
from service.common import repository
from service.common.settings import Settings
from service.common.status import JobStatus, UnitKind
from tests.checkpoints import folder_bytes, save_llama
from tests.fakehub.server import FakeHub
from tests.worker.conftest import RECIPE, Foreman
from worker.kept_source import forget_source
from worker.reaper import Housekeeper, reap
from worker.source_cache import SourceCache
from worker.workplace import Workplace

REPO = "team-a/tiny"
N_SHARDS = 4


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLite, unless a test asks for both: what differs between them is in the rows, not in the bytes."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path / 'halfquad.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


both = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def source(models: Path) -> Path:
    return save_llama(models / "tiny", layers=4, n_shards=N_SHARDS)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """41 MB in shards of 4."""
    return save_llama(tmp_path / "large", layers=24, hidden=256, n_shards=12)


@pytest.fixture
def commit(fakehub: FakeHub, source: Path) -> str:
    return fakehub.add_repo(REPO, source)


@pytest.fixture
def settings(settings: Settings, fakehub: FakeHub, commit: str) -> Settings:
    return settings.model_copy(update={"hub_endpoint": fakehub.endpoint})


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


def shard_keys(source: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")}


def converted(folder: Path) -> dict[str, bytes]:
    """All of a result but the two files that tell where its source was."""
    return {name: content for name, content in folder_bytes(folder).items() if name not in (README, MANIFEST)}


def result(foreman: Foreman, job: Any) -> dict[str, bytes]:
    assert foreman.get(job).error is None
    assert foreman.get(job).status == JobStatus.SUCCEEDED
    return converted(foreman.workplace.store.output(job.id))


@both
@pytest.mark.parametrize(
    "recipe", [RECIPE, Recipe(format="gptq", zero="none", energy="none")], ids=["energies", "plain"]
)
def test_result_is_that_of_the_same_folder(
    foreman: Foreman, workplace: Workplace, fakehub: FakeHub, source: Path, commit: str, recipe: Recipe
) -> None:
    job = foreman.submit(of_repo(), recipe)
    foreman.run_all()
    there = foreman.submit(source, recipe)
    foreman.run_all()
    assert result(foreman, job) == result(foreman, there)
    assert foreman.get(job).source["commit"] == commit
    assert sorted(downloads(fakehub)) == sorted(shard_keys(source))
    assert sources(workplace).keys() == shard_keys(source)
    assert left_over(workplace) == []


def test_plan_needs_headers_alone(foreman: Foreman, workplace: Workplace, fakehub: FakeHub, source: Path) -> None:
    job = foreman.submit(of_repo())
    foreman.run_next()
    assert downloads(fakehub) == []
    fetched = workplace.store.source(job.id)
    assert {path.name for path in fetched.iterdir()} == {path.name for path in source.iterdir()}
    assert all(path.stat().st_size == (source / path.name).stat().st_size for path in fetched.iterdir())


def test_moving_branch_changes_nothing(
    foreman: Foreman, fakehub: FakeHub, source: Path, tmp_path: Path, commit: str
) -> None:
    job = foreman.submit(of_repo())
    foreman.run_next()
    other = save_llama(tmp_path / "other", layers=4, n_shards=N_SHARDS, seed=1)
    fakehub.commit(REPO, {path.name: path for path in other.iterdir()})
    foreman.run_all()
    quantize_checkpoint(source, tmp_path / "direct", RECIPE, threads=1)
    assert result(foreman, job) == converted(tmp_path / "direct")
    assert foreman.get(job).source["commit"] == commit


def test_jobs_share_what_was_downloaded_and_measured(foreman: Foreman, fakehub: FakeHub, workplace: Workplace) -> None:
    jobs = [foreman.submit(of_repo(), Recipe(format=name)) for name in ("hqq", "compressed-tensors")]
    foreman.run_all()
    assert all(result(foreman, job) for job in jobs)
    assert len(downloads(fakehub)) == N_SHARDS
    for path in sources(workplace).values():
        path.unlink()
    third = foreman.submit(of_repo())
    foreman.run_up_to(UnitKind.PROFILE)
    foreman.run_next()
    assert len(downloads(fakehub)) == N_SHARDS, "energies are known by names and hashes: nothing is read for them"
    foreman.run_all()
    assert result(foreman, third)
    assert len(downloads(fakehub)) == 2 * N_SHARDS


def test_files_are_dropped_when_they_are_not_to_be_kept(
    foreman: Foreman, workplace: Workplace, fakehub: FakeHub
) -> None:
    job = foreman.submit(of_repo(keep=False))
    foreman.run_up_to(UnitKind.FINISH)
    assert len(sources(workplace)) == N_SHARDS, "the verification reads them once more"
    foreman.run_all()
    assert result(foreman, job)
    assert sources(workplace) == {}
    assert len(downloads(fakehub)) == N_SHARDS


@pytest.mark.parametrize("keep", [True, False])
def test_cancelled_job_leaves_what_is_kept(foreman: Foreman, workplace: Workplace, keep: bool) -> None:
    job = foreman.submit(of_repo(keep=keep))
    foreman.run_up_to(UnitKind.SHARD)
    foreman.run_next()
    foreman.cancel(job)
    assert foreman.get(job).status == JobStatus.CANCELLED
    Housekeeper(workplace, "worker@here").keep()
    assert bool(sources(workplace)) is keep
    assert not workplace.store.folder(job.id).exists()


def hub_processes(fakehub: FakeHub) -> list[str]:
    """Clients of this Hub that are still there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"HF_ENDPOINT={fakehub.endpoint}".encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def work(settings: Settings, die_at: str) -> None:
    """A worker that does all there is to do, unless it dies before it can write that down."""
    if die_at:
        setattr(repository, die_at, lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL))
    Foreman(Workplace.open(settings)).run_all()


@pytest.fixture
def worker(settings: Settings) -> Iterator[Callable[[str], BaseProcess]]:
    """Starts a worker process, of which nothing is left behind."""
    started: list[BaseProcess] = []

    def start(die_at: str = "") -> BaseProcess:
        started.append(multiprocessing.get_context("spawn").Process(target=work, args=(settings, die_at)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def go_on_without(workplace: Workplace, foreman: Foreman) -> None:
    """As housekeeping and another worker do after the loss of one."""
    with workplace.database.write() as session:
        repository.expire_units(session, "worker@here")
    reap(workplace)
    foreman.run_all()


ENDS = ["pin_source", "plan_succeeded", "profile_succeeded", "shard_succeeded", "finish_succeeded"]


@pytest.mark.parametrize("die_at", ENDS)
def test_killed_before_it_was_written_down(
    foreman: Foreman,
    workplace: Workplace,
    fakehub: FakeHub,
    worker: Callable[[str], BaseProcess],
    source: Path,
    tmp_path: Path,
    die_at: str,
) -> None:
    job = foreman.submit(of_repo(keep=False))
    process = worker(die_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    go_on_without(workplace, foreman)
    quantize_checkpoint(source, tmp_path / "direct", RECIPE, threads=1)
    assert result(foreman, job) == converted(tmp_path / "direct")
    assert foreman.get(job).attempt == 2
    assert len(downloads(fakehub)) == N_SHARDS
    assert (sources(workplace), left_over(workplace), hub_processes(fakehub)) == ({}, [], [])


@pytest.mark.parametrize("request_path", [r"/api/models/", r"/resolve/.*config.json", r"^/storage/"])
def test_killed_while_the_hub_answers(
    foreman: Foreman,
    workplace: Workplace,
    fakehub: FakeHub,
    worker: Callable[[], BaseProcess],
    source: Path,
    tmp_path: Path,
    request_path: str,
) -> None:
    job = foreman.submit(of_repo())
    fakehub.faults.add(request_path, method="GET", delay_s=3600)
    process = worker()
    fakehub.requests.wait(request_path, "GET")
    process.kill()
    process.join()
    eventually(lambda: not hub_processes(fakehub))
    go_on_without(workplace, foreman)
    quantize_checkpoint(source, tmp_path / "direct", RECIPE, threads=1)
    assert result(foreman, job) == converted(tmp_path / "direct")
    workplace.cache.sweep()
    assert left_over(workplace) == []


def test_killed_while_the_next_file_is_fetched(
    foreman: Foreman, workplace: Workplace, fakehub: FakeHub, worker: Callable[[], BaseProcess]
) -> None:
    job = foreman.submit(of_repo(), Recipe(energy="none", fold=False))
    foreman.run_next()
    fakehub.faults.add("^/storage/", method="GET", nth=2, delay_s=3600)
    process = worker()
    fakehub.requests.wait("^/storage/", "GET", count=2)
    eventually(lambda: len(list(workplace.cache.folder.glob("*.partial"))) == 1)
    process.kill()
    process.join()
    eventually(lambda: not hub_processes(fakehub))
    go_on_without(workplace, foreman)
    assert result(foreman, job)
    workplace.cache.sweep()
    assert left_over(workplace) == []


@pytest.mark.parametrize("kind", [UnitKind.PLAN, UnitKind.PROFILE, UnitKind.SHARD])
def test_cancel_while_the_hub_answers(foreman: Foreman, workplace: Workplace, fakehub: FakeHub, kind: UnitKind) -> None:
    job = foreman.submit(of_repo(), Recipe(energy="none", fold=False) if kind == UnitKind.SHARD else RECIPE)
    foreman.run_up_to(kind)
    fakehub.requests.clear()
    fakehub.faults.add(method="GET", delay_s=3600, count=None)
    unit = threading.Thread(target=foreman.run_next)
    unit.start()
    fakehub.requests.wait(method="GET")
    foreman.cancel(job)
    unit.join()
    assert foreman.get(job).status == JobStatus.CANCELLED
    workplace.prefetcher.stop()
    # a profile's thread is left to itself: it notices within a moment
    eventually(lambda: (left_over(workplace), hub_processes(fakehub)) == ([], []))


def test_damaged_file_is_never_used(foreman: Foreman, workplace: Workplace, fakehub: FakeHub, source: Path) -> None:
    stored = fakehub.files(REPO)["model-00002-of-00004.safetensors"]
    raw = bytearray(stored.read_bytes())
    raw[-1] ^= 1
    stored.chmod(0o600)
    stored.write_bytes(raw)
    job = foreman.submit(of_repo(), max_attempts=2)
    foreman.run_all()
    job = foreman.get(job)
    assert job.error is not None
    assert (job.error["code"], job.error["type"], job.error["retryable"]) == ("source_damaged", "upstream", True)
    assert "model-00002-of-00004.safetensors" in job.error["message"]
    assert job.attempt == 2
    assert sources(workplace).keys() < shard_keys(source)
    assert left_over(workplace) == []


def test_header_that_came_alone_must_be_the_files(foreman: Foreman, workplace: Workplace) -> None:
    job = foreman.submit(of_repo(), Recipe(energy="none", fold=False), max_attempts=1)
    foreman.run_next()
    alone = workplace.store.source(job.id) / "model-00001-of-00004.safetensors"
    with alone.open("r+b") as file:
        raw = file.read(4096)
        at = raw.index(b'"model.norm' if b'"model.norm' in raw else b'"model.') + 1
        file.seek(at)
        file.write(b"M")
    foreman.run_all()
    error = foreman.get(job).error
    assert error is not None
    assert error["code"] == "source_damaged"
    assert alone.name in error["message"]


def test_lost_snapshot_is_not_the_users_fault(foreman: Foreman, workplace: Workplace) -> None:
    job = foreman.submit(of_repo(), max_attempts=1)
    foreman.run_next()
    forget_source(workplace, job.id)
    foreman.run_all()
    error = foreman.get(job).error
    assert error is not None
    assert (error["code"], error["type"]) == ("result_damaged", "system")


def used_nbytes(folder: Path) -> int:
    """What is on the disk: files with holes count for what they hold."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found += path.stat().st_blocks * 512
    return found


class Watch(threading.Thread):
    """Looks all the time how much of the disk a folder has, until it is left."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.over = folder, 0, threading.Event()

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        while not self.over.wait(0.001):
            with suppress(FileNotFoundError):
                self.most = max(self.most, used_nbytes(self.folder))


@pytest.mark.parametrize("target", [None, {"repo_id": "team-a/large-2bit"}], ids=["kept here", "published"])
def test_checkpoint_of_three_times_the_budget_passes_through(
    foreman: Foreman,
    workplace: Workplace,
    fakehub: FakeHub,
    large: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: dict[str, Any] | None,
) -> None:
    """Of the data directory and what processes keep for themselves: sources, results and all that a job has."""
    recipe = Recipe(format="hqq", nbits=2, group_size=128)
    quantize_checkpoint(large, tmp_path / "direct", recipe, threads=1)
    nbytes_in = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    nbytes_out = used_nbytes(tmp_path / "direct")
    budget = nbytes_in // 3
    fakehub.add_repo("team-a/large", large)
    settings = workplace.settings.model_copy(update={"hub_token": SecretStr(fakehub.write_token)})
    cache = SourceCache(workplace.cache.folder, budget - nbytes_out - 2**20)
    foreman.workplace = replace(workplace, settings=settings, cache=cache)
    temporary = settings.data_dir / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    with Watch(settings.data_dir) as watch:
        job = foreman.submit(of_repo(repo_id="team-a/large", keep=False), recipe, target=target)
        foreman.run_all()
    assert result(foreman, job) == converted(tmp_path / "direct")
    print(f"{nbytes_in} bytes in, budget {budget}, {nbytes_out} bytes out, at most {watch.most} at once")
    assert nbytes_out < watch.most <= budget
    assert sources(workplace) == {}
    if target is not None:
        output = workplace.store.output(job.id)
        assert fakehub.contents(target["repo_id"]) == folder_bytes(output)
