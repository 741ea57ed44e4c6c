"""Broker, API and workers, each of them started again when it was killed."""

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from redis import Redis

from service.common.settings import Settings
from tests.acceptance.conftest import command_line, environment_of, kill, living
from worker.death_signal import die_with_parent
from worker.embedded import broker_child

WORKERS = ("worker-a", "worker-b")
CLI = [sys.executable, "-P", "-m", "service.cli"]


class Processes:
    """All that runs over one data directory, known by a temporary directory that nobody else has."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.temporary, self.log = folder / "tmp", folder / "log"
        self.temporary.mkdir()
        self.environment = {**os.environ, **environment, "TMPDIR": str(self.temporary)}
        data_dir = Path(environment["HALFQUAD_DATA_DIR"])
        data_dir.mkdir(mode=0o700)
        self.settings = Settings(data_dir=data_dir)  # the socket's place
        assert self.settings.embedded_socket is not None
        self.socket = self.settings.embedded_socket
        broker = broker_child(data_dir / "valkey", self.socket).command
        self._commands = {
            "broker": broker,
            "api": [*CLI, "api"],
            **{name: [*CLI, "worker", "--name", name] for name in WORKERS},
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.starts = dict.fromkeys(self._commands, 0)

    def start(self) -> None:
        self._start("broker")
        subprocess.run([*CLI, "migrate"], env=self.environment, check=True, capture_output=True)
        self.keep_up()

    def keep_up(self) -> None:
        """Start what does not run."""
        for name in self._commands:
            if (process := self._running.get(name)) is None or process.poll() is not None:
                self._start(name)

    def kill(self, name: str) -> None:
        self._running[name].kill()
        self._running[name].wait()

    def put_to_sleep(self, name: str) -> list[int]:
        """SIGSTOP to a process and all that it started; who sleeps now."""
        asleep = [self._running[name].pid]
        for pid in asleep:
            kill(pid, signal.SIGSTOP)
            asleep += _children().get(pid, ())  # who sleeps starts no more
        return asleep

    def empty_broker(self) -> None:
        """Killed, and its log is gone."""
        self.kill("broker")
        for path in (self.settings.data_dir / "valkey").rglob("*"):
            path.unlink() if path.is_file() else None

    def pool_child(self, worker: str) -> int | None:
        """The process that does the units of a worker, where it has one just now."""
        found = [pid for pid in _children().get(self._running[worker].pid, ()) if _is_pool_child(pid)]
        return found[0] if found else None

    def hub_children(self, worker: str | None = None) -> list[int]:
        """Those that speak with the Hub or a store, of one worker or of all."""
        children = _children()
        pool = [pid for name in ([worker] if worker else WORKERS) for pid in children.get(self._running[name].pid, ())]
        candidates = [pid for parent in pool if _is_pool_child(parent) for pid in children.get(parent, ())]
        return [pid for pid in candidates if command_line(pid).strip().endswith(("-m worker.hub", "-m worker.push"))]

    def pids(self) -> list[int]:
        mark = f"TMPDIR={self.temporary}".encode()
        return [pid for pid in living() if pid != os.getpid() and mark in environment_of(pid)]

    def redis(self) -> Redis:
        return Redis(unix_socket_path=str(self.socket), socket_timeout=5)

    def restart_workers(self) -> None:
        """In order, so that housekeeping looks through all folders."""
        self._end(WORKERS)
        self.keep_up()

    def stop(self, timeout_s: float = 20) -> list[str]:
        """SIGTERM to all, the broker last; command lines of what is left after that."""
        self._end([name for name in self._running if name != "broker"], timeout_s)
        self._end(["broker"], timeout_s)
        deadline = time.monotonic() + timeout_s / 4
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.1)
        return [command_line(pid) for pid in self.pids()]

    def close(self) -> None:
        for pid in self.pids():
            kill(pid)
        for process in self._running.values():
            process.wait()

    def _start(self, name: str) -> None:
        self.starts[name] += 1
        with self.log.open("ab") as log:
            self._running[name] = subprocess.Popen(
                self._commands[name],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _end(self, names: tuple[str, ...] | list[str], timeout_s: float = 20) -> None:
        for name in names:
            self._running[name].send_signal(signal.SIGTERM)
        for name in names:
            self._running[name].wait(timeout_s)


def _is_pool_child(pid: int) -> bool:
    return "billiard.spawn" in command_line(pid)


def _children() -> dict[int, list[int]]:
    """Living processes by their parents."""
    children = defaultdict(list)
    for pid in living():
        with suppress(OSError):
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(pid)
    return children
