"""Real servers for the tests: PostgreSQL and Redis from the distribution's packages, started once and gone with pytest."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis
import torch
from hypothesis import HealthCheck, settings

START_TIMEOUT_S = 30

pytest_plugins = ["tests.fakehub.fixtures"]

settings.register_profile("dev", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

for name in [name for name in os.environ if name.startswith("HALFQUAD_")]:
    del os.environ[name]  # a developer's own settings are none of the tests' business


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, which looks once


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A folder whose socket leads to a PostgreSQL of our own; durable against nothing, so quick."""
    initdb, postgres = _postgres_program("initdb"), _postgres_program("postgres")
    user = _unprivileged_user()
    folder = Path(tempfile.mkdtemp(prefix="halfquad-postgres-"))
    try:
        if user:
            shutil.chown(folder, user, user)
        options = {"user": user, "group": user, "extra_groups": []} if user else {}
        initialize = [initdb, "-D", folder / "data", "-U", "halfquad", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(initialize, check=True, capture_output=True, cwd=folder, **options)
        settings = {"listen_addresses": "", "unix_socket_directories": folder, "fsync": "off", "max_connections": "100"}
        command = [postgres, "-D", folder / "data", *(f"--{key}={value}" for key, value in settings.items())]
        log = (folder / "log").open("wb")
        server = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, preexec_fn=_die_with_pytest(signal.SIGQUIT), **options
        )
        try:
            _wait_until(lambda: _answers_postgres(folder), server, folder / "log")
            yield str(folder)
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait()
            log.close()
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres_url(postgres_server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty PostgreSQL database, dropped afterwards."""
    name = f"test_{os.urandom(8).hex()}"
    with psycopg.connect(host=postgres_server, user="halfquad", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield f"postgresql+psycopg://halfquad@/{name}?host={postgres_server}"
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database; the test runs once on each of the two kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'halfquad.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """A Redis of our own on a loopback port."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.fail("no redis-server found: install the package redis-server")
    folder = Path(tempfile.mkdtemp(prefix="halfquad-redis-"))
    try:
        port = _free_port()
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, preexec_fn=_die_with_pytest(signal.SIGKILL))
        url = f"redis://127.0.0.1:{port}/0"
        try:
            _wait_until(lambda: _answers_redis(url), server, folder / "log")
            yield url
        finally:
            server.kill()
            server.wait()
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """A Redis with nothing in it."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


def _postgres_program(name: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    program = str(found[-1]) if found else shutil.which(name)
    if program is None:
        pytest.fail(f"no {name} found: install the package postgresql")
    return program


def _unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root; its package brings a user for it."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        pytest.fail("no user postgres to run PostgreSQL as: install the package postgresql")


def _die_with_pytest(number: signal.Signals) -> Callable[[], None]:
    from worker.death_signal import die_with_parent

    return lambda: die_with_parent(number)


def _answers_postgres(folder: Path) -> bool:
    try:
        psycopg.connect(host=str(folder), user="halfquad", dbname="postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _answers_redis(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


def _wait_until(ready: Callable[[], bool], server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if server.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"{server.args} did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
