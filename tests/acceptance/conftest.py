"""Real processes over real servers: `halfquad up`, or an API and workers over PostgreSQL and Redis."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from hqq_core.convert import quantize_checkpoint
from hqq_core.recipe import Recipe
from service.client import Client
from tests.checkpoints import save_llama

HALFQUAD = [sys.executable, "-m", "service.cli"]
N_SHARDS = 10
# analytic: a profile as any other, without the seconds that random tokens take (test_profile.py has those)
RECIPE = {"format": "compressed-tensors", "nbits": 4, "group_size": 64, "energy": "analytic"}
QUICK = {  # lost workers are found in seconds, where a user would wait for minutes
    "HALFQUAD_LEASE_S": "6",
    "HALFQUAD_HEARTBEAT_S": "2",
    "HALFQUAD_CANCEL_POLL_S": "0.5",
    "HALFQUAD_HOUSEKEEPING_S": "1",
    "HALFQUAD_REDISPATCH_S": "4",
    "HALFQUAD_BACKOFF_S": "1",
    "HALFQUAD_SOFT_SHUTDOWN_S": "0",
    "HALFQUAD_MIN_FREE_NBYTES": "0",
    "HALFQUAD_THREADS": "1",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.acceptance)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that sources may come from."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def sharded(models: Path) -> Path:
    """A checkpoint that one core works on for some seconds, shard by shard."""
    return save_llama(models / "sharded", layers=N_SHARDS, hidden=768, n_shards=N_SHARDS)


@pytest.fixture(scope="session")
def whole(models: Path) -> Path:
    """A checkpoint in one file: its only shard takes some seconds."""
    return save_llama(models / "whole", layers=14, hidden=1024)


@pytest.fixture(scope="session")
def undisturbed(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What becomes of it when nothing happens."""
    output = tmp_path_factory.mktemp("undisturbed") / "output"
    quantize_checkpoint(sharded, output, Recipe(**RECIPE), threads=2)
    return output


class Installation:
    """All processes over one data directory, and how to hurt them."""

    def __init__(self, folder: Path, models: Path, environment: dict[str, str], *, embedded: bool) -> None:
        self.folder, self.embedded = folder, embedded
        self.data_dir = folder / "data"
        self.port = free_port()
        self.environment = {
            **os.environ,
            **QUICK,
            "HALFQUAD_DATA_DIR": str(self.data_dir),
            "HALFQUAD_SOURCE_ROOTS": str(models),
            "HALFQUAD_PORT": str(self.port),
            **environment,
        }
        self.url = f"http://127.0.0.1:{self.port}"
        self.client, self.http = Client(self.url), httpx.Client(base_url=self.url)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, workers: int = 1) -> None:
        if self.embedded:
            self.launch("up")
        else:
            self.run("migrate")
            self.launch("api")
            for _ in range(workers):
                self.launch("worker")
        self.wait_ready(workers)

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen([*HALFQUAD, *arguments], env=self.environment, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def run(self, *arguments: str, code: int = 0) -> str:
        """A command's stdout, once it has ended with `code`."""
        environment = {**self.environment, "HALFQUAD_URL": self.url}
        done = subprocess.run([*HALFQUAD, *arguments], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        return done.stdout

    def wait_ready(self, workers: int = 1) -> None:
        online = f"{workers} online"
        wait_until(lambda: online in self.look("/readyz"), 40, f"{online}:\n{self.log_tail()}")

    def look(self, path: str) -> str:
        """The answer's text, or nothing."""
        try:
            return self.http.get(path).text
        except httpx.TransportError:
            return ""

    def stop(self) -> float:
        """SIGTERM to all that we started; how long it took."""
        began = time.monotonic()
        for process in self.started:
            process.terminate()
        for process in self.started:
            process.wait(20)
        self.started.clear()
        return time.monotonic() - began

    def kill_everything(self) -> None:
        for pid in self.pids():
            kill(pid)
        self.wait_gone()

    def kill_worker(self) -> int:
        """The parent of one pool; its child is left to the death signal."""
        pid = next(pid for pid in self.pids() if is_worker(command_line(pid)))
        kill(pid)
        return pid

    def pids(self) -> list[int]:
        """Every living process that has our data directory in its environment."""
        wanted = f"HALFQUAD_DATA_DIR={self.data_dir}".encode()
        return [pid for pid in living() if pid != os.getpid() and wanted in environment_of(pid)]

    def wait_gone(self, timeout_s: float = 5) -> None:
        wait_until(lambda: not self.pids(), timeout_s, lambda: f"left over: {[command_line(p) for p in self.pids()]}")
        for process in self.started:
            process.wait()
        self.started.clear()

    def wait_mid_job(self, job_id: str, done: int = 2) -> None:
        """Until `done` shards are done and another one has been taken."""
        wait_until(lambda: len(set(self.claims(job_id))) > done, 60, f"shards claimed:\n{self.log_tail()}")
        assert self.client.get(job_id)["status"] == "running"

    def log_events(self, job_id: str, action: str) -> list[dict]:
        events = self.http.get(f"/v1/jobs/{job_id}/events", params={"limit": 1000}).json()["data"]
        return [event["data"] for event in events if event["data"].get("action") == action]

    def claims(self, job_id: str) -> list[int]:
        """Indices of shards in the order in which workers took them."""
        return [data["index"] for data in self.log_events(job_id, "unit_claimed") if data["unit"] == "shard"]

    def wait_succeeded(self, job_id: str, timeout_s: float = 90) -> dict:
        job: dict = {}

        def over() -> bool:
            job.update(self.client.get(job_id))
            return job["status"] in ("succeeded", "failed", "cancelled")

        wait_until(over, timeout_s, lambda: f"end of {job}:\n{self.log_tail()}")
        assert job["status"] == "succeeded", f"{job['error']}\n{self.log_tail()}"
        return job

    def output(self, job_id: str) -> Path:
        return self.data_dir / "jobs" / job_id / "output"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def log_tail(self) -> str:
        return self.log.read_text()[-6000:]

    def close(self) -> None:
        self.client.close()
        self.http.close()
        for pid in self.pids():
            kill(pid)
        for process in self.started:
            process.wait()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Installation]:
    """One `halfquad up` for the tests that leave it as it was."""
    installation = Installation(tmp_path_factory.mktemp("service"), models, {}, embedded=True)
    installation.start()
    yield installation
    installation.close()


@pytest.fixture
def embedded(tmp_path: Path, models: Path) -> Iterator[Installation]:
    """`halfquad up`: SQLite and Valkey; not started yet."""
    installation = Installation(tmp_path, models, {}, embedded=True)
    yield installation
    installation.close()


@pytest.fixture
def distributed(tmp_path: Path, models: Path, postgres_url: str, redis_url: str) -> Iterator[Installation]:
    """PostgreSQL and Redis; not started yet."""
    environment = {"HALFQUAD_DATABASE_URL": postgres_url, "HALFQUAD_BROKER_URL": redis_url}
    installation = Installation(tmp_path, models, environment, embedded=False)
    yield installation
    installation.close()


@pytest.fixture(params=["embedded", "distributed"])
def installation(request: pytest.FixtureRequest) -> Installation:
    """Each of the two kinds."""
    return request.getfixturevalue(request.param)


def wait_until(condition: Callable[[], object], timeout_s: float, what: str | Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s} s for {what() if callable(what) else what}")
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def living() -> list[int]:
    """Processes that are not zombies."""
    return [
        pid for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()) if _lives(pid)
    ]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def is_worker(command: str) -> bool:
    return "-m worker --hostname" in command


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
