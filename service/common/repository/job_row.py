"""One job's row: found, locked, and changed along the table of status.py."""

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from service.common.errors import StaleJob
from service.common.events import EventType, done_data, status_data
from service.common.models import JOB_ID, Job, Unit
from service.common.repository.events import append_event
from service.common.status import JobStatus, Phase, UnitStatus, leading_to


def find_job(session: Session, job_id: str) -> Job | None:
    """The job of an id that a user wrote: PostgreSQL refuses some strings."""
    return session.get(Job, job_id) if JOB_ID.fullmatch(job_id) else None


def lock_job(session: Session, job_id: str) -> Job | None:
    # SQLite has no FOR UPDATE: there, write() has locked the whole file
    return session.get(Job, job_id, with_for_update=True, populate_existing=True)


def change_job(session: Session, job: Job, at: datetime, *conditions: ColumnElement[bool], **values: Any) -> Job:
    """Compare-and-set: the job as changed, one version on."""
    changed = session.scalars(
        update(Job)
        .where(Job.id == job.id, Job.version == job.version, *conditions)
        .values(version=Job.version + 1, updated_at=at, **values)
        .returning(Job),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).one_or_none()
    if changed is None:
        raise StaleJob(f"{job.id} is no longer {job.status} at version {job.version}")
    return changed


def move_job(session: Session, job: Job, to: JobStatus, at: datetime, **values: Any) -> Job:
    """Move along the table of status.py, and say so."""
    job = change_job(session, job, at, Job.status.in_(leading_to(to)), status=to, **values)
    append_event(session, job, EventType.STATUS, status_data(job), at)
    return job


def end_job(session: Session, job: Job, to: JobStatus, at: datetime, **values: Any) -> Job:
    job = move_job(session, job, to, at, finished_at=at, **values)
    append_event(session, job, EventType.DONE, done_data(job), at)
    return job


def enter_phase(session: Session, job: Job, phase: Phase, nbytes_total: int, at: datetime, **values: Any) -> Job:
    job = change_job(session, job, at, phase=phase, nbytes_done=0, nbytes_total=nbytes_total, **values)
    append_event(session, job, EventType.STATUS, status_data(job), at)
    return job


def settle_job(session: Session, job: Job, at: datetime) -> Job:
    """A job being cancelled is cancelled once the last of its units has stopped."""
    running = select(Unit.id).where(Unit.job_id == job.id, Unit.status == UnitStatus.RUNNING).limit(1)
    if job.status != JobStatus.CANCELLING or session.scalar(running) is not None:
        return job
    return end_job(session, job, JobStatus.CANCELLED, at, result=None)  # one that waited for its upload goes too
