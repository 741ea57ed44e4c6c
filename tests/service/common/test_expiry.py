"""What is kept for a while, and what of it stays."""

from datetime import timedelta

from sqlalchemy import update

from service.common import repository
from service.common.models import Job

DAY_S = 24 * 3600.0


def end_long_ago(database, job, days):
    with database.write() as session:
        repository.cancel_job(session, job.id)
        at = repository.now(session) - timedelta(days=days)
        session.execute(update(Job).where(Job.id == job.id).values(finished_at=at))


def types_of(database, job):
    with database.read() as session:
        return [event.type for event in repository.list_events(session, job.id)]


def drop(database, limit=100):
    """As housekeeping does; how many jobs had old events."""
    with database.read() as session:
        job_ids = repository.jobs_with_old_events(session, kept_s=30 * DAY_S, limit=limit)
    with database.write() as session:
        for job_id in job_ids:
            repository.drop_old_events(session, job_id, kept_s=30 * DAY_S)
    return len(job_ids)


def test_events_of_jobs_that_ended_long_ago_are_dropped_but_for_how_they_ended(database, hand):
    old, lately, waiting = hand.insert(), hand.insert(), hand.insert()
    end_long_ago(database, old, days=31)
    end_long_ago(database, lately, days=29)
    whole = types_of(database, lately)
    assert whole[-1] == "done"
    assert drop(database) == 1
    assert types_of(database, old) == ["done"]
    assert types_of(database, lately) == whole
    assert types_of(database, waiting) == ["status"]
    assert drop(database) == 0


def test_they_are_dropped_a_few_at_a_time(database, hand):
    for _ in range(3):
        end_long_ago(database, hand.insert(), days=31)
    assert [drop(database, limit=2) for _ in range(3)] == [2, 1, 0]


def test_a_job_that_is_tried_again_meanwhile_keeps_its_events(database, hand):
    job = hand.insert()
    end_long_ago(database, job, days=31)
    whole = types_of(database, job)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job.id).values(finished_at=None))
        repository.drop_old_events(session, job.id, kept_s=30 * DAY_S)
    assert types_of(database, job) == whole


def test_the_stream_of_such_a_job_says_how_it_ended_and_ends(api, api_hand, migrated):
    job = api_hand.insert()
    end_long_ago(migrated, job, days=31)
    drop(migrated)
    stream = api.get(f"/v1/jobs/{job.id}/events", headers={"Accept": "text/event-stream"}).text
    assert stream.count("event: ") == 1
    assert '"status": "cancelled"' in stream.partition("event: done")[2]
