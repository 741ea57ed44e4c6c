import time
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from sqlalchemy import select, update

from service.common import repository
from service.common.models import Job, Lease, Unit
from service.common.queue import KEY_PREFIX, QUEUE
from service.common.status import JobStatus
from tests.worker.conftest import Foreman
from worker import reaper
from worker.reaper import LEASE, Housekeeper, reap
from worker.workplace import Workplace


def lose_worker(foreman: Foreman) -> None:
    """Claim a unit and be heard of no more."""
    claim = foreman.claim_next()
    with foreman.workplace.database.write() as session:
        repository.expire_units(session, claim.owner)


def test_unit_of_a_lost_worker_is_queued_again(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    lose_worker(foreman)
    assert foreman.units() == []
    reap(workplace)
    assert [unit.attempt for unit in foreman.units()] == [1]
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED


def test_unit_whose_lease_runs_is_left_alone(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    foreman.submit(source)
    foreman.claim_next()
    reap(workplace)
    assert foreman.units() == []


def test_only_the_units_of_the_named_worker_expire(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    foreman.submit(source)
    foreman.claim_next()
    with workplace.database.write() as session:
        repository.expire_units(session, "worker@elsewhere")
    reap(workplace)
    assert foreman.units() == []


def test_unit_that_kills_its_workers_fails_its_job(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    foreman.run_next()
    for _ in range(3):
        lose_worker(foreman)
        reap(workplace)
    job = foreman.get(job)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["retryable"]) == ("worker_lost", True)
    assert list(workplace.store.job_ids()) == [], "whoever ends a job removes its files"


def test_cancelled_job_of_a_lost_worker_is_brought_to_its_end(
    foreman: Foreman, workplace: Workplace, source: Path
) -> None:
    job = foreman.submit(source)
    lose_worker(foreman)
    foreman.cancel(job)
    assert foreman.get(job).status == JobStatus.CANCELLING
    reap(workplace)
    assert foreman.get(job).status == JobStatus.CANCELLED


def test_files_of_a_living_job_stay(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    foreman.run_next()
    lose_worker(foreman)
    Housekeeper(workplace, "worker@here").keep()
    assert list(workplace.store.job_ids()) == [job.id]


def test_folders_are_looked_through_at_the_start_and_then_seldom(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = foreman.submit(source)
    foreman.cancel(job)
    with workplace.database.write() as session:
        session.execute(update(Job).values(finished_at=repository.now(session) - timedelta(hours=1)))
    housekeeper = Housekeeper(workplace, "worker@here")
    kept = []
    for period_s in (reaper.SWEEP_S, reaper.SWEEP_S, 0):
        workplace.store.create(job.id)  # as a crash leaves it
        monkeypatch.setattr(reaper, "SWEEP_S", period_s)
        housekeeper.keep()
        kept.append(list(workplace.store.job_ids()))
    assert kept == [[], [job.id], []]


def test_events_of_old_jobs_go_at_the_start(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    old, lately = foreman.submit(source), foreman.submit(source)
    foreman.cancel(old)
    foreman.cancel(lately)
    with workplace.database.write() as session:
        long_ago = repository.now(session) - timedelta(seconds=workplace.settings.events_kept_s + 1)
        session.execute(update(Job).where(Job.id == old.id).values(finished_at=long_ago))
    Housekeeper(workplace, "worker@here").keep()
    with workplace.database.read() as session:
        kept = [[event.type for event in repository.list_events(session, job.id)] for job in (old, lately)]
    assert kept[0] == ["done"]
    assert len(kept[1]) > 1


def test_what_a_crash_leaves_of_a_job_that_ended_goes_with_the_next_round(
    foreman: Foreman, workplace: Workplace, source: Path
) -> None:
    housekeeper = Housekeeper(workplace, "worker@here")
    housekeeper.keep()
    job = foreman.submit(source)
    foreman.cancel(job)
    workplace.store.create(job.id)
    housekeeper.keep()
    assert list(workplace.store.job_ids()) == []


def test_housekeeping_sends_what_waits(foreman: Foreman, workplace: Workplace, source: Path, redis_url: str) -> None:
    foreman.submit(source)
    Housekeeper(workplace, "worker@here").keep()
    with redis.Redis.from_url(redis_url) as broker:
        assert broker.llen(KEY_PREFIX + QUEUE) == 1


def test_only_one_worker_reaps(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    Housekeeper(workplace, "first@here").keep()
    foreman.submit(source)
    lose_worker(foreman)
    Housekeeper(workplace, "second@here").keep()
    assert foreman.units() == []
    with workplace.database.write() as session:
        session.execute(update(Lease).where(Lease.name == LEASE).values(expires_at=repository.now(session)))
    time.sleep(0.01)
    Housekeeper(workplace, "second@here").keep()
    assert len(foreman.units()) == 1


def test_worker_says_hello_and_goodbye(workplace: Workplace) -> None:
    housekeeper = Housekeeper(workplace, "worker@here")
    housekeeper.start()
    deadline = time.monotonic() + 5
    while online(workplace) != 1:
        assert time.monotonic() < deadline
    housekeeper.stop()
    assert online(workplace) == 0
    with workplace.database.read() as session:
        assert list(session.scalars(select(Lease.name))) == []
        assert list(session.scalars(select(Unit.id))) == []


def online(workplace: Workplace) -> int:
    with workplace.database.read() as session:
        return repository.workers_online(session)
