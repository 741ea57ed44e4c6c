import threading
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import func, select, text, update

from service.common import repository
from service.common.errors import (
    IdempotencyBusy,
    JobError,
    JobTerminal,
    LeaseLost,
    NotFound,
    RequestInvalid,
    StaleJob,
)
from service.common.models import Event, IdempotencyRecord, Job, Lease, Outbox, Unit
from service.common.repository import JobFilter
from service.common.repository.job_row import change_job, move_job
from service.common.status import JobStatus, Phase, UnitKind, UnitStatus
from tests.service.conftest import OUTPUT, in_threads

ERROR = JobError("broken", "system", "it broke", True)
WAIT = {"backoff_s": 0.0, "backoff_limit_s": 0.0}


def actions(events):
    return [data["action"] for type, data in events if type == "log"]


def unit_rows(database, job):
    with database.read() as session:
        return list(session.scalars(select(Unit).where(Unit.job_id == job.id).order_by(Unit.kind, Unit.index)))


def count(database, model):
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(model))


def fail(database, claim, *, final=False, **wait):
    with database.write() as session:
        return repository.unit_failed(session, claim, ERROR, final=final, **(WAIT | wait))


def expire(database, claim):
    with database.write() as session:
        past = repository.now(session) - timedelta(seconds=1)
        session.execute(update(Unit).where(Unit.id == claim.unit_id).values(lease_expires_at=past))


def reap(database):
    with database.read() as session:
        expired = repository.expired_units(session)
    for unit_id in expired:
        with database.write() as session:
            repository.reap_unit(session, unit_id, **WAIT)
    return expired


def test_job_goes_from_queued_to_succeeded(database, hand):
    job = hand.insert()
    assert (job.status, job.phase, job.version) == (JobStatus.QUEUED, None, 1)
    job = hand.plan(100, 300)
    assert (job.status, job.phase, job.nbytes_total) == (JobStatus.RUNNING, Phase.QUANTIZING, 400)
    job = hand.solve(nbytes_out=30)
    assert job.progress["percent"] == 25
    job = hand.solve(nbytes_out=90)
    assert (job.phase, job.nbytes_done, job.nbytes_total) == (Phase.VERIFYING, 0, 120)
    artifact = {"name": "model.safetensors", "nbytes": 120, "sha256": "0" * 64}
    job = hand.finish(artifact)
    assert job.status == JobStatus.SUCCEEDED
    assert job.result == {"outputs": [OUTPUT], "artifacts": [artifact]}
    assert all((seconds is None) == (phase in ("profile", "upload")) for phase, seconds in job.durations.items())
    assert all(seconds >= 0 for seconds in job.durations.values() if seconds is not None)
    events = hand.events(job)
    assert [data["status"] for type, data in events if type == "status"] == ["queued", *["running"] * 3, "succeeded"]
    assert [type for type, _ in events][-3:] == ["artifact", "status", "done"]
    assert events[-1][1] == {"status": "succeeded", "outputs": [OUTPUT]}
    assert count(database, Outbox) == 0


def test_profile_comes_between_the_plan_and_the_shards(database, hand):
    job = hand.insert()
    job = hand.plan(100, 300, profile=True)
    assert (job.phase, job.nbytes_total, job.progress["eta_seconds"]) == (Phase.PROFILING, 800, None)
    claim = hand.claim()
    assert claim.kind == UnitKind.PROFILE
    with database.write() as session:
        repository.save_progress(session, claim, 200, lease_s=60)
    progress = hand.get(job).progress
    assert (progress["phase"], progress["percent"]) == ("profiling", 25)
    assert progress["eta_seconds"] >= 0
    job = hand.profile(100, 300, claim=claim)
    assert (job.phase, job.nbytes_done, job.nbytes_total) == (Phase.QUANTIZING, 0, 400)
    assert [unit.nbytes_total for unit in unit_rows(database, job) if unit.kind == UnitKind.SHARD] == [100, 300]
    assert hand.events(job)[-2:] == [
        ("log", {"action": "energies_ready", "message": "there"}),
        ("status", {"status": "running", "phase": "quantizing"}),
    ]
    hand.solve(), hand.solve()
    job = hand.finish()
    assert all(seconds >= 0 for phase, seconds in job.durations.items() if phase != "upload")


