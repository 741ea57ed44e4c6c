"""Outbox rows on their way to the broker."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, CursorResult, Subquery, func, insert, or_, select, union_all, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.common.models import Job, Outbox, Turn, Unit
from service.common.repository.clock import now
from service.common.status import UnitStatus

ORDER = ("created_at", "job_id", "kind", "index")  # of one owner's units of the same priority


@dataclass(frozen=True)
class Message:
    """All that the broker ever sees."""

    unit_id: str
    dispatch_seq: int


def take_due(session: Session, *, limit: int, redispatch_s: float) -> list[Message]:
    """Mark units as sent, never sent or sent too long ago without a claim; send them after commit.

    The most urgent priority first; of one priority, each owner's turn is the number of units that it has at work or on their
    way, and of those of its own that go before: so a batch of thousands lets a single job of another owner pass. Of owners
    with the same turn goes first who waits for it the longest.
    """
    at = now(session)
    lost = at - timedelta(seconds=redispatch_s)
    due = Outbox.available_at <= at, or_(Outbox.dispatched_at.is_(None), Outbox.dispatched_at < lost)
    ranked = _ranked(due, lost)
    found = session.execute(
        select(Outbox, ranked.c.owner)
        .join(ranked, ranked.c.unit_id == Outbox.unit_id)
        .where(*due)
        .order_by(ranked.c.priority.desc(), *(ranked.c[name] for name in ("turn", "served", "served_at", *ORDER)))
        .limit(limit)
        .with_for_update(of=Outbox, skip_locked=True)
    ).all()
    for row, _ in found:
        row.dispatched_at, row.dispatch_seq = at, row.dispatch_seq + 1
    # in order: of two dispatchers that wait for each other's rows, none would end
    for owner in sorted({owner for _, owner in found}):
        _had_its_turn(session, owner, at)
    return [Message(row.unit_id, row.dispatch_seq) for row, _ in found]


def _had_its_turn(session: Session, owner: str, at: datetime) -> None:
    served = session.execute(update(Turn).where(Turn.owner == owner).values(served_at=at))
    assert isinstance(served, CursorResult)
    if not served.rowcount:
        with suppress(IntegrityError), session.begin_nested():  # another dispatcher was quicker
            session.execute(insert(Turn).values(owner=owner, served_at=at))


def _ranked(due: Iterable[ColumnElement[bool]], lost: datetime) -> Subquery:
    """Due units, with owner, priority, turn and place among those of their owner."""
    places = dict(zip(ORDER, (Job.created_at, Job.id, Unit.kind, Unit.index), strict=True))
    at_work = _at_work(lost)
    before = func.row_number().over(partition_by=Job.owner, order_by=(Job.priority.desc(), *places.values()))
    turn = (before + func.coalesce(at_work.c.n_units, 0)).label("turn")
    served = Turn.served_at.is_not(None).label("served"), Turn.served_at
    columns = (place.label(name) for name, place in places.items())
    return (
        select(Outbox.unit_id, Job.owner, Job.priority, turn, *served, *columns)
        .join(Unit, Unit.id == Outbox.unit_id)
        .join(Job, Job.id == Unit.job_id)
        .outerjoin(at_work, at_work.c.owner == Job.owner)
        .outerjoin(Turn, Turn.owner == Job.owner)
        .where(*due)
        .subquery()
    )


def _at_work(lost: datetime) -> Subquery:
    """By owner, how many units run, or are on their way to a worker."""
    running = select(Job.owner).join(Unit, Unit.job_id == Job.id).where(Unit.status == UnitStatus.RUNNING)
    sent = (
        select(Job.owner)
        .join(Unit, Unit.job_id == Job.id)
        .join(Outbox, Outbox.unit_id == Unit.id)
        .where(Outbox.dispatched_at >= lost)
    )
    both = union_all(running, sent).subquery()
    return select(both.c.owner, func.count().label("n_units")).group_by(both.c.owner).subquery()


def give_back(session: Session, message: Message) -> None:
    """The broker did not take it: it is due again at once."""
    session.execute(
        update(Outbox)
        .where(Outbox.unit_id == message.unit_id, Outbox.dispatch_seq == message.dispatch_seq)
        .values(dispatched_at=None)
    )
