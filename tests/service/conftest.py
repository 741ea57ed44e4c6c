"""The service's parts over real databases and a real broker, and a worker's moves without a worker."""

import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psycopg
import pytest
import uvicorn
from fastapi.testclient import TestClient

from service.app import create_app
from service.common import repository
from service.common.errors import ServiceError, TokenRefused, describe, is_final
from service.common.events import log_data
from service.common.models import Base, Job
from service.common.repository import Claim, ShardWork
from service.common.schema import migrate
from service.common.session import Database
from service.common.settings import Settings

LEASE_S = 60


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file, to be copied."""
    path = tmp_path_factory.mktemp("template") / "halfquad.db"
    database = Database(f"sqlite:///{path}")
    migrate(database)
    database.close()
    return path


@pytest.fixture(scope="session")
def postgres_database(postgres_server: str) -> Iterator[Database]:
    """A migrated database, to be emptied after each test: making one takes longer than most tests."""
    with psycopg.connect(host=postgres_server, user="halfquad", dbname="postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE service_tests")
    database = Database(f"postgresql+psycopg://halfquad@/service_tests?host={postgres_server}")
    migrate(database)
    yield database
    database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A migrated database without rows, once of each kind."""
    if request.param == "sqlite":
        yield request.getfixturevalue("migrated")
        return
    database: Database = request.getfixturevalue("postgres_database")
    yield database
    with database.write() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder that local sources may come from."""
    root = tmp_path / "models"
    root.mkdir()
    return root


@pytest.fixture
def hub_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service has a default credential; to be named before the service."""
    monkeypatch.setenv("HALFQUAD_HUB_TOKEN", "hf_canary_of_the_environment")


@pytest.fixture
def settings(tmp_path: Path, root: Path, redis_url: str) -> Settings:
    return Settings(data_dir=tmp_path / "data", broker_url=redis_url, source_roots=(root,), min_free_nbytes=0)


@pytest.fixture
def migrated(tmp_path: Path, sqlite_template: Path) -> Iterator[Database]:
    """The database behind the API."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    shutil.copy(sqlite_template, folder)
    database = Database(f"sqlite:///{folder / sqlite_template.name}")
    yield database
    database.close()


@pytest.fixture
def api(settings: Settings, migrated: Database) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


def shard_work(nbytes: Iterable[int]) -> list[ShardWork]:
    return [ShardWork(i, n) for i, n in enumerate(nbytes)]


PUSHED = {"url": "https://hub.example/acme/tiny", "commit": "c" * 40, "pull_request": None}
METRICS = {"nbytes_in": 100, "nbytes_out": 30, "bits_per_weight": 4.5, "relative_error": 0.1, "worst_tensors": []}
OUTPUT = {"folder": "", "format": "hqq", "metrics": METRICS}


class Hand:
    """Does by hand what a worker does to the rows."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def insert(
        self,
        *,
        owner: str = "default",
        priority: int = 5,
        max_attempts: int = 3,
        source: dict | None = None,
        target: dict | None = None,
        **labels: str,
    ) -> Job:
        source = source or {"type": "folder", "path": "/models/tiny"}
        with self.database.write() as session:
            return repository.insert_job(
                session,
                source=source,
                recipes=[{}],
                target=target,
                labels=labels,
                owner=owner,
                priority=priority,
                max_attempts=max_attempts,
            )

    def due(self, *, limit: int = 100, redispatch_s: float = 0) -> list[str]:
        with self.database.write() as session:
            return [m.unit_id for m in repository.take_due(session, limit=limit, redispatch_s=redispatch_s)]

    def claim(self, *, owner: str = "worker", lease_s: float = LEASE_S) -> Claim:
        with self.database.write() as session:
            due = repository.take_due(session, limit=1, redispatch_s=-1)
            claim = repository.claim_unit(session, due[0].unit_id, owner=owner, lease_s=lease_s)
        assert claim is not None
        return claim

    def plan(self, *nbytes: int, profile: bool = False) -> Job:
        claim = self.claim()
        with self.database.write() as session:
            return repository.plan_succeeded(session, claim, shard_work(nbytes), profile=profile)

    def profile(self, *nbytes: int, claim: Claim | None = None) -> Job:
        claim = claim or self.claim()
        with self.database.write() as session:
            return repository.profile_succeeded(session, claim, shard_work(nbytes), log_data("energies_ready", "there"))

    def solve(self, claim: Claim | None = None, *, nbytes_out: int = 10) -> Job:
        claim = claim or self.claim()
        with self.database.write() as session:
            return repository.shard_succeeded(session, claim, {"index": claim.index}, nbytes_out=nbytes_out)

    def finish(self, *artifacts: dict) -> Job:
        claim = self.claim()
        with self.database.write() as session:
            return repository.finish_succeeded(session, claim, artifacts=artifacts, outputs=[OUTPUT])

    def push(self, claim: Claim | None = None) -> Job:
        claim = claim or self.claim()
        with self.database.write() as session:
            return repository.push_succeeded(session, claim, PUSHED)

    def fail(self, claim: Claim | None = None, error: ServiceError | None = None) -> Job:
        claim = claim or self.claim()
        error = error or TokenRefused("the token was refused")
        with self.database.write() as session:
            return repository.unit_failed(
                session, claim, describe(error), final=is_final(error), backoff_s=0, backoff_limit_s=0
            )

    def cancel(self, job: Job) -> Job:
        with self.database.write() as session:
            return repository.cancel_job(session, job.id)

    def get(self, job: Job) -> Job:
        with self.database.read() as session:
            return repository.get_job(session, job.id)

    def events(self, job: Job) -> list[tuple[str, dict]]:
        with self.database.read() as session:
            events = repository.list_events(session, job.id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        return [(event.type, event.data) for event in events]


@pytest.fixture
def hand(database: Database) -> Hand:
    return Hand(database)


@pytest.fixture
def api_hand(migrated: Database) -> Hand:
    """A worker's moves on the API's own database."""
    return Hand(migrated)


@pytest.fixture
def api_url(settings: Settings, migrated: Database) -> Iterator[str]:
    """The API behind a real server: what a stream does, a client inside the process does not show."""
    config = uvicorn.Config(create_app(settings), port=0, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def in_threads(n, work):
    results = []
    barrier = threading.Barrier(n)

    def run(i):
        barrier.wait()
        results.append(work(i))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == n
    return results
