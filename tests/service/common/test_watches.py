import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from service.common import repository
from service.common.errors import HubUnavailable, NotFound, RepoNotFound, describe
from service.common.models import Job, Watch
from service.common.repository import watches
from service.common.schema import downgrade, migrate
from service.common.status import JobStatus

FIRST, SECOND, THIRD = "1" * 40, "2" * 40, "3" * 40
SOURCE = {"type": "hub", "repo_id": "acme/tiny", "revision": "main", "credential": "reader", "keep": True}
TARGET = {"repo_id": "acme/tiny-4bit", "branch": "main", "create_pr": True, "credential": "writer"}
INTERVAL_S = 900
HOLD_S = 100


class Watcher:
    """Does by hand what a worker does to watches."""

    def __init__(self, database):
        self.database = database

    def add(self, **changes):
        settings = {"labels": {"team": "search"}, "priority": 7, "interval_s": INTERVAL_S, "run_now": False}
        with self.database.write() as session:
            return repository.insert_watch(session, source=SOURCE, recipes=[{}], target=TARGET, **settings | changes)

    def take(self):
        with self.database.write() as session:
            return repository.take_due_watch(session, hold_s=HOLD_S)

    def see(self, commit, watch=None):
        watch = watch or self.take()
        with self.database.write() as session:
            return repository.watch_seen(session, watch, repo_id="acme/tiny", commit=commit, max_attempts=3)

    def see_next(self, watch, commit):
        """Once its time has come."""
        self.make_due(watch)
        return self.see(commit)

    def fail(self, error, *, backoff_s=5, retry_after_s=None):
        watch = self.take()
        with self.database.write() as session:
            return repository.watch_failed(
                session, watch, describe(error), backoff_s=backoff_s, retry_after_s=retry_after_s
            )

    def make_due(self, watch):
        with self.database.write() as session:
            session.execute(update(Watch).where(Watch.id == watch.id).values(next_check_at=repository.now(session)))

    def get(self, watch):
        with self.database.read() as session:
            return repository.get_watch(session, watch.id)

    def wait_s(self, watch):
        """Whole seconds between the last look and the next."""
        watch = self.get(watch)
        return round((watch.next_check_at - watch.last_checked_at).total_seconds())

    def jobs(self):
        with self.database.read() as session:
            return list(session.scalars(select(Job).order_by(Job.id)))


@pytest.fixture
def watcher(database):
    return Watcher(database)


def test_only_moves_of_the_head_become_jobs(watcher, hand):
    watch = watcher.add()
    assert watcher.see(FIRST) is None
    assert watcher.get(watch).last_commit == FIRST
    assert watcher.see_next(watch, FIRST) is None
    job = watcher.see_next(watch, SECOND)
    assert job.source == {**SOURCE, "commit": SECOND}
    assert (job.recipes, job.target, job.priority, job.max_attempts) == ([{}], TARGET, 7, 3)
    assert job.labels == {"team": "search", "watch": watch.id}
    (moved,) = [data for type, data in hand.events(job) if type == "log"]
    assert (moved["action"], moved["watch_id"], moved["before"]) == ("watch_moved", watch.id, FIRST)
    assert hand.claim().source["commit"] == SECOND
    assert watcher.see_next(watch, SECOND) is None
    assert [job.id] == [job.id for job in watcher.jobs()]
    assert (watcher.get(watch).last_commit, watcher.get(watch).last_job_id) == (SECOND, job.id)


def test_the_head_that_is_there_becomes_a_job_where_that_is_wanted(watcher):
    watch = watcher.add(run_now=True)
    job = watcher.see(FIRST)
    assert job.source["commit"] == FIRST
    assert watcher.see_next(watch, FIRST) is None


def test_a_renamed_repo_is_followed(watcher):
    watcher.add(run_now=True)
    taken = watcher.take()
    with watcher.database.write() as session:
        job = repository.watch_seen(session, taken, repo_id="acme/new", commit=FIRST, max_attempts=3)
    assert job.source["repo_id"] == "acme/new"
    assert watcher.get(taken).source == SOURCE


def test_a_watch_is_taken_once_and_due_again_when_its_taker_is_lost(watcher):
    watch = watcher.add()
    taken = watcher.take()
    assert (taken.id, watcher.take()) == (watch.id, None)
    watcher.make_due(watch)  # as HOLD_S later
    again = watcher.take()
    assert watcher.see(FIRST, again) is None
    assert watcher.see(SECOND, taken) is None, "who comes late changes nothing"
    assert watcher.get(watch).last_commit == FIRST
    assert watcher.wait_s(watch) == INTERVAL_S
    assert watcher.jobs() == []


def test_the_longest_due_comes_first_and_the_disabled_never(watcher):
    late, later, off = (watcher.add() for _ in range(3))
    with watcher.database.write() as session:
        at = repository.now(session)
        for watch, seconds in ((later, 10), (late, 20), (off, 30)):
            due = at - timedelta(seconds=seconds)
            values = {"next_check_at": due, "enabled": watch is not off}
            session.execute(update(Watch).where(Watch.id == watch.id).values(**values))
    assert [watcher.take().id, watcher.take().id, watcher.take()] == [late.id, later.id, None]


