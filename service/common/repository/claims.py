"""Claims: a unit is ours until its lease runs out; what is no longer ours raises LeaseLost."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, and_, delete, func, select, update
from sqlalchemy.orm import Session

from service.common.errors import LeaseLost
from service.common.events import EventType, log_data
from service.common.models import Job, Outbox, Unit
from service.common.repository.clock import now
from service.common.repository.events import append_event
from service.common.repository.job_row import change_job, lock_job, move_job
from service.common.repository.units import unit_context, unit_name
from service.common.status import JobStatus, Phase, UnitKind, UnitStatus


@dataclass(frozen=True)
class Claim:
    """A unit that is ours until its lease runs out; every write names its fence."""

    unit_id: str
    job_id: str
    kind: UnitKind
    index: int
    attempt: int
    fence: int
    owner: str
    source: dict[str, Any]
    recipes: list[dict[str, Any]]
    target: dict[str, Any] | None


def claim_unit(session: Session, unit_id: str, *, owner: str, lease_s: float) -> Claim | None:
    """Make a queued unit ours; None when it is not there to be had, and then there is nothing to do."""
    job_id = session.scalar(select(Unit.job_id).where(Unit.id == unit_id))
    job = lock_job(session, job_id) if job_id else None
    if job is None:
        return None
    at = now(session)
    unit = session.scalars(
        update(Unit)
        .where(
            Unit.id == unit_id,
            Unit.status == UnitStatus.QUEUED,
            Unit.available_at <= at,
            Unit.job_id.in_(select(Job.id).where(Job.status.in_((JobStatus.QUEUED, JobStatus.RUNNING)))),
        )
        .values(
            status=UnitStatus.RUNNING,
            attempt=Unit.attempt + 1,
            fence=Unit.fence + 1,
            lease_owner=owner,
            lease_expires_at=at + timedelta(seconds=lease_s),
            nbytes_done=0,
            started_at=func.coalesce(Unit.started_at, at),
        )
        .returning(Unit),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).one_or_none()
    if unit is None:
        return None
    session.execute(delete(Outbox).where(Outbox.unit_id == unit.id))
    if job.status == JobStatus.QUEUED:
        job = move_job(session, job, JobStatus.RUNNING, at, phase=Phase.PREFLIGHT, started_at=at)
    if unit.attempt > job.attempt:
        job = change_job(session, job, at, attempt=unit.attempt)
    data = log_data("unit_claimed", f"{unit_name(unit)} taken", **unit_context(unit), worker=owner)
    append_event(session, job, EventType.LOG, data, at)
    return Claim(
        unit.id,
        unit.job_id,
        unit.kind,
        unit.index,
        unit.attempt,
        unit.fence,
        owner,
        dict(job.source),
        list(job.recipes),
        job.target and dict(job.target),
    )


def renew_lease(session: Session, claim: Claim, *, lease_s: float) -> JobStatus:
    """Keep the unit ours; the job's status says whether to go on. LeaseLost when it is no longer ours."""
    at = now(session)
    change_unit(session, claim, lease_expires_at=at + timedelta(seconds=lease_s))
    return session.scalars(select(Job.status).where(Job.id == claim.job_id)).one()


def lock_claimed_job(session: Session, claim: Claim) -> Job:
    job = lock_job(session, claim.job_id)
    if job is None:
        raise LeaseLost(f"{claim.job_id} is gone")
    return job


def claimed_unit(session: Session, claim: Claim) -> Unit:
    unit = session.scalars(
        select(Unit).where(_held(claim)), execution_options={"populate_existing": True}
    ).one_or_none()
    if unit is None:
        raise LeaseLost(f"start {claim.attempt} of unit {claim.unit_id} has been taken over")
    return unit


def change_unit(session: Session, claim: Claim, **values: Any) -> None:
    """Write to the unit where it is still ours."""
    changed = session.execute(
        update(Unit).where(_held(claim)).values(**values), execution_options={"synchronize_session": False}
    )
    assert isinstance(changed, CursorResult)
    if changed.rowcount != 1:
        raise LeaseLost(f"start {claim.attempt} of unit {claim.unit_id} has been taken over")


def end_unit(session: Session, claim: Claim, status: UnitStatus, **values: Any) -> tuple[Job, datetime]:
    """End our unit; the job, locked, and the time of it."""
    job = lock_claimed_job(session, claim)
    at = now(session)
    change_unit(session, claim, status=status, finished_at=at, lease_expires_at=None, **values)
    return job, at


def _held(claim: Claim) -> ColumnElement[bool]:
    return and_(Unit.id == claim.unit_id, Unit.fence == claim.fence, Unit.status == UnitStatus.RUNNING)
