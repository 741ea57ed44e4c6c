"""What a key was answered with."""

from typing import Any

from sqlalchemy import update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.common.errors import IdempotencyBusy
from service.common.models import IdempotencyRecord
from service.common.repository.clock import now


def find_idempotency(session: Session, key: str, method: str, path: str) -> IdempotencyRecord | None:
    """The key's record, unless it has expired: then it goes."""
    record = session.get(IdempotencyRecord, (key, method, path), with_for_update=True, populate_existing=True)
    if record is not None and record.expires_at <= now(session):
        session.delete(record)
        session.flush()
        return None
    return record


def insert_idempotency(session: Session, record: IdempotencyRecord) -> None:
    """Remember the answer; IdempotencyBusy, and nothing of the transaction stays, when the same key was faster."""
    session.add(record)
    try:
        session.flush()
    except IntegrityError as error:
        raise IdempotencyBusy("a request with this key is being answered", retry_after_s=1) from error


def settle_idempotency(
    session: Session, key: str, method: str, path: str, *, status_code: int, body: dict[str, Any]
) -> None:
    """The request that waited has its answer."""
    session.execute(
        update(IdempotencyRecord)
        .where(IdempotencyRecord.key == key, IdempotencyRecord.method == method, IdempotencyRecord.path == path)
        .values(status_code=status_code, body=body, busy_until=None)
    )
