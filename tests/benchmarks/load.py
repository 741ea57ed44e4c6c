"""The API with many jobs beside the API with few, submits beside a bare insert, and many followers of one process.

    python -m tests.benchmarks.load [--waiting 10000] [--ended 1000] [--events 50] [--requests 1000] [--followers 500]

Real processes: `halfquad api` with uvicorn, the embedded broker, SQLite unless `--database` has a URL of an empty database. No
worker: what is submitted waits. Requests follow each other on one connection, so times are latencies; this machine's cores serve
client, API and database. All that is compared was measured in this run.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.common import repository, schema
from service.common.events import EventType, log_data
from service.common.session import Database
from service.common.settings import Settings
from tests.acceptance.conftest import free_port, wait_until
from tests.checkpoints import save_llama
from worker.embedded import broker_child

FEW = 10
START_S = 60
LOOK_S = 0.05


@dataclass(frozen=True)
class Served:
    """A process that answers requests."""

    url: str
    database: Database
    source: Path


@dataclass(frozen=True)
class Latencies:
    """Seconds of requests of one kind."""

    seconds: list[float]

    @property
    def p50(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.seconds, n=100)[98]

    @property
    def rate(self) -> float:
        return len(self.seconds) / sum(self.seconds)

    def __str__(self) -> str:
        return f"{self.rate:6.0f}/s, p50 {1e3 * self.p50:5.1f} ms, p99 {1e3 * self.p99:5.1f} ms"

    def over(self, other: "Latencies") -> str:
        return (
            f"{self.p50 / other.p50:.2f} p50, {self.p99 / other.p99:.2f} p99, {self.rate / other.rate:.2f} of the rate"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.load", description=__doc__)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--ended", type=int, default=1_000)
    parser.add_argument("--events", type=int, default=50, help="of each job that ended")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--followers", type=int, default=500)
    parser.add_argument("--database", help="URL; unless given, SQLite")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="halfquad-load-") as folder, api(Path(folder), asked.database) as served:
        seed(served, FEW, 0, 0)
        few = timed(served, asked.requests)
        seed(served, asked.waiting, asked.ended, asked.events)
        many = timed(served, asked.requests)
        print(
            f"{asked.waiting} jobs that wait, {asked.ended} that ended with {asked.events} events; {os.cpu_count()} cores"
        )
        for name, latencies in many.items():
            print(f"{name:9} {latencies}\n{'':9} {few[name]} with {FEW} jobs\n{'':9} {latencies.over(few[name])}")
        with bare(Path(folder), served) as url:
            alone = latencies_of(asked.requests, insert_bare(url))
        print(f"bare      {alone}\nsubmit    {few['submit'].over(alone)}, over a bare insert")
        asyncio.run(follow(served, asked.followers))


@contextmanager
def api(folder: Path, database_url: str | None) -> Iterator[Served]:
    settings = Settings(data_dir=folder / "data")
    settings.data_dir.mkdir(mode=0o700)
    assert settings.embedded_socket is not None
    source, port = save_llama(folder / "models" / "tiny"), free_port()
    environment = {**os.environ, "HALFQUAD_DATA_DIR": str(settings.data_dir), "HALFQUAD_PORT": str(port),
                   "HALFQUAD_SOURCE_ROOTS": str(source.parent), "HALFQUAD_LOG_LEVEL": "WARNING"}  # fmt: skip
    if database_url:
        environment["HALFQUAD_DATABASE_URL"] = database_url
    database = Database(database_url or settings.database_url)
    schema.migrate(database)
    broker = broker_child(settings.data_dir / "valkey", settings.embedded_socket)
    broker.start()
    try:
        with process(
            [sys.executable, "-m", "service.cli", "api"], environment, f"http://127.0.0.1:{port}/livez"
        ) as url:
            yield Served(url.removesuffix("/livez"), database, source)
    finally:
        assert broker.process is not None
        broker.process.terminate()
        broker.process.wait()
        database.close()


@contextmanager
def bare(folder: Path, served: Served) -> Iterator[str]:
    """What FastAPI and SQLAlchemy take to insert a row as wide, of a database of the same kind."""
    url, port = str(served.database.url), free_port()
    if url.startswith("sqlite"):
        url = f"sqlite:///{folder / 'bare.db'}"
    environment = {**os.environ, "BARE_DATABASE_URL": url}
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "tests.benchmarks.bare_app:app",
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    with process(command, environment, f"http://127.0.0.1:{port}/docs") as answered:
        yield answered.removesuffix("/docs")


@contextmanager
def process(command: list[str], environment: dict[str, str], url: str) -> Iterator[str]:
    with subprocess.Popen(command, env=environment) as started:
        try:
            wait_until(lambda: answers(url), START_S, url)
            yield url
        finally:
            started.terminate()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def seed(served: Served, waiting: int, ended: int, n_events: int) -> None:
    """Jobs as the service makes them; those that ended have a log."""
    with served.database.write() as session:
        for index in range(waiting + ended):
            job = repository.insert_job(
                session,
                source={"type": "folder", "path": str(served.source)},
                recipes=[{}],
                labels={"batch": "load"},
                priority=5,
                max_attempts=3,
            )
            if index >= waiting:
                for _ in range(n_events):
                    repository.append_event(session, job, EventType.LOG, log_data("seen", "x"))
                session.flush()
                repository.cancel_job(session, job.id)


def timed(served: Served, n_requests: int) -> dict[str, Latencies]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        ids = [job["id"] for job in client.get("/v1/jobs", params={"limit": 10}).json()["data"]]
        last = client.get("/v1/jobs", params={"limit": 10, "order": "asc"}).json()["data"][-1]["id"]
        asked: dict[str, Callable[[int], httpx.Response]] = {
            "list": lambda n: client.get("/v1/jobs", params={"limit": FEW}),
            "last page": lambda n: client.get("/v1/jobs", params={"limit": FEW, "after": last}),
            "get": lambda n: client.get(f"/v1/jobs/{ids[n % len(ids)]}"),
            "submit": lambda n: client.post(
                "/v1/jobs", json={"source": {"type": "folder", "path": str(served.source)}}
            ),
        }
        return {name: latencies_of(n_requests, ask) for name, ask in asked.items()}


def insert_bare(url: str) -> Callable[[int], httpx.Response]:
    client = httpx.Client(base_url=url, timeout=60)
    return lambda n: client.post("/rows", json={"source": {"path": "/models/tiny"}, "labels": {}, "priority": 5})


def latencies_of(n_requests: int, ask: Callable[[int], httpx.Response]) -> Latencies:
    seconds = []
    for n in range(n_requests):
        began_at = time.perf_counter()
        answer = ask(n)
        seconds.append(time.perf_counter() - began_at)
        assert answer.is_success, answer.text
    return Latencies(seconds)


async def follow(served: Served, n_followers: int) -> None:
    """Streams of as many jobs; how long an event of each takes to reach its follower, and what a `get` takes meanwhile."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=served.url, limits=limits, timeout=None) as client:
        ids: list[str] = []
        while len(ids) < n_followers:
            params = {"limit": 100, "status": "queued"} | ({"after": ids[-1]} if ids else {})
            ids += [job["id"] for job in (await client.get("/v1/jobs", params=params)).json()["data"]]
        del ids[n_followers:]
        opened, reached = set[str](), dict[str, float]()
        followers = [asyncio.create_task(listen(client, job_id, opened, reached)) for job_id in ids]
        while len(opened) < n_followers:
            await asyncio.sleep(LOOK_S)
        quiet = await asyncio.to_thread(latencies_of, 100, getter(served, ids))
        told_at = await asyncio.to_thread(tell, served.database, ids)
        while len(reached) < n_followers:
            await asyncio.sleep(LOOK_S)
        late = Latencies([reached[job_id] - told_at[job_id] for job_id in ids])
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        print(
            f"{n_followers} followers: an event reaches its own after p50 {late.p50:.2f} s, p99 {late.p99:.2f} s; get {quiet}"
        )


async def listen(client: httpx.AsyncClient, job_id: str, opened: set[str], reached: dict[str, float]) -> None:
    headers = {"Accept": "text/event-stream"}
    async with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("event: log"):
                reached[job_id] = time.monotonic()
            elif line.startswith("event: "):
                opened.add(job_id)


def getter(served: Served, ids: list[str]) -> Callable[[int], httpx.Response]:
    client = httpx.Client(base_url=served.url, timeout=60)
    return lambda n: client.get(f"/v1/jobs/{ids[n % len(ids)]}")


def tell(database: Database, ids: list[str]) -> dict[str, float]:
    """An event of each job, one transaction after the other; when each was there."""
    at = {}
    for job_id in ids:
        with database.write() as session:
            repository.append_event(session, repository.get_job(session, job_id), EventType.LOG, log_data("told", "x"))
        at[job_id] = time.monotonic()
    return at


if __name__ == "__main__":
    main()
