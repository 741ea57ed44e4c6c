"""Databases whose clock is the walk's."""

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import event

from service.common.repository import clock as repository_clock
from service.common.session import Database
from tests.service.machine.clock import Clock
from tests.service.machine.crashes import Crashes
from tests.service.machine.driver import Driver


@pytest.fixture
def new_driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Driver]]:
    """Begins with no rows each time, on the kind of database that the test names."""
    migrated = request.getfixturevalue("migrated" if request.param == "sqlite" else "postgres_database")
    database = Database(migrated.url)  # with listeners of its own
    if request.param == "sqlite":
        event.listen(database.engine, "connect", _be_quick)
    clock, crashes = Clock(database), Crashes(database)
    monkeypatch.setattr(repository_clock, "datetime", clock)
    yield lambda: Driver(database, clock, crashes)
    Driver(database, clock, crashes)
    crashes.close()
    clock.close()
    database.close()


def _be_quick(connection: object, _record: object) -> None:
    """Nobody cuts the power; the PostgreSQL of the tests has no fsync either."""
    connection.execute("PRAGMA synchronous=OFF")