def test_two_that_saw_the_same_move_make_one_job(watcher):
    watcher.add(run_now=True)
    taken, gate, made = watcher.take(), threading.Barrier(4), []

    def see():
        gate.wait()
        made.append(watcher.see(FIRST, taken))

    threads = [threading.Thread(target=see) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [job.id for job in made if job] == [job.id for job in watcher.jobs()]
    assert (len(made), len(watcher.jobs())) == (4, 1)


KILLED = """
import os, signal, sys
from service.common import repository
from service.common.session import Database
database = Database(sys.argv[1])
with database.write() as session:
    watch = repository.take_due_watch(session, hold_s=100)
with database.write() as session:
    job = repository.watch_seen(session, watch, repo_id="acme/tiny", commit="1" * 40, max_attempts=3)
    session.flush()
    assert repository.get_job(session, job.id).labels == {"team": "search", "watch": watch.id}
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_crash_between_job_and_commit_leaves_neither(watcher):
    watch = watcher.add(run_now=True)
    url = watcher.database.url
    killed = subprocess.run([sys.executable, "-c", KILLED, url], env=os.environ, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (watcher.jobs(), watcher.get(watch).last_commit) == ([], None)
    assert watcher.take() is None, "held by the lost one"
    assert watcher.see_next(watch, FIRST) is not None
    assert len(watcher.jobs()) == 1


def test_a_job_that_still_waits_makes_way_for_the_newest_head(watcher, hand):
    watch = watcher.add(run_now=True)
    old = watcher.see(FIRST)
    new = watcher.see_next(watch, SECOND)
    assert (hand.get(old).status, hand.get(new).status) == (JobStatus.CANCELLED, JobStatus.QUEUED)
    assert "watch_superseded" in [data.get("action") for _, data in hand.events(old)]
    assert [unit_job.id for unit_job in watcher.jobs() if not unit_job.is_terminal] == [new.id]


def test_a_job_that_has_begun_is_let_end_and_the_head_of_then_is_next(watcher, hand):
    watch = watcher.add(run_now=True)
    first = watcher.see(FIRST)
    hand.plan(1)
    assert watcher.see_next(watch, SECOND) is None
    assert watcher.get(watch).last_commit == FIRST
    hand.solve(), hand.finish()
    assert watcher.see_next(watch, THIRD) is None, "it uploads"
    assert hand.push().status == JobStatus.SUCCEEDED
    second = watcher.see_next(watch, THIRD)
    assert [job.source["commit"] for job in watcher.jobs()] == [FIRST, THIRD]
    assert hand.get(first).status == JobStatus.SUCCEEDED
    assert watcher.get(watch).last_job_id == second.id


def test_what_may_pass_is_tried_soon_and_later_each_time(watcher):
    watch = watcher.add()
    waits = []
    for _ in range(10):
        watcher.make_due(watch)
        watcher.fail(HubUnavailable("the Hub answered 503"))
        waits.append(watcher.wait_s(watch))
    assert waits == [5, 10, 20, 40, 80, 160, 320, 640, INTERVAL_S, INTERVAL_S]
    failed = watcher.get(watch)
    assert failed.last_error == {
        "code": "hub_unavailable",
        "type": "upstream",
        "message": "the Hub answered 503",
        "retryable": True,
    }
    assert failed.n_failures == 10
    watcher.see_next(watch, FIRST)
    mended = watcher.get(watch)
    assert (mended.last_error, mended.n_failures, watcher.wait_s(watch)) == (None, 0, INTERVAL_S)


def test_what_somebody_has_to_mend_is_tried_less_often_but_not_given_up(watcher):
    watch = watcher.add()
    waits = []
    for _ in range(9):
        watcher.make_due(watch)
        watcher.fail(RepoNotFound("acme/tiny is not there"))
        waits.append(watcher.wait_s(watch))
    assert waits[:3] == [INTERVAL_S, 2 * INTERVAL_S, 4 * INTERVAL_S]
    assert waits[-1] == 24 * 3600
    assert watcher.get(watch).enabled


@pytest.mark.parametrize(("asked_s", "wait_s"), [(1, 5), (77, 77), (10**9, 3600)])
def test_a_hub_that_asks_for_patience_gets_it(watcher, asked_s, wait_s):
    watch = watcher.add()
    watcher.fail(HubUnavailable("busy"), retry_after_s=asked_s)
    assert watcher.wait_s(watch) == wait_s


def test_an_answer_to_a_watch_that_was_changed_or_removed_counts_for_nothing(watcher):
    watch = watcher.add(run_now=True)
    taken = watcher.take()
    with watcher.database.write() as session:
        repository.change_watch(session, watch.id, interval_s=60)
    assert watcher.see(FIRST, taken) is None
    again = watcher.take()
    assert again.interval_s == 60, "a change makes it due at once"
    with watcher.database.write() as session:
        repository.delete_watch(session, watch.id)
    assert watcher.see(FIRST, again) is None
    with watcher.database.write() as session:
        assert repository.watch_failed(session, again, describe(HubUnavailable("busy")), backoff_s=1) is None
    assert watcher.jobs() == []


@pytest.mark.parametrize(
    "watch_id", ["watch_01K8Z3V4TQ8M3W1B0G6C2N9R5A", "", "nothing\0", "job_01K8Z3V4TQ8M3W1B0G6C2N9R5A"]
)
def test_an_unknown_watch_is_not_found(database, watch_id):
    for act in (repository.get_watch, repository.change_watch, repository.delete_watch):
        with database.write() as session, pytest.raises(NotFound, match="there is no watch"):
            act(session, watch_id)


def test_a_step_back_leaves_the_jobs(watcher, hand):
    watcher.add(run_now=True)
    job = watcher.see(FIRST)
    downgrade(watcher.database, "0006")
    migrate(watcher.database)
    assert hand.get(job).labels["watch"].startswith("watch_")
    assert watcher.take() is None


def test_backoff_of_a_watch_that_failed_for_years_is_a_number():
    assert watches._backoff_s(Watch(n_failures=10**6, interval_s=900), 5.0, again=True) == 900
