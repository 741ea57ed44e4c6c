"""What has run out: units' leases, other leases, idempotency records, events of jobs that ended long ago."""

from datetime import timedelta

from sqlalchemy import delete, select, tuple_, update
from sqlalchemy.orm import Session

from service.common.events import EventType
from service.common.models import Event, IdempotencyRecord, Job, Lease, Unit
from service.common.repository.clock import now
from service.common.status import UnitStatus


def expired_units(session: Session, *, limit: int = 100) -> list[str]:
    """Running units whose worker has not been heard of for too long."""
    query = select(Unit.id).where(Unit.status == UnitStatus.RUNNING, Unit.lease_expires_at < now(session)).limit(limit)
    return list(session.scalars(query))


def expire_units(session: Session, owner: str) -> None:
    """End the leases of a worker known to be dead; the next round of reaping takes its units."""
    session.execute(
        update(Unit)
        .where(Unit.status == UnitStatus.RUNNING, Unit.lease_owner == owner)
        .values(lease_expires_at=now(session) - timedelta(seconds=1))
    )


def purge(session: Session) -> None:
    """Drop what has run out: idempotency records and leases."""
    at = now(session)
    session.execute(delete(IdempotencyRecord).where(IdempotencyRecord.expires_at <= at))
    session.execute(delete(Lease).where(Lease.expires_at <= at))


def purge_events(session: Session, *, kept_s: float, limit: int) -> int:
    """Drop some events of jobs that ended that long ago; how many. The last one stays, and how a job ended."""
    old = (
        select(Event.job_id, Event.seq)
        .join(Job, Job.id == Event.job_id)
        .where(Job.finished_at < now(session) - timedelta(seconds=kept_s))
        .where(Event.type != EventType.DONE, Event.seq < Job.event_seq)
        .limit(limit)
    )
    found = [tuple(row) for row in session.execute(old)]
    session.execute(delete(Event).where(tuple_(Event.job_id, Event.seq).in_(found)))
    return len(found)
