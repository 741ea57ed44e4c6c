import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from sqlalchemy import select

from hqq_core.errors import Cancelled
from service.common import repository
from service.common.models import Unit
from service.common.queue import KEY_PREFIX
from tests.worker.conftest import Foreman
from worker.heartbeat import Heartbeat, Stop
from worker.workplace import Workplace

UNACKED = KEY_PREFIX + "unacked_index"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def leased_until(workplace: Workplace, unit_id: str) -> float:
    with workplace.database.read() as session:
        expires_at = session.scalars(select(Unit.lease_expires_at).where(Unit.id == unit_id)).one()
    assert expires_at is not None
    return expires_at.timestamp()


def test_lease_and_progress_are_written(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    foreman.run_next()
    claim = foreman.claim_next(lease_s=1)
    before = leased_until(workplace, claim.unit_id)
    with Heartbeat(workplace, claim, leaving=threading.Event()) as heartbeat:
        wait_for(lambda: leased_until(workplace, claim.unit_id) > before + 30)
        heartbeat.progress(1000)
        wait_for(lambda: foreman.get(job).nbytes_done == 1000)
        assert heartbeat.stop is None


def test_unit_stops_when_its_job_is_cancelled(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    claim = foreman.claim_next()
    with Heartbeat(workplace, claim, leaving=threading.Event()) as heartbeat:
        heartbeat.progress(1)
        foreman.cancel(job)
        wait_for(lambda: heartbeat.stop is Stop.JOB_OVER)
        with pytest.raises(Cancelled, match="no longer running"):
            heartbeat.progress(2)


def test_unit_stops_when_it_was_taken_over(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    foreman.submit(source)
    claim = foreman.claim_next()
    with Heartbeat(workplace, claim, leaving=threading.Event()) as heartbeat:
        with workplace.database.write() as session:
            repository.expire_units(session, claim.owner)
            repository.reap_unit(session, claim.unit_id, backoff_s=0, backoff_limit_s=0)
        wait_for(lambda: heartbeat.stop is Stop.LEASE_LOST)


def test_unit_stops_by_itself_when_the_database_is_silent_for_a_lease(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    def unreachable(*arguments: object, **options: object) -> None:
        raise OperationalError("SELECT 1", {}, Exception("no route"))

    foreman.submit(source)
    claim = foreman.claim_next()
    heartbeat = Heartbeat(workplace, claim, leaving=threading.Event())
    heartbeat._settings = workplace.settings.model_copy(update={"lease_s": 0.2})
    for name in ("get_job", "renew_lease", "save_progress"):
        monkeypatch.setattr(repository, name, unreachable)
    with heartbeat:
        wait_for(lambda: heartbeat.stop is Stop.LEASE_LOST)


@pytest.mark.parametrize("lease_s", [0.2, 60])
def test_unexpected_error_ends_no_heartbeat_and_only_the_lease_decides(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch, lease_s: float
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no new thread")

    job = foreman.submit(source)
    claim = foreman.claim_next()
    heartbeat = Heartbeat(workplace, claim, leaving=threading.Event())
    heartbeat._settings = workplace.settings.model_copy(update={"lease_s": lease_s})
    with heartbeat:
        with monkeypatch.context() as patched:
            for name in ("get_job", "renew_lease", "save_progress"):
                patched.setattr(repository, name, broken)
            time.sleep(0.4)
        foreman.cancel(job)
        wait_for(lambda: heartbeat.stop)
    assert heartbeat.stop is (Stop.LEASE_LOST if lease_s < 1 else Stop.JOB_OVER)


def test_unit_stops_when_its_worker_leaves(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    foreman.submit(source)
    leaving = threading.Event()
    with Heartbeat(workplace, foreman.claim_next(), leaving=leaving) as heartbeat:
        heartbeat.progress(1)
        leaving.set()
        with pytest.raises(Cancelled, match="its worker has to go"):
            heartbeat.progress(2)


def test_message_is_renewed_where_it_is_still_out(
    foreman: Foreman, workplace: Workplace, source: Path, redis_url: str
) -> None:
    foreman.submit(source)
    claim = foreman.claim_next()
    with redis.Redis.from_url(redis_url) as broker:
        broker.zadd(UNACKED, {"mine": 1})
        with Heartbeat(workplace, claim, leaving=threading.Event(), delivery_tag="mine"):
            wait_for(lambda: (broker.zscore(UNACKED, "mine") or 0) > time.time() - 60)
        broker.delete(UNACKED)
        with Heartbeat(workplace, claim, leaving=threading.Event(), delivery_tag="mine"):
            time.sleep(0.3)
        assert not broker.exists(UNACKED), "an acknowledged message does not come back"
