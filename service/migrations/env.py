"""Alembic's environment: over the database it is handed, or the one the settings name."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import JSON, Enum, text

from service.common.models import Base, UtcDateTime
from service.common.session import Database
from service.common.settings import Settings

MIGRATION_LOCK = 0x68616C66  # "half": any number that nobody else takes


def render_item(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    """Columns as the database sees them: revisions outlive our Python types."""
    match item:
        case UtcDateTime():
            return "sa.DateTime(timezone=True)"
        case Enum():
            return f"sa.String(length={item.length})"
        case JSON():
            return "sa.JSON()"
        case _:
            return False


database: Database = context.config.attributes.get("database") or Database(Settings().database_url)

with database.engine.execution_options(write=True).connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        render_item=render_item,
        transactional_ddl=True,  # on SQLite too: a migration that is cut off leaves nothing
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        context.run_migrations()
