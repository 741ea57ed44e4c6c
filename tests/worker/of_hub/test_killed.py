"""A worker that is killed, and one that goes on where it was."""

import signal
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from hqq_core.convert import quantize_checkpoint
from hqq_core.recipe import Recipe
from service.common.status import JobStatus, UnitKind
from tests.fakehub.server import FakeHub
from tests.worker.conftest import RECIPE, Foreman, eventually
from tests.worker.of_hub.jobs import (
    N_SHARDS,
    converted,
    downloads,
    go_on_without,
    hub_processes,
    left_over,
    of_repo,
    result,
    sources,
)
from worker.workplace import Workplace

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
