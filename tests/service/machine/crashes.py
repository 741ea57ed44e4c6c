"""Crashes: a process dies in the middle of a transaction, at its commit, or before it hears that it was committed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from service.common.session import Database

UNHEARD = -1


class Crash(Exception):
    """The process is gone."""


class Crashes:
    """Lets the next transaction end at its write number `fate`, at its commit if it has fewer, or unheard after it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.fate: int | None = None
        self._n_writes_left: int | None = None
        event.listen(database.engine, "before_cursor_execute", self._look)

    @contextmanager
    def write(self) -> Iterator[Session]:
        """As `Database.write`, but for the fate, which is spent with it."""
        fate, self.fate = self.fate, None
        self._n_writes_left = None if fate in (None, UNHEARD) else fate
        try:
            with self.database.write() as session:
                yield session
                session.flush()
                if self._n_writes_left is not None:
                    raise Crash
        finally:
            self._n_writes_left = None

    def _look(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if self._n_writes_left is None or not statement.startswith(("INSERT", "UPDATE", "DELETE")):
            return
        if self._n_writes_left == 0:
            raise Crash
        self._n_writes_left -= 1

    def close(self) -> None:
        event.remove(self.database.engine, "before_cursor_execute", self._look)
