"""Failures: a unit that broke, or whose worker was lost, starts again or fails its job."""

from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.common.errors import JobError, WorkerLost, describe
from service.common.events import EventType, log_data
from service.common.models import Job, Unit
from service.common.repository.claims import Claim, claimed_unit, lock_claimed_job
from service.common.repository.clock import now
from service.common.repository.events import append_event
from service.common.repository.job_row import end_job, lock_job, settle_job
from service.common.repository.units import drop_queued_units, queue_again, unit_context, unit_name
from service.common.status import JobStatus, UnitStatus

RETRY_AFTER_LIMIT_S = 3600.0  # who asks for more patience is asked again after it


def unit_failed(
    session: Session,
    claim: Claim,
    error: JobError,
    *,
    final: bool,
    backoff_s: float,
    backoff_limit_s: float,
    retry_after_s: float | None = None,
) -> Job:
    """Start the unit again after a while or, where that cannot help or was tried often enough, fail the job.

    The while is no shorter than `retry_after_s`, which whoever was busy has asked for.
    """
    job = lock_claimed_job(session, claim)
    unit = claimed_unit(session, claim)
    asked_s = min(retry_after_s or 0.0, RETRY_AFTER_LIMIT_S)
    wait_s = max(_backoff_s(unit, backoff_s, backoff_limit_s), asked_s)
    return _fail_unit(session, job, unit, error, final=final, wait_s=wait_s)


def reap_unit(session: Session, unit_id: str, *, backoff_s: float, backoff_limit_s: float) -> Job | None:
    """Take a unit from the worker that was lost with it; None when it came back meanwhile."""
    job_id = session.scalar(select(Unit.job_id).where(Unit.id == unit_id))
    job = lock_job(session, job_id) if job_id else None
    # its own lock too: a lease is renewed without the job's
    unit = session.get(Unit, unit_id, with_for_update=True, populate_existing=True)
    if job is None or unit is None or unit.status != UnitStatus.RUNNING:
        return None
    if unit.lease_expires_at is not None and unit.lease_expires_at >= now(session):
        return None
    error = describe(
        WorkerLost(f"the worker of {unit_name(unit)} was lost; start {unit.attempt} of {job.max_attempts}")
    )
    return _fail_unit(session, job, unit, error, final=False, wait_s=_backoff_s(unit, backoff_s, backoff_limit_s))


def _backoff_s(unit: Unit, backoff_s: float, backoff_limit_s: float) -> float:
    doubled: float = backoff_s * 2 ** (unit.attempt - 1)
    return min(doubled, backoff_limit_s)


def _fail_unit(session: Session, job: Job, unit: Unit, error: JobError, *, final: bool, wait_s: float) -> Job:
    """Under the job's lock: queue the unit again, or fail it and its job with it."""
    at = now(session)
    data = log_data("unit_failed", error.message, code=error.code, **unit_context(unit))
    append_event(session, job, EventType.LOG, data, at)
    if job.status != JobStatus.RUNNING:
        _stop_unit(unit, UnitStatus.CANCELLED, at)
        session.flush()
        return settle_job(session, job, at)
    if not final and unit.attempt < job.max_attempts:
        queue_again(session, unit, at + timedelta(seconds=wait_s), attempt=unit.attempt)
        return job
    _stop_unit(unit, UnitStatus.FAILED, at)
    session.flush()
    drop_queued_units(session, job, at)
    return end_job(session, job, JobStatus.FAILED, at, error=error.to_dict())


def _stop_unit(unit: Unit, status: UnitStatus, at: datetime) -> None:
    unit.status, unit.finished_at, unit.lease_expires_at = status, at, None
