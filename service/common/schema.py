"""The database's schema: bring it to head, or refuse to start below it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import OperationalError

from service.common.errors import NotMigrated, Unavailable
from service.common.session import Database


def migrate(database: Database, revision: str = "head") -> None:
    """Upgrade to the revision; safe where several start at once. Unavailable where the database does not answer."""
    with _answering():
        command.upgrade(_config(database), revision)


def downgrade(database: Database, revision: str) -> None:
    command.downgrade(_config(database), revision)


def check_head(database: Database) -> None:
    """NotMigrated unless the schema is the one this code was written for; Unavailable where the database does not answer."""
    head = ScriptDirectory.from_config(_config(database)).get_current_head()
    with _answering(), database.engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    if current != head:
        raise NotMigrated(f"the database is at revision {current}, this version needs {head}: run `halfquad migrate`")


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise Unavailable(f"the database does not answer: {error.orig}") from error


def _config(database: Database) -> Config:
    config = Config()
    # the folder by name: nothing below the web imports it
    config.set_main_option("script_location", str(Path(__file__).parents[1] / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["database"] = database
    return config
