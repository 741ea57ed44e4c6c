import threading

import pytest
from sqlalchemy import text

from service.common.models import Lease
from service.common.repository import now
from service.common.session import Database


def test_sqlite_is_durable_and_checks_keys(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/below/halfquad.db")
    with database.read() as session:
        pragmas = {
            name: session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    database.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    assert (tmp_path / "below").stat().st_mode & 0o777 == 0o700


def test_failed_write_leaves_nothing(database):
    def fail_half_way():
        with database.write() as session:
            session.add(Lease(name="a", owner="b", expires_at=now(session)))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    with database.read() as session:
        assert session.get(Lease, "a") is None


def test_readers_do_not_wait_for_a_writer(database, hand):
    job = hand.insert()
    with database.write() as session:
        session.execute(text("UPDATE jobs SET priority = 9"))
        assert hand.get(job).priority == 5
    assert hand.get(job).priority == 9


def test_writers_wait_for_each_other(database, hand):
    job = hand.insert()

    def count_up():
        for _ in range(20):
            with database.write() as session:
                session.execute(text("UPDATE jobs SET priority = priority + 1"))

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hand.get(job).priority == 5 + 80
