"""The database's clock, and whether it is there."""

from datetime import UTC, datetime

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from service.common.models import UtcDateTime


def now(session: Session) -> datetime:
    """The database's clock: the one that all machines share."""
    if session.get_bind().dialect.name == "sqlite":
        return datetime.now(UTC)
    return session.scalars(select(func.clock_timestamp(type_=UtcDateTime()))).one()


def ping(session: Session) -> None:
    session.execute(text("SELECT 1"))
