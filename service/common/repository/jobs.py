"""What a user does to a job: submit, get, cancel, retry, and have its files removed."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import null, or_, select
from sqlalchemy.orm import Session

from service.common.errors import JobNotRetryable, JobTerminal, NotFound
from service.common.events import EventType, status_data
from service.common.models import DEFAULT_OWNER, Job, Unit, new_id
from service.common.repository.clock import now
from service.common.repository.events import append_event
from service.common.repository.job_row import end_job, find_job, lock_job, move_job, settle_job
from service.common.repository.units import ShardWork, drop_queued_units, insert_units, queue_again
from service.common.status import DISCARDED, JobStatus, Phase, UnitKind, UnitStatus


def insert_job(
    session: Session,
    *,
    source: dict[str, Any],
    recipes: Sequence[dict[str, Any]],
    target: dict[str, Any] | None = None,
    labels: dict[str, str],
    owner: str = DEFAULT_OWNER,
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
        target=target,
        labels=labels,
        owner=owner,
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
    job = _lock(session, job_id)
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


def retry_upload(session: Session, job_id: str, *, target: dict[str, Any] | None = None) -> Job:
    """Begin the upload of a whole result again after it has failed, to another target where one is given."""
    job = _lock(session, job_id)
    failed = select(Unit).where(Unit.job_id == job_id, Unit.kind == UnitKind.PUSH, Unit.status == UnitStatus.FAILED)
    unit = session.scalars(failed, execution_options={"populate_existing": True}).one_or_none()
    if job.status != JobStatus.FAILED or unit is None:
        raise JobNotRetryable(f"the job is {job.status}: only one whose upload has failed can be retried")
    at = now(session)
    unit.finished_at, unit.nbytes_done = None, 0
    queue_again(session, unit, at, attempt=0)
    return move_job(
        session,
        job,
        JobStatus.RUNNING,
        at,
        phase=Phase.UPLOADING,
        target=target or job.target,
        error=None,
        nbytes_done=0,
        finished_at=None,
    )


def discarded_jobs(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Those of the jobs whose files are to go and that nobody works on any more."""
    busy = select(Unit.job_id).where(Unit.status == UnitStatus.RUNNING)
    lost = or_(Job.status == JobStatus.CANCELLED, Job.result.is_(null()))
    gone = select(Job.id).where(Job.id.in_(job_ids), Job.status.in_(DISCARDED), lost, Job.id.not_in(busy))
    return set(session.scalars(gone))


def ended_lately(session: Session, since_s: float) -> list[str]:
    """Failed and cancelled jobs that have ended within so many seconds."""
    at = now(session)
    query = select(Job.id).where(Job.status.in_(DISCARDED), Job.finished_at > at - timedelta(seconds=since_s))
    return list(session.scalars(query))


def _lock(session: Session, job_id: str) -> Job:
    job = find_job(session, job_id) and lock_job(session, job_id)
    if job is None:
        raise NotFound("job_not_found", f"there is no job {job_id!r}")
    return job
