"""Progress: how far a unit is, added up on its job."""

from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.common.events import EventType
from service.common.models import Job, Unit
from service.common.repository.claims import Claim, change_unit, lock_claimed_job
from service.common.repository.clock import now
from service.common.repository.events import append_event
from service.common.repository.job_row import change_job
from service.common.status import JobStatus, UnitKind


def save_progress(session: Session, claim: Claim, nbytes_done: int, *, lease_s: float) -> JobStatus:
    """Write how far the unit is and renew its lease; an event for every whole percent of the phase."""
    job = lock_claimed_job(session, claim)
    at = now(session)
    change_unit(session, claim, nbytes_done=nbytes_done, lease_expires_at=at + timedelta(seconds=lease_s))
    if job.status == JobStatus.RUNNING:
        count_progress(session, job, claim.kind, at)
    return job.status


def count_progress(session: Session, job: Job, kind: UnitKind, at: datetime) -> Job:
    """Add up the phase's units on the job row. It stays where a unit that started again has to catch up."""
    summed = select(func.sum(Unit.nbytes_done)).where(Unit.job_id == job.id, Unit.kind == kind)
    nbytes_done = int(session.scalar(summed) or 0)
    if nbytes_done <= job.nbytes_done:
        return job
    seen = _percent(job)
    job = change_job(session, job, at, nbytes_done=nbytes_done)
    if _percent(job) > seen:
        append_event(session, job, EventType.PROGRESS, job.progress or {}, at)
    return job


def _percent(job: Job) -> int:
    return 100 * job.nbytes_done // job.nbytes_total if job.nbytes_total else 0
