"""Rows of jobs whose source or result is at a Hub: pinned once, uploaded once, kept where the upload fails."""

import pytest
from sqlalchemy import text

from service.common import repository
from service.common.errors import (
    JobNotRetryable,
    LeaseLost,
    NotFound,
)
from service.common.models import Unit
from service.common.status import JobStatus, Phase, UnitKind
from tests.service.common.test_repository import actions, expire, fail, reap, unit_rows
from tests.service.conftest import OUTPUT, PUSHED

HUB = {"type": "hub", "repo_id": "Acme/Tiny", "revision": "main", "credential": "team-a", "keep": True}
TARGET = {"repo_id": "acme/tiny-4bit", "branch": "main", "credential": "team-a"}
ARTIFACTS = [
    {"name": "config.json", "nbytes": 20, "sha256": "0" * 64},
    {"name": "m", "nbytes": 100, "sha256": "1" * 64},
]


def uploading(hand, **options):
    """A job whose result is whole and waits for its upload."""
    job = hand.insert(target=TARGET, **options)
    hand.plan(1)
    hand.solve()
    hand.finish(*ARTIFACTS)
    return job


def discarded(database, job):
    with database.read() as session:
        return repository.discarded_jobs(session, [job.id]) == {job.id}


def test_a_source_is_pinned_once_for_all_units(database, hand):
    job = hand.insert(source=HUB)
    claim = hand.claim()
    pinned = {**HUB, "repo_id": "acme/tiny", "commit": "a" * 40}
    for _ in range(2):
        with database.write() as session:
            assert repository.pin_source(session, claim, pinned).source == pinned
    assert actions(hand.events(job)) == ["unit_claimed", "source_pinned"]
    with database.write() as session:
        repository.hand_back(session, claim)
    again = hand.claim()
    assert again.source == pinned
    with database.write() as session:
        repository.plan_succeeded(session, again, [repository.ShardWork(0, 1)])
    assert hand.claim().source == pinned
    assert hand.get(job).source == pinned


def test_a_zombie_pins_nothing(database, hand):
    job = hand.insert(source=HUB)
    zombie = hand.claim()
    expire(database, zombie)
    reap(database)
    hand.claim()
    with database.write() as session, pytest.raises(LeaseLost):
        repository.pin_source(session, zombie, {**HUB, "commit": "b" * 40})
    assert hand.get(job).source == HUB


def test_a_result_with_a_target_is_pushed_before_the_job_succeeds(database, hand):
    job = uploading(hand)
    waiting = hand.get(job)
    assert (waiting.status, waiting.phase, waiting.nbytes_total) == (JobStatus.RUNNING, Phase.UPLOADING, 120)
    assert waiting.result == {"outputs": [OUTPUT], "artifacts": ARTIFACTS}
    assert waiting.durations["verify"] >= 0
    claim = hand.claim()
    assert (claim.kind, claim.target) == (UnitKind.PUSH, TARGET)
    with database.write() as session:
        repository.save_progress(session, claim, 60, lease_s=60)
    progress = hand.get(job).progress
    assert (progress["phase"], progress["percent"]) == ("uploading", 50)
    assert progress["eta_seconds"] >= 0
    job = hand.push(claim)
    assert (job.status, job.nbytes_done) == (JobStatus.SUCCEEDED, 120)
    assert job.result == {"outputs": [OUTPUT], "artifacts": ARTIFACTS, "pushed": PUSHED}
    assert job.durations["upload"] >= 0
    events = hand.events(job)
    assert events[-1] == ("done", {"status": "succeeded", "outputs": [OUTPUT], "pushed": PUSHED})
    assert [data for type, data in events if type == "artifact"] == ARTIFACTS


def test_a_job_without_a_target_has_none_to_claim(database, hand):
    job = hand.insert()
    assert hand.claim().target is None
    with database.read() as session:
        assert session.scalar(text("SELECT target IS NULL FROM jobs"))
    assert hand.get(job).target is None


def test_cancel_while_verifying_stops_what_would_be_pushed(database, hand):
    job = hand.insert(target=TARGET)
    hand.plan(1)
    hand.solve()
    claim = hand.claim()
    hand.cancel(job)
    with database.write() as session:
        ended = repository.finish_succeeded(session, claim, artifacts=ARTIFACTS, outputs=[OUTPUT])
    assert (ended.status, ended.result) == (JobStatus.CANCELLED, None)
    assert UnitKind.PUSH not in {unit.kind for unit in unit_rows(database, job)}
    assert discarded(database, job)


