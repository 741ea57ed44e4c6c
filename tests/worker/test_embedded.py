"""The supervisor's parts, on real processes; the whole of it is in tests/acceptance."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from service.common.settings import Settings
from worker import embedded
from worker.embedded import Child, StartError, broker_child, child_environment, lock_data_dir, refuse_taken_port


def wait_for(condition: Callable[[], object], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def broker(tmp_path: Path):
    child = broker_child(tmp_path / "valkey", tmp_path / "run" / "valkey.sock")
    yield child
    child.ask_to_stop()
    child.stop_by(time.monotonic() + 5)


def test_broker_answers_on_its_socket_and_on_no_port(broker: Child, tmp_path: Path) -> None:
    broker.start()
    wait_for(broker.answers)
    assert (tmp_path / "run" / "valkey.sock").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert broker.process is not None
    inodes = {os.readlink(path) for path in Path(f"/proc/{broker.process.pid}/fd").iterdir()}
    listening = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    assert not [line for line in listening if f"socket:[{line[9]}]" in inodes]


def test_lost_child_is_started_again_later_and_later(broker: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "BACKOFF_S", 0.05)
    broker.delay_s = 0.05
    broker.start()
    for delay_s in (0.1, 0.2):
        wait_for(broker.answers)
        assert broker.process is not None
        broker.process.kill()
        wait_for(lambda: not broker.running)
        assert broker.code == -signal.SIGKILL
        broker.keep_running()
        assert broker.delay_s == pytest.approx(delay_s)
        wait_for(lambda: broker.keep_running() or broker.running)


def test_child_that_does_not_stop_is_killed() -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    child = Child("stubborn", [sys.executable, "-c", stubborn], os.environ)
    child.start()
    time.sleep(0.5)
    child.ask_to_stop()
    child.stop_by(time.monotonic() + 0.2)
    assert child.code == -signal.SIGKILL


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    code = """
import os, sys
from worker.embedded import Child
child = Child("sleeper", ["sleep", "60"], os.environ)
child.start()
print(child.process.pid, file=sys.stderr, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stderr is not None
    child = int(parent.stderr.readline())
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stderr.close()
    wait_for(lambda: not alive(child))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_data_directory_is_held_by_one(tmp_path: Path) -> None:
    with (
        lock_data_dir(tmp_path),
        pytest.raises(StartError, match=f"process {os.getpid()} already runs"),
        lock_data_dir(tmp_path),
    ):
        pass
    with lock_data_dir(tmp_path):
        pass


def test_taken_port_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"port {port}"):
            refuse_taken_port("127.0.0.1", port)
    refuse_taken_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no host", "a..b", "x" * 64])
def test_host_without_an_address_is_named(host: str) -> None:
    with pytest.raises(StartError, match=f"cannot listen on {host} port 8000: .+"):
        refuse_taken_port(host, 8000)


def test_data_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="file/data: Not a directory"), lock_data_dir(tmp_path / "file" / "data"):
        pass


def test_up_refuses_a_directory_in_use_and_leaves_it_alone(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", "up", "--data-dir", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert "already runs halfquad up" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_children_share_the_data_directory_and_do_not_linger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data_dir=tmp_path)
    assert child_environment(settings)["HALFQUAD_DATA_DIR"] == str(tmp_path)
    assert child_environment(settings)["HALFQUAD_SOFT_SHUTDOWN_S"] == "0"
    monkeypatch.setenv("HALFQUAD_SOFT_SHUTDOWN_S", "7")
    assert child_environment(settings)["HALFQUAD_SOFT_SHUTDOWN_S"] == "7"
