"""A job's units as rows: made, queued again, dropped; each queued one with its outbox row."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, delete, select, update
from sqlalchemy.orm import Session

from service.common.models import Job, Outbox, Unit, new_id
from service.common.status import UnitKind, UnitStatus


@dataclass(frozen=True)
class ShardWork:
    """A shard of a plan, as its unit is made."""

    index: int
    nbytes: int


def insert_units(session: Session, job: Job, kind: UnitKind, work: Iterable[ShardWork], at: datetime) -> None:
    units = [
        Unit(
            id=new_id("unit"),
            job_id=job.id,
            kind=kind,
            index=shard.index,
            status=UnitStatus.QUEUED,
            attempt=0,
            fence=0,
            available_at=at,
            nbytes_total=shard.nbytes,
            nbytes_done=0,
            nbytes_out=0,
        )
        for shard in work
    ]
    session.add_all(units)
    session.flush()
    session.add_all([Outbox(unit_id=unit.id, dispatch_seq=0, available_at=at) for unit in units])


def queue_again(session: Session, unit: Unit, available_at: datetime, *, attempt: int) -> None:
    unit.status, unit.attempt, unit.available_at = UnitStatus.QUEUED, attempt, available_at
    unit.lease_owner = unit.lease_expires_at = None
    session.add(Outbox(unit_id=unit.id, dispatch_seq=0, available_at=available_at))
    session.flush()


def drop_queued_units(session: Session, job: Job, at: datetime) -> None:
    queued = and_(Unit.job_id == job.id, Unit.status == UnitStatus.QUEUED)
    session.execute(delete(Outbox).where(Outbox.unit_id.in_(select(Unit.id).where(queued))))
    session.execute(update(Unit).where(queued).values(status=UnitStatus.CANCELLED, finished_at=at))


def queued_shards(session: Session, job_id: str) -> list[int]:
    """Indexes of the shards that nobody has begun, in the order of the plan."""
    waiting = (Unit.job_id == job_id, Unit.kind == UnitKind.SHARD, Unit.status == UnitStatus.QUEUED)
    return list(session.scalars(select(Unit.index).where(*waiting).order_by(Unit.index)))


def unit_name(unit: Unit) -> str:
    return f"shard {unit.index}" if unit.kind == UnitKind.SHARD else f"the {unit.kind} step"


def unit_context(unit: Unit) -> dict[str, Any]:
    return {"unit": unit.kind, "index": unit.index, "attempt": unit.attempt}
