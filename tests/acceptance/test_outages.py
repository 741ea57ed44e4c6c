"""What is broken for a while: it is said, nothing that was accepted is lost, and work goes on by itself afterwards."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from hqq_core.convert import quantize_checkpoint
from hqq_core.recipe import Recipe
from service.client.errors import ServerError
from tests.acceptance.conftest import RECIPE, Installation, command_line, is_worker, kill, wait_until
from tests.checkpoints import jobless_bytes, save_llama
from worker.embedded import broker_child

OUTAGE_S = 4.0  # longer than a lease is renewed, and than messages are sent again


class OwnBroker:
    """A broker that a test may take away."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "broker.sock"
        self._child = broker_child(folder / "valkey", self.socket)

    def start(self) -> None:
        self._child.start()

    def stop(self) -> None:
        assert self._child.process is not None
        self._child.process.kill()
        self._child.process.wait()


@pytest.fixture
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnBroker]:
    broker = OwnBroker(tmp_path_factory.mktemp("b"))
    broker.start()
    yield broker
    broker.stop()


def checks(installation: Installation) -> dict[str, bool]:
    return {name: check["ok"] for name, check in installation.http.get("/readyz").json()["checks"].items()}


def test_unit_that_kills_its_worker_three_times_fails_its_job_alone(
    embedded: Installation, models: Path, whole: Path
) -> None:
    embedded.start()
    worker = next(pid for pid in embedded.pids() if is_worker(command_line(pid)))
    job_id = embedded.client.submit(whole, RECIPE)["id"]
    for start in (1, 2, 3):
        wait_until(lambda start=start: len(embedded.claims(job_id)) == start, 60, embedded.log_tail)
        kill(next(pid for pid in embedded.pids() if "billiard.spawn" in command_line(pid)))
    wait_until(lambda: embedded.client.get(job_id)["status"] == "failed", 30, embedded.log_tail)
    error = embedded.client.get(job_id)["error"]
    assert error["code"] == "worker_lost"
    assert "shard 0" in error["message"]
    assert "start 3 of 3" in error["message"]
    wait_until(lambda: not embedded.output(job_id).parent.exists(), 5, "its files to go")
    embedded.wait_succeeded(embedded.client.submit(save_llama(models / "after-poison"), RECIPE)["id"])
    assert worker in embedded.pids(), "the worker has lived on"


def test_what_is_submitted_while_the_broker_is_away_is_done_when_it_is_back(
    tmp_path: Path, models: Path, sharded: Path, undisturbed: Path, broker: OwnBroker
) -> None:
    environment = {"HALFQUAD_BROKER_URL": f"redis+socket://{broker.socket}"}
    installation = Installation(tmp_path, models, environment, embedded=False)
    try:
        installation.start()
        before = installation.client.submit(sharded, RECIPE)["id"]
        installation.wait_mid_job(before)
        broker.stop()
        wait_until(lambda: not checks(installation)["broker"], 10, "the outage to be told")
        meanwhile = installation.client.submit(save_llama(models / "meanwhile"), RECIPE)["id"]
        time.sleep(OUTAGE_S)
        assert installation.client.get(meanwhile)["status"] == "queued"
        broker.start()
        for job_id in (before, meanwhile):
            installation.wait_succeeded(job_id)
        assert all(checks(installation).values())
        assert jobless_bytes(installation.output(before)) == jobless_bytes(undisturbed)
    finally:
        installation.close()


def test_a_job_goes_on_when_the_database_is_back(
    distributed: Installation, sharded: Path, undisturbed: Path, postgres_url: str
) -> None:
    distributed.start()
    job_id = distributed.client.submit(sharded, RECIPE)["id"]
    distributed.wait_mid_job(job_id)
    with closed_database(postgres_url):
        wait_until(lambda: "the database does not answer" in distributed.look("/readyz"), 10, "the outage to be told")
        with pytest.raises(ServerError) as refused:
            distributed.client.submit(sharded, RECIPE)
        assert refused.value.status == 503
        time.sleep(OUTAGE_S)
    job = distributed.wait_succeeded(job_id)
    assert job["attempt"] <= 2, "one lease was lost at most"
    assert jobless_bytes(distributed.output(job_id)) == jobless_bytes(undisturbed)


def test_a_rolling_restart_of_everything_costs_a_shard_for_each_worker_at_most(
    distributed: Installation, models: Path, tmp_path: Path
) -> None:
    n_shards, n_workers = 16, 2
    source = save_llama(models / "rolling", layers=n_shards, hidden=768, n_shards=n_shards)
    distributed.start(n_workers)
    job_id = distributed.client.submit(source, RECIPE)["id"]
    distributed.wait_mid_job(job_id)
    for process in list(distributed.started):
        process.terminate()
        process.wait(20)
        distributed.started.remove(process)
        distributed.launch(process.args[-1])
        distributed.wait_ready(n_workers)
    job = distributed.wait_succeeded(job_id)
    assert job["attempt"] == 1
    assert len(distributed.claims(job_id)) <= n_shards + n_workers
    assert sorted(set(distributed.claims(job_id))) == list(range(n_shards))
    quantize_checkpoint(source, tmp_path / "alone", Recipe(**RECIPE))
    assert jobless_bytes(distributed.output(job_id)) == jobless_bytes(tmp_path / "alone")


@contextmanager
def closed_database(url: str) -> Iterator[None]:
    """Within it nobody gets in, and who was in is out."""
    parts = make_url(url)
    with psycopg.connect(host=parts.query["host"], user="halfquad", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {parts.database} WITH ALLOW_CONNECTIONS false")
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [parts.database]
        )
        try:
            yield
        finally:
            connection.execute(f"ALTER DATABASE {parts.database} WITH ALLOW_CONNECTIONS true")
