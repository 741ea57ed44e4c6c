"""Outbox rows on their way to the broker."""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from service.common.models import Job, Outbox, Unit
from service.common.repository.clock import now


@dataclass(frozen=True)
class Message:
    """All that the broker ever sees."""

    unit_id: str
    dispatch_seq: int


def take_due(session: Session, *, limit: int, redispatch_s: float) -> list[Message]:
    """Mark the most urgent units as sent, never sent or sent too long ago without a claim; send them after commit."""
    at = now(session)
    lost = at - timedelta(seconds=redispatch_s)
    due = session.scalars(
        select(Outbox)
        .join(Unit, Unit.id == Outbox.unit_id)
        .join(Job, Job.id == Unit.job_id)
        .where(Outbox.available_at <= at, or_(Outbox.dispatched_at.is_(None), Outbox.dispatched_at < lost))
        .order_by(Job.priority.desc(), Job.created_at, Job.id, Unit.kind, Unit.index)
        .limit(limit)
        .with_for_update(of=Outbox, skip_locked=True)
    ).all()
    for row in due:
        row.dispatched_at, row.dispatch_seq = at, row.dispatch_seq + 1
    return [Message(row.unit_id, row.dispatch_seq) for row in due]


def give_back(session: Session, message: Message) -> None:
    """The broker did not take it: it is due again at once."""
    session.execute(
        update(Outbox)
        .where(Outbox.unit_id == message.unit_id, Outbox.dispatch_seq == message.dispatch_seq)
        .values(dispatched_at=None)
    )