def test_profile_that_ends_after_a_cancel_calls_for_nothing(database, hand):
    job = hand.insert()
    hand.plan(1, profile=True)
    claim = hand.claim()
    hand.cancel(job)
    assert hand.profile(1, claim=claim).status == JobStatus.CANCELLED
    assert {unit.kind for unit in unit_rows(database, job)} == {UnitKind.PLAN, UnitKind.PROFILE}


def test_shard_results_come_in_the_order_of_the_plan(database, hand):
    job = hand.insert()
    hand.plan(1, 1, 1)
    claims = [hand.claim() for _ in range(3)]
    for claim in reversed(claims):
        hand.solve(claim)
    with database.read() as session:
        assert repository.shard_results(session, job.id) == [{"index": 0}, {"index": 1}, {"index": 2}]


def test_unit_is_claimed_once(database, hand):
    hand.insert()
    (unit_id,) = hand.due()

    def claim(i):
        with database.write() as session:
            return repository.claim_unit(session, unit_id, owner=str(i), lease_s=60)

    won = [claim for claim in in_threads(4, claim) if claim is not None]
    assert len(won) == 1
    assert (won[0].attempt, won[0].fence) == (1, 1)


def test_claim_of_nothing_is_none(database):
    with database.write() as session:
        assert repository.claim_unit(session, "unit_unknown", owner="w", lease_s=60) is None


def test_two_last_shards_call_for_one_finish(database, hand):
    job = hand.insert()
    hand.plan(*[10] * 4)
    claims = [hand.claim() for _ in range(4)]
    in_threads(4, lambda i: hand.solve(claims[i]))
    finishes = [unit for unit in unit_rows(database, job) if unit.kind == UnitKind.FINISH]
    assert len(finishes) == 1
    assert finishes[0].nbytes_total == 40


def test_events_have_no_gap_under_concurrent_writers(database, hand):
    job = hand.insert()
    hand.plan(*[1000] * 4)
    claims = [hand.claim() for _ in range(4)]

    def progress(i):
        for done in range(100, 1001, 100):
            with database.write() as session:
                repository.save_progress(session, claims[i], done, lease_s=60)

    in_threads(4, progress)
    events = hand.events(job)  # checks the numbers
    percents = [data["percent"] for type, data in events if type == "progress"]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100


def test_progress_makes_an_event_only_for_a_whole_percent(database, hand):
    job = hand.insert()
    hand.plan(100_000)
    claim = hand.claim()
    for done in range(0, 3000, 100):
        with database.write() as session:
            assert repository.save_progress(session, claim, done, lease_s=60) == JobStatus.RUNNING
    assert [data["completed"] for type, data in hand.events(job) if type == "progress"] == [1000, 2000]


def test_unit_that_starts_again_tells_no_percent_twice(database, hand):
    job = hand.insert()
    hand.plan(100, 100)
    first, other = hand.claim(), hand.claim()
    with database.write() as session:
        repository.save_progress(session, first, 80, lease_s=60)
    fail(database, first)
    again = hand.claim()
    seen = []
    for claim, done in ((again, 20), (other, 10), (again, 80), (other, 40)):
        with database.write() as session:
            repository.save_progress(session, claim, done, lease_s=60)
        seen.append(hand.get(job).nbytes_done)
    assert seen == [80, 80, 90, 120]
    completed = [data["completed"] for type, data in hand.events(job) if type == "progress"]
    assert completed == [80, 90, 120]


def test_later_claim_fences_off_the_earlier(database, hand):
    hand.insert()
    hand.plan(10)
    zombie = hand.claim()
    expire(database, zombie)
    assert reap(database) == [zombie.unit_id]
    claim = hand.claim(owner="second")
    assert (claim.attempt, claim.fence) == (2, 2)
    for write in (
        lambda session: repository.renew_lease(session, zombie, lease_s=60),
        lambda session: repository.save_progress(session, zombie, 5, lease_s=60),
        lambda session: repository.shard_succeeded(session, zombie, {}, nbytes_out=1),
        lambda session: repository.unit_failed(session, zombie, ERROR, final=True, **WAIT),
        lambda session: repository.hand_back(session, zombie),
        lambda session: repository.unit_stopped(session, zombie),
    ):
        with database.write() as session, pytest.raises(LeaseLost):
            write(session)
    assert hand.solve(claim).phase == Phase.VERIFYING


