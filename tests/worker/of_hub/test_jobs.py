"""Jobs on a repo at a Hub: the steps of a worker, the real client, a real server."""

from pathlib import Path

import pytest

from hqq_core.convert import quantize_checkpoint
from hqq_core.recipe import Recipe
from service.common.status import JobStatus, UnitKind
from tests.checkpoints import save_llama
from tests.fakehub.server import FakeHub
from tests.worker.conftest import RECIPE, Foreman
from tests.worker.of_hub.jobs import (
    N_SHARDS,
    REPO,
    both,
    converted,
    downloads,
    left_over,
    of_repo,
    result,
    shard_keys,
    sources,
)
from worker.kept_source import forget_source
from worker.reaper import Housekeeper
from worker.workplace import Workplace


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
    foreman.run_up_to(UnitKind.SHARD)
    assert len(sources(workplace)) == N_SHARDS, "they are read once more"
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
