"""Leases on what only one may hold; and, as `worker:<name>`, who is there."""

from datetime import timedelta

from sqlalchemy import CursorResult, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.common.models import Lease
from service.common.repository.clock import now

WORKER_LEASE = "worker:"


def take_lease(session: Session, name: str, owner: str, *, ttl_s: float) -> bool:
    """Take or renew what only one may hold."""
    at = now(session)
    expires_at = at + timedelta(seconds=ttl_s)
    taken = session.execute(
        update(Lease)
        .where(Lease.name == name, or_(Lease.owner == owner, Lease.expires_at < at))
        .values(owner=owner, expires_at=expires_at)
    )
    assert isinstance(taken, CursorResult)
    if taken.rowcount:
        return True
    try:
        with session.begin_nested():
            session.execute(insert(Lease).values(name=name, owner=owner, expires_at=expires_at))
    except IntegrityError:
        return False
    return True


def drop_lease(session: Session, name: str, owner: str) -> None:
    session.execute(delete(Lease).where(Lease.name == name, Lease.owner == owner))


def worker_seen(session: Session, name: str, *, ttl_s: float) -> None:
    """A worker says that it is there."""
    take_lease(session, WORKER_LEASE + name, name, ttl_s=ttl_s)


def worker_left(session: Session, name: str) -> None:
    """A worker says goodbye."""
    drop_lease(session, WORKER_LEASE + name, name)


def workers_online(session: Session) -> int:
    query = select(func.count()).where(Lease.name.startswith(WORKER_LEASE), Lease.expires_at > now(session))
    return session.scalars(query).one()