def test_guessed_fence_is_no_claim(database, hand):
    hand.insert()
    claim = hand.claim()
    with database.write() as session, pytest.raises(LeaseLost):
        repository.renew_lease(session, replace(claim, fence=claim.fence + 1), lease_s=60)


def test_renewed_lease_is_not_reaped(database, hand):
    hand.insert()
    claim = hand.claim()
    expire(database, claim)
    with database.write() as session:
        assert repository.renew_lease(session, claim, lease_s=60) == JobStatus.RUNNING
    assert reap(database) == []


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)  # SQLite has one writer at a time
def test_lease_that_is_renewed_while_the_reaper_looks_is_left(database, hand):
    hand.insert()
    claim = hand.claim()
    expire(database, claim)
    reaped = []

    def reap_it():
        with database.write() as session:
            reaped.append(repository.reap_unit(session, claim.unit_id, **WAIT))

    reaper = threading.Thread(target=reap_it)
    with database.write() as session:
        repository.renew_lease(session, claim, lease_s=60)
        reaper.start()
        while not session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
            assert reaper.is_alive()
    reaper.join()
    assert reaped == [None]
    with database.write() as session:
        assert repository.renew_lease(session, claim, lease_s=60) == JobStatus.RUNNING


def test_lost_worker_is_an_error_after_max_attempts(database, hand):
    job = hand.insert(max_attempts=2)
    for attempt in (1, 2):
        claim = hand.claim()
        assert claim.attempt == attempt
        expire(database, claim)
        reap(database)
    job = hand.get(job)
    assert (job.status, job.attempt) == (JobStatus.FAILED, 2)
    assert job.error["code"] == "worker_lost"
    assert (job.error["type"], job.error["retryable"]) == ("system", True)


def test_failed_unit_waits_longer_each_time(database, hand):
    hand.insert(max_attempts=9)
    waits = []
    for _ in range(4):
        with database.write() as session:
            session.execute(update(Unit).values(available_at=repository.now(session)))
            session.execute(update(Outbox).values(available_at=repository.now(session)))
        claim = hand.claim()
        fail(database, claim, backoff_s=10, backoff_limit_s=30)
        with database.read() as session:
            waits.append(session.get(Unit, claim.unit_id).available_at - repository.now(session))
        assert hand.due() == []
        with database.write() as session:
            assert repository.claim_unit(session, claim.unit_id, owner="early", lease_s=60) is None
    assert [round(wait.total_seconds()) for wait in waits] == [10, 20, 30, 30]


def test_final_error_fails_the_job_and_drops_the_rest(database, hand):
    job = hand.insert()
    hand.plan(1, 1, 1)
    claim = hand.claim()
    other = hand.claim()
    job = fail(database, claim, final=True)
    assert (job.status, job.error) == (JobStatus.FAILED, ERROR.to_dict())
    assert hand.events(job)[-1] == ("done", {"status": "failed", "error": ERROR.to_dict()})
    assert [unit.status for unit in unit_rows(database, job) if unit.kind == UnitKind.SHARD] == [
        UnitStatus.FAILED,
        UnitStatus.RUNNING,
        UnitStatus.CANCELLED,
    ]
    assert count(database, Outbox) == 0
    with database.write() as session:  # the other worker sees it at its next look
        assert repository.save_progress(session, other, 1, lease_s=60) == JobStatus.FAILED
    with database.read() as session:
        assert repository.discarded_jobs(session, [job.id]) == set()  # it may still be writing
    with database.write() as session:
        assert repository.unit_stopped(session, other).status == JobStatus.FAILED
    with database.read() as session:
        assert repository.discarded_jobs(session, [job.id]) == {job.id}


