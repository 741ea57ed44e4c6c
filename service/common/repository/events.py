"""The events of a job, numbered without a gap; old ones are dropped (expiry.py)."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.common.events import EventType
from service.common.models import Event, Job
from service.common.repository.clock import now

JOBS_AT_ONCE = 1000  # in one query


def append_event(
    session: Session, job: Job, type: EventType, data: dict[str, Any], at: datetime | None = None
) -> Event:
    """The job's next event; the counter on its row leaves no gap and holds back the next writer until we commit."""
    seq = session.scalars(
        update(Job).where(Job.id == job.id).values(event_seq=Job.event_seq + 1).returning(Job.event_seq),
        execution_options={"synchronize_session": False},
    ).one()
    event = Event(job_id=job.id, seq=seq, type=type, data=data, created_at=at or now(session))
    session.add(event)
    return event


def list_events(session: Session, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
    query = select(Event).where(Event.job_id == job_id, Event.seq > after).order_by(Event.seq).limit(limit)
    return list(session.scalars(query))


def event_seqs(session: Session, job_ids: Sequence[str]) -> dict[str, int]:
    """By job, the number of its last event."""
    found: dict[str, int] = {}
    for start in range(0, len(job_ids), JOBS_AT_ONCE):
        query = select(Job.id, Job.event_seq).where(Job.id.in_(job_ids[start : start + JOBS_AT_ONCE]))
        found.update((row.id, row.event_seq) for row in session.execute(query))
    return found
