"""One clock for all: it stands still until a rule moves it, and no worker has a right one of its own."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import event, text

from service.common.session import Database

START = datetime(2030, 1, 1, tzinfo=UTC)
OWN = """
CREATE SCHEMA machine;
CREATE TABLE machine.clock (at timestamptz);
INSERT INTO machine.clock VALUES (now());
CREATE FUNCTION machine.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT at FROM machine.clock'
"""


def seconds(at: datetime | None) -> float | None:
    """Since the start of a walk."""
    return at and (at - START).total_seconds()


class Clock:
    """What `repository.now` reads: of SQLite this process's `datetime`, of PostgreSQL a `clock_timestamp()` put before its own.

    So with PostgreSQL `now()` is what a worker's own clock would say: off by `skew_s`, and nothing may depend on it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._postgres = database.engine.dialect.name == "postgresql"
        if self._postgres:
            event.listen(database.engine, "connect", _put_before)
            self._execute(OWN)

    def set(self, at: int) -> None:
        self.at = at
        self.skew_s = 0
        if self._postgres:
            self._execute("UPDATE machine.clock SET at = :at", at=START + timedelta(seconds=at))

    def move(self, by_s: int) -> None:
        skew_s = self.skew_s
        self.set(self.at + by_s)
        self.skew_s = skew_s

    def now(self, zone: object) -> datetime:
        """In the place of `datetime.now`."""
        assert zone is UTC
        return START + timedelta(seconds=self.at + (self.skew_s if self._postgres else 0))

    def close(self) -> None:
        if self._postgres:
            self._execute("DROP SCHEMA machine CASCADE")

    def _execute(self, commands: str, **values: object) -> None:
        with self._database.engine.begin() as connection:
            for command in commands.split(";"):
                connection.execute(text(command), values)


def _put_before(connection: object, _record: object) -> None:
    connection.autocommit = True
    connection.execute("SET search_path TO machine, pg_catalog, public")
    connection.autocommit = False