def test_handing_back_does_not_count(database, hand):
    job = hand.insert(max_attempts=1)
    for _ in range(3):
        claim = hand.claim()
        assert claim.attempt == 1
        with database.write() as session:
            repository.hand_back(session, claim)
    assert hand.get(job).status == JobStatus.RUNNING
    assert actions(hand.events(job)) == ["unit_claimed", "unit_handed_back"] * 3


def test_cancel_of_a_queued_job_is_immediate(database, hand):
    job = hand.cancel(hand.insert())
    assert job.status == JobStatus.CANCELLED
    assert count(database, Outbox) == 0
    assert [unit.status for unit in unit_rows(database, job)] == [UnitStatus.CANCELLED]
    assert hand.cancel(job).version == job.version
    assert job.durations == dict.fromkeys(["queued", "plan", "profile", "quantize", "verify", "upload"])


def test_cancel_waits_for_the_last_running_unit(database, hand):
    job = hand.insert()
    hand.plan(1, 1, 1)
    claims = [hand.claim(), hand.claim()]
    job = hand.cancel(job)
    assert job.status == JobStatus.CANCELLING
    with database.write() as session:
        assert repository.renew_lease(session, claims[0], lease_s=60) == JobStatus.CANCELLING
        assert repository.unit_stopped(session, claims[0]).status == JobStatus.CANCELLING
    assert hand.solve(claims[1]).status == JobStatus.CANCELLED
    assert hand.events(job)[-1] == ("done", {"status": "cancelled"})


def test_cancel_between_units_is_immediate(hand):
    job = hand.insert()
    hand.plan(1)
    assert hand.cancel(job).status == JobStatus.CANCELLED


def test_cancel_is_finished_by_the_reaper_where_the_worker_died(database, hand):
    job = hand.insert()
    claim = hand.claim()
    hand.cancel(job)
    expire(database, claim)
    reap(database)
    assert hand.get(job).status == JobStatus.CANCELLED


def test_error_while_cancelling_is_a_cancel(database, hand):
    job = hand.insert()
    claim = hand.claim()
    hand.cancel(job)
    assert fail(database, claim, final=True).status == JobStatus.CANCELLED


def test_result_complete_before_the_cancel_stands(database, hand):
    job = hand.insert()
    hand.plan(1)
    hand.solve()
    claim = hand.claim()
    assert hand.cancel(job).status == JobStatus.CANCELLING
    with database.write() as session:
        job = repository.finish_succeeded(session, claim, artifacts=[], outputs=[])
    assert job.status == JobStatus.SUCCEEDED
    assert "cancel_too_late" in actions(hand.events(job))


def test_ended_job_cannot_be_cancelled(hand):
    job = hand.insert()
    hand.plan(1)
    hand.solve()
    hand.finish()
    with pytest.raises(JobTerminal, match="already succeeded"):
        hand.cancel(job)


def test_terminal_status_never_changes(database, hand):
    job = hand.cancel(hand.insert())
    with database.write() as session, pytest.raises(StaleJob):
        move_job(session, session.get(Job, job.id), JobStatus.RUNNING, repository.now(session))


def test_change_needs_the_version_it_was_read_at(database, hand):
    job = hand.insert()
    hand.plan(1)
    with database.write() as session, pytest.raises(StaleJob, match="version 1"):
        change_job(session, job, repository.now(session), priority=1)


@pytest.mark.parametrize("job_id", ["job_01K8Z3V4TQ8M3W1B0G6C2N9R5A", "job_unknown", "", "\0", "\ud800"])
def test_unknown_jobs_are_not_found(database, job_id):
    with database.write() as session:
        with pytest.raises(NotFound, match="no job"):
            repository.get_job(session, job_id)
        with pytest.raises(NotFound, match="no job"):
            repository.cancel_job(session, job_id)


def test_list_pages_both_ways_without_gap_or_repeat(database, hand):
    ids = [hand.insert().id for _ in range(7)][::-1]

    def pages(**cursor):
        with database.read() as session:
            page = repository.list_jobs(session, JobFilter(), limit=3, **cursor)
        return [job.id for job in page.rows], page.has_more

    assert pages() == (ids[:3], True)
    assert pages(after=ids[2]) == (ids[3:6], True)
    assert pages(after=ids[5]) == (ids[6:], False)
    assert pages(before=ids[6]) == (ids[3:6], True)
    assert pages(before=ids[3]) == (ids[:3], False)
    assert pages(ascending=True) == (ids[:-4:-1], True)
    assert pages(ascending=True, after=ids[4]) == (ids[3:0:-1], True)
    assert pages(ascending=True, before=ids[4]) == (ids[:4:-1], False)


