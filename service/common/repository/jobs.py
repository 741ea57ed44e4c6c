"""What a user does to a job: submit, get, cancel, and have its files removed."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.common.errors import JobTerminal, NotFound
from service.common.events import EventType, status_data
from service.common.models import Job, Unit, new_id
from service.common.repository.clock import now
from service.common.repository.events import append_event
from service.common.repository.job_row import end_job, find_job, lock_job, move_job, settle_job
from service.common.repository.units import ShardWork, drop_queued_units, insert_units
from service.common.status import DISCARDED, JobStatus, UnitKind, UnitStatus


def insert_job(
    session: Session,
    *,
    source: dict[str, Any],
    recipes: Sequence[dict[str, Any]],
    labels: dict[str, str],
    priority: int,
    max_attempts: int,
) -> Job:
    """A queued job, its plan unit, its way to the broker and its first event."""
    at = now(session)
    job = Job(
        id=new_id("job"),
        status=JobStatus.QUEUED,
        phase=None,
        version=1,
        event_seq=0,
        source=source,
        recipes=list(recipes),
        labels=labels,
        priority=priority,
        attempt=0,
        max_attempts=max_attempts,
        nbytes_done=0,
        nbytes_total=None,
        created_at=at,
        updated_at=at,
        queued_at=at,
    )
    session.add(job)
    session.flush()
    insert_units(session, job, UnitKind.PLAN, [ShardWork(0, 0)], at)
    append_event(session, job, EventType.STATUS, status_data(job), at)
    return job


def get_job(session: Session, job_id: str) -> Job:
    job = find_job(session, job_id)
    if job is None:
        raise NotFound("job_not_found", f"there is no job {job_id!r}")
    return job


def cancel_job(session: Session, job_id: str) -> Job:
    """Stop what has not begun; a running unit sees the status and stops itself."""
    job = find_job(session, job_id) and lock_job(session, job_id)
    if job is None:
        raise NotFound("job_not_found", f"there is no job {job_id!r}")
    if job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED):
        return job
    if job.is_terminal:
        raise JobTerminal(f"the job has already {job.status}")
    at = now(session)
    drop_queued_units(session, job, at)
    if job.status == JobStatus.QUEUED:
        return end_job(session, job, JobStatus.CANCELLED, at)
    job = move_job(session, job, JobStatus.CANCELLING, at)
    return settle_job(session, job, at)


def discarded_jobs(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Those of the jobs whose files are to go and that nobody works on any more."""
    busy = select(Unit.job_id).where(Unit.status == UnitStatus.RUNNING)
    return set(
        session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.status.in_(DISCARDED), Job.id.not_in(busy)))
    )
