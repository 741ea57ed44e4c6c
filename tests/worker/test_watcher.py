"""Watches over the Hub of the tests: the real client in its process, both databases."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import Table, select, update

from service.common import repository
from service.common.models import Base, Job, Watch
from service.common.settings import Settings
from tests.fakehub.server import FakeHub
from tests.worker.conftest import at_hub
from worker import watcher as module
from worker.watcher import Watcher
from worker.workplace import Workplace

REPO = "team-a/tiny"
INTERVAL_S = 900
ASKED = rf"/api/models/{REPO}/revision/"


@pytest.fixture
def settings(settings: Settings, fakehub: FakeHub, tmp_path: Path) -> Settings:
    return at_hub(settings, fakehub, tmp_path).model_copy(update={"backoff_s": 5.0, "housekeeping_s": 0.05})


@pytest.fixture
def watcher(workplace: Workplace) -> Watcher:
    return Watcher(workplace)


class Follower:
    """Adds watches, looks at them and their jobs, and lets time pass."""

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace

    def add(self, repo_id: str = REPO, *, credential: str | None = "reader", run_now: bool = True) -> Watch:
        source = {"type": "hub", "repo_id": repo_id, "revision": "main", "credential": credential, "keep": True}
        with self.workplace.database.write() as session:
            return repository.insert_watch(
                session,
                source=source,
                recipes=[{}],
                target={"repo_id": f"{repo_id}-4bit", "create_pr": True, "credential": None},
                labels={},
                priority=5,
                interval_s=INTERVAL_S,
                run_now=run_now,
            )

    def make_due(self) -> None:
        with self.workplace.database.write() as session:
            session.execute(update(Watch).values(next_check_at=repository.now(session)))

    def get(self, watch: Watch) -> Watch:
        with self.workplace.database.read() as session:
            return repository.get_watch(session, watch.id)

    def error(self, watch: Watch) -> dict[str, Any]:
        return self.get(watch).last_error or {}

    def wait_s(self, watch: Watch) -> int:
        watch = self.get(watch)
        assert watch.last_checked_at is not None
        return round((watch.next_check_at - watch.last_checked_at).total_seconds())

    def jobs(self) -> list[Job]:
        with self.workplace.database.read() as session:
            return list(session.scalars(select(Job).order_by(Job.id)))

    def commits(self) -> list[str]:
        return [job.source["commit"] for job in self.jobs()]


@pytest.fixture
def follower(workplace: Workplace) -> Follower:
    return Follower(workplace)


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_head_becomes_one_job(fakehub: FakeHub, follower: Follower, watcher: Watcher) -> None:
    first = fakehub.add_repo(REPO, private=True)
    watch = follower.add()
    assert watcher.check_next()
    assert not watcher.check_next(), "nothing more is due"
    follower.make_due()
    assert watcher.check_next()
    assert follower.commits() == [first], "the head has not moved"
    second = fakehub.commit(REPO, {"config.json": "{}"})
    follower.make_due()
    assert watcher.check_next()
    assert follower.commits() == [first, second]
    assert [job.labels for job in follower.jobs()] == [{"watch": watch.id}] * 2
    assert follower.get(watch).last_commit == second
    assert follower.wait_s(watch) == INTERVAL_S


def test_two_workers_make_one_job(fakehub: FakeHub, follower: Follower, workplace: Workplace) -> None:
    fakehub.add_repo(REPO)
    fakehub.faults.add(ASKED, delay_s=0.5, count=None)
    follower.add()
    other = Workplace.open(workplace.settings)
    watchers = [Watcher(workplace), Watcher(other)]
    for each in watchers:
        each.start()
    wait_until(follower.jobs)
    second = fakehub.commit(REPO, {"config.json": "{}"})
    for _ in range(3):
        follower.make_due()  # also one that is being asked for
        time.sleep(0.2)
    wait_until(lambda: second in follower.commits())
    for each in watchers:
        each.stop()
    other.close()
    assert len(follower.commits()) == len(set(follower.commits())) == 2


def test_hub_that_is_down_is_asked_again_and_its_error_kept(
    fakehub: FakeHub, follower: Follower, watcher: Watcher
) -> None:
    commit = fakehub.add_repo(REPO)
    watch = follower.add()
    fakehub.faults.add(ASKED, status=503, count=None, message="Under maintenance", retry_after_s=300)
    with structlog.testing.capture_logs() as logs:
        watcher.check_next()
    error = follower.error(watch)
    assert (error["code"], error["type"], error["retryable"]) == ("hub_unavailable", "upstream", True)
    assert "503: Under maintenance" in error["message"]
    assert follower.wait_s(watch) == 300, "as it asked for"
    assert [(entry["action"], entry["code"]) for entry in logs] == [("watch_failed", "hub_unavailable")]
    assert len(fakehub.requests.find(ASKED)) == 1
    fakehub.faults.clear()
    follower.make_due()
    watcher.check_next()
    assert follower.commits() == [commit]
    assert follower.get(watch).last_error is None


def test_hub_that_nobody_answers_for_is_tried_later_each_time(
    settings: Settings, follower: Follower, watcher: Watcher, fakehub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakehub.add_repo(REPO)
    monkeypatch.setattr(module, "ASK_S", 1.0)
    fakehub.faults.add(ASKED, delay_s=60.0, count=None)
    watch = follower.add()
    waits = []
    for _ in range(3):
        follower.make_due()
        watcher.check_next()
        waits.append(follower.wait_s(watch))
    assert waits == [5, 10, 20]
    assert follower.error(watch)["message"] == "the Hub had no answer within 1 s"


def test_repo_that_is_gone_is_said_and_found_again_when_it_is_back(
    fakehub: FakeHub, follower: Follower, watcher: Watcher
) -> None:
    fakehub.add_repo(REPO)
    watch = follower.add(run_now=False)
    watcher.check_next()
    fakehub.state.remove(fakehub.repo(REPO))
    for n_failures in (1, 2):
        follower.make_due()
        watcher.check_next()
        assert follower.error(watch)["code"] == "repo_not_found"
        assert follower.wait_s(watch) == INTERVAL_S * n_failures
    back = fakehub.add_repo(REPO)
    fakehub.commit(REPO, {"config.json": "{}"})
    follower.make_due()
    watcher.check_next()
    assert follower.commits() == [fakehub.commits(REPO)[0].oid] != [back]


@pytest.mark.parametrize(
    ("repo_id", "credential", "code"),
    [("team-a/private", "unknown", "credential_unknown"), ("mallory/private", "reader", "repo_not_found")],
)
def test_what_a_credential_does_not_reach_is_said(
    fakehub: FakeHub, follower: Follower, watcher: Watcher, repo_id: str, credential: str, code: str
) -> None:
    fakehub.add_repo(repo_id, private=True)
    watch = follower.add(repo_id, credential=credential)
    watcher.check_next()
    assert (follower.error(watch)["code"], follower.error(watch)["type"]) == (code, "user")
    assert follower.jobs() == []


def test_one_that_fails_does_not_hold_up_another(fakehub: FakeHub, follower: Follower, watcher: Watcher) -> None:
    commit = fakehub.add_repo(REPO)
    gone, there = follower.add("team-a/gone"), follower.add()
    watcher.start()
    wait_until(lambda: follower.get(there).last_commit)
    watcher.stop()
    assert follower.error(gone)["code"] == "repo_not_found"
    assert follower.commits() == [commit]


def test_stop_does_not_wait_for_an_answer(fakehub: FakeHub, follower: Follower, watcher: Watcher) -> None:
    fakehub.add_repo(REPO)
    fakehub.faults.add(ASKED, delay_s=60.0)
    watch = follower.add()
    watcher.start()
    fakehub.requests.wait(ASKED)
    watcher.stop()
    assert fakehub.requests.find(ASKED)[0].status is None, "it is still being answered"
    assert (follower.error(watch), follower.jobs()) == ({}, [])


def test_the_token_is_in_no_row_and_no_log(
    fakehub: FakeHub, follower: Follower, watcher: Watcher, workplace: Workplace
) -> None:
    fakehub.add_repo(REPO, private=True)
    watch = follower.add()
    fakehub.faults.add(ASKED, status=403, message=f"{fakehub.read_token} may not do this")
    with structlog.testing.capture_logs() as logs:
        watcher.check_next()
        follower.make_due()
        assert "***" in follower.error(watch)["message"]
        watcher.check_next()
    assert len(follower.jobs()) == 1
    rows = []
    with workplace.database.read() as session:
        for table in Base.metadata.sorted_tables:
            assert isinstance(table, Table)
            rows += [repr(row) for row in session.execute(select(table))]
    assert any(watch.id in row for row in rows)
    assert "hf_canary" not in repr(rows) + repr(logs)