def test_list_filters(database, hand):
    a, b, c = hand.insert(team="a/b", env="dev"), hand.insert(team="a.b"), hand.insert()
    hand.cancel(b)

    def found(**where):
        with database.read() as session:
            return {job.id for job in repository.list_jobs(session, JobFilter(**where), limit=10).rows}

    assert found() == {a.id, b.id, c.id}
    assert found(statuses=(JobStatus.CANCELLED,)) == {b.id}
    assert found(labels=(("team", "a/b"),)) == {a.id}
    assert found(labels=(("team", "a/b"), ("env", "prod"))) == set()
    assert found(created_after=a.created_at, created_before=c.created_at) == {b.id}
    assert found(q="/MODELS/T") == {a.id, b.id, c.id}
    assert found(q=c.id[-8:].lower()) == {c.id}
    assert found(q="100%_") == set()


def test_list_refuses_an_unknown_cursor(database):
    with database.read() as session, pytest.raises(RequestInvalid) as refusal:
        repository.list_jobs(session, JobFilter(), limit=3, after="job_unknown")
    assert refusal.value.errors[0].pointer == "query/after"


def test_lease_has_one_holder(database):
    def take(i):
        with database.write() as session:
            return repository.take_lease(session, "reaper", str(i), ttl_s=60)

    assert sorted(in_threads(4, take)) == [False, False, False, True]
    with database.write() as session:
        holder = session.get(Lease, "reaper")
        assert repository.take_lease(session, "reaper", holder.owner, ttl_s=60)
        assert not repository.take_lease(session, "reaper", "other", ttl_s=60)
        holder.expires_at = repository.now(session) - timedelta(seconds=1)
    with database.write() as session:
        assert repository.take_lease(session, "reaper", "other", ttl_s=60)
        repository.drop_lease(session, "reaper", "other")
        assert session.get(Lease, "reaper") is None


def test_workers_are_online_while_they_say_so(database):
    with database.write() as session:
        repository.worker_seen(session, "one", ttl_s=60)
        repository.worker_seen(session, "one", ttl_s=60)
        repository.worker_seen(session, "two", ttl_s=-1)
        repository.take_lease(session, "reaper", "one", ttl_s=60)
        assert repository.workers_online(session) == 1
        repository.purge(session)
        assert session.scalars(select(Lease.name).order_by(Lease.name)).all() == ["reaper", "worker:one"]


def record(session, job, *, key="k", age_s=0):
    at = repository.now(session)
    return IdempotencyRecord(
        key=key, method="POST", path="/v1/jobs", fingerprint="0" * 64, job_id=job.id, status_code=202, body={},
        expires_at=at + timedelta(seconds=60 - age_s),
    )  # fmt: skip


def test_one_of_two_requests_with_a_key_wins(database, hand):
    job = hand.insert()
    with database.write() as session:
        repository.insert_idempotency(session, record(session, job))
    with pytest.raises(IdempotencyBusy), database.write() as session:
        repository.insert_idempotency(session, record(session, job))


def test_expired_key_is_forgotten(database, hand):
    job = hand.insert()
    with database.write() as session:
        repository.insert_idempotency(session, record(session, job, age_s=61))
        assert repository.find_idempotency(session, "k", "POST", "/v1/jobs") is None
        repository.insert_idempotency(session, record(session, job, age_s=61))
        repository.purge(session)
        assert session.get(IdempotencyRecord, ("k", "POST", "/v1/jobs")) is None


def test_events_are_read_in_stretches(database, hand):
    job = hand.insert()
    hand.plan(1)
    with database.read() as session:
        assert [event.seq for event in repository.list_events(session, job.id, after=1, limit=2)] == [2, 3]
    assert count(database, Event) == 4
