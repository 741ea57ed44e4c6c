"""What has run out: units' leases, other leases, idempotency records, events of jobs that ended long ago."""

from datetime import timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from service.common.events import EventType
from service.common.models import Event, IdempotencyRecord, Job, Lease, Turn, Unit
from service.common.repository.clock import now
from service.common.status import UnitStatus

TURNS_KEPT = timedelta(days=1)


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
    """Drop what has run out: idempotency records, leases, and turns of owners who have long had none."""
    at = now(session)
    session.execute(delete(IdempotencyRecord).where(IdempotencyRecord.expires_at <= at))
    session.execute(delete(Lease).where(Lease.expires_at <= at))
    session.execute(delete(Turn).where(Turn.served_at <= at - TURNS_KEPT))


def jobs_with_old_events(session: Session, *, kept_s: float, limit: int) -> list[str]:
    """Some of the jobs that ended that long ago and have more events than `drop_old_events` leaves."""
    more = select(Event.seq).where(Event.job_id == Job.id, Event.seq < Job.event_seq, Event.type != EventType.DONE)
    ended = now(session) - timedelta(seconds=kept_s)
    return list(session.scalars(select(Job.id).where(Job.finished_at < ended, more.exists()).limit(limit)))


def drop_old_events(session: Session, job_id: str, *, kept_s: float) -> None:
    """Of a job that ended that long ago, all events but the last, and those that say how it ended."""
    ended = now(session) - timedelta(seconds=kept_s)
    last = session.scalar(select(Job.event_seq).where(Job.id == job_id, Job.finished_at < ended))
    if last is not None:
        session.execute(delete(Event).where(Event.job_id == job_id, Event.seq < last, Event.type != EventType.DONE))