def test_cancel_before_the_push_began_takes_the_result_along(database, hand):
    job = hand.cancel(uploading(hand))
    assert (job.status, job.result) == (JobStatus.CANCELLED, None)
    assert hand.due() == []
    assert discarded(database, job)


def test_push_that_landed_before_the_cancel_stands(hand):
    job = uploading(hand)
    claim = hand.claim()
    assert hand.cancel(job).status == JobStatus.CANCELLING
    job = hand.push(claim)
    assert (job.status, job.result["pushed"]) == (JobStatus.SUCCEEDED, PUSHED)
    assert "cancel_too_late" in actions(hand.events(job))


def test_push_that_a_cancel_stopped_is_cancelled(database, hand):
    job = uploading(hand)
    claim = hand.claim()
    hand.cancel(job)
    with database.write() as session:
        assert repository.unit_stopped(session, claim).status == JobStatus.CANCELLED
    assert hand.get(job).result is None


def test_a_later_claim_fences_off_an_earlier_push(database, hand):
    uploading(hand)
    zombie = hand.claim()
    expire(database, zombie)
    reap(database)
    claim = hand.claim()
    for write in (
        lambda session: repository.renew_lease(session, zombie, lease_s=60),
        lambda session: repository.push_succeeded(session, zombie, PUSHED),
    ):
        with database.write() as session, pytest.raises(LeaseLost):
            write(session)
    assert hand.push(claim).status == JobStatus.SUCCEEDED


def test_a_result_whose_upload_failed_is_kept_and_tried_again(database, hand):
    job = uploading(hand, max_attempts=2)
    failed = hand.fail()
    assert (failed.status, failed.error["code"]) == (JobStatus.FAILED, "token_refused")
    assert failed.result["artifacts"] == ARTIFACTS
    assert not discarded(database, job)
    with database.write() as session:
        again = repository.retry_upload(session, job.id)
    assert (again.status, again.phase, again.error, again.finished_at) == (
        JobStatus.RUNNING,
        Phase.UPLOADING,
        None,
        None,
    )
    claim = hand.claim()
    assert (claim.kind, claim.attempt, claim.fence, claim.target) == (UnitKind.PUSH, 1, 2, TARGET)
    assert hand.push(claim).status == JobStatus.SUCCEEDED
    said = [data["status"] for type, data in hand.events(job) if type == "done"]
    assert said == ["failed", "succeeded"]


def test_a_retry_may_have_another_target(database, hand):
    job = uploading(hand)
    hand.fail()
    other = {**TARGET, "overwrite": True}
    with database.write() as session:
        assert repository.retry_upload(session, job.id, target=other).target == other
    assert hand.claim().target == other


def test_only_a_failed_upload_is_tried_again(database, hand):
    running = uploading(hand)
    broken = hand.insert(target=TARGET, priority=9)
    hand.fail()
    cancelled = hand.cancel(hand.insert(target=TARGET))
    for job in (running, broken, cancelled):
        with database.write() as session, pytest.raises(JobNotRetryable, match=hand.get(job).status):
            repository.retry_upload(session, job.id)
    assert discarded(database, broken)
    hand.fail()
    with database.write() as session:
        repository.retry_upload(session, running.id)
    with database.write() as session, pytest.raises(JobNotRetryable, match="is running"):
        repository.retry_upload(session, running.id)
    with database.write() as session, pytest.raises(NotFound):
        repository.retry_upload(session, "job_unknown")


@pytest.mark.parametrize(("asked_s", "waits_s"), [(None, 10), (3, 10), (120, 120), (10**12, 3600)])
def test_a_busy_hub_is_asked_again_no_sooner_than_it_wants(database, hand, asked_s, waits_s):
    hand.insert(source=HUB)
    claim = hand.claim()
    fail(database, claim, backoff_s=10, backoff_limit_s=30, retry_after_s=asked_s)
    with database.read() as session:
        wait = session.get(Unit, claim.unit_id).available_at - repository.now(session)
    assert round(wait.total_seconds()) == waits_s
    assert hand.due() == []
