"""The child process: killed where it stands, never there without its parent, and silent about the token."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from hqq_core.errors import Cancelled
from service.common.errors import HubError, Unavailable
from tests.fakehub.server import FakeHub
from tests.worker.hub.conftest import REPO, look
from worker.hub import Endpoint, Hub, Snapshot

LONG_S = 120.0


def children(parent: int) -> list[int]:
    """Processes of `worker.hub` that `parent` started, as far as they have begun."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and b"worker.hub" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def group(leader: int) -> list[int]:
    """All processes of a group, zombies too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == leader:
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


class Looker:
    """Acts once `when` holds, with the child's id; notes which children there were."""

    def __init__(self, when: Callable[[], object], act: Callable[[int], None]) -> None:
        self.when, self.act, self.seen = when, act, set[int]()

    def __call__(self) -> None:
        started = children(os.getpid())
        self.seen.update(started)
        if started and self.when():
            self.act(started[0])


def cancel(child: int) -> None:
    raise Cancelled("enough")


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)


@pytest.fixture
def snapshot(fakehub: FakeHub, hub: Hub, source: Path) -> Snapshot:
    fakehub.add_repo(REPO, source)
    snapshot = hub.resolve(REPO, "main", look=look)
    fakehub.requests.clear()
    return snapshot


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process and its children put temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("^/storage/", {"download_rate": 1000}),
        ("^/storage/", {"delay_s": LONG_S}),
        ("/resolve/", {"delay_s": LONG_S}),
        ("/resolve/", {"status": 429, "retry_after_s": 50}),
    ],
    ids=["slow body", "slow storage", "slow answer", "told to wait"],
)
def test_a_cancel_stops_a_download_wherever_it_is(
    path: str, fault: dict, fakehub: FakeHub, hub: Hub, snapshot: Snapshot, tmp_path: Path, temporary: Path
) -> None:
    fakehub.faults.add(path, count=None, **fault)
    looker = Looker(lambda: fakehub.requests.find(path), cancel)
    with pytest.raises(Cancelled, match="enough"):
        hub.download(snapshot, snapshot.weights[0], tmp_path / "w", look=looker)
    (child,) = looker.seen
    assert not group(child)
    assert not (tmp_path / "w").exists()
    assert not list(temporary.iterdir())


def test_a_cancel_from_progress_stops_it_too(fakehub: FakeHub, hub: Hub, snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        hub.download(snapshot, snapshot.weights[0], tmp_path / "w", look=look, progress=cancel)
    assert not children(os.getpid())


def test_a_lost_child_is_worth_another_start(fakehub: FakeHub, hub: Hub, snapshot: Snapshot, tmp_path: Path) -> None:
    fakehub.faults.add("^/storage/", delay_s=LONG_S)
    looker = Looker(lambda: fakehub.requests.find("^/storage/"), kill)
    with pytest.raises(Unavailable, match="ended by SIGKILL before it had an answer for 'download'") as error:
        hub.download(snapshot, snapshot.weights[0], tmp_path / "w", look=looker)
    assert error.value.retryable


PARENT = """
import sys
from pathlib import Path
from worker.hub import Endpoint, Hub
hub = Hub(Endpoint(sys.argv[1], xet=False), sys.stdin.read())
snapshot = hub.resolve("team-a/tiny", "main", look=lambda: None)
hub.download(snapshot, snapshot.weights[0], Path(sys.argv[2]), look=lambda: None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal")
def test_the_child_dies_with_its_parent_and_leaves_nothing(
    fakehub: FakeHub, snapshot: Snapshot, tmp_path: Path, temporary: Path
) -> None:
    fakehub.faults.add("^/storage/", delay_s=LONG_S)
    command = [sys.executable, "-c", PARENT, fakehub.endpoint, str(tmp_path / "w")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        parent.stdin.write(fakehub.read_token.encode())
        parent.stdin.close()
        while not fakehub.requests.find("^/storage/"):
            assert parent.poll() is None
            time.sleep(0.05)
        (child,) = children(parent.pid)
        parent.kill()
    while Path(f"/proc/{child}").exists():
        time.sleep(0.05)
    assert not list(temporary.iterdir())


def test_a_child_without_a_parent_of_that_id_does_nothing(fakehub: FakeHub, snapshot: Snapshot) -> None:
    request = b'{"op": "resolve", "parent": 1}'
    done = subprocess.run([sys.executable, "-m", "worker.hub"], input=request, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_the_token_is_nowhere_but_in_requests_to_the_hub(
    fakehub: FakeHub, hub: Hub, snapshot: Snapshot, tmp_path: Path, temporary: Path
) -> None:
    token = fakehub.read_token.encode()
    seen: dict[str, bytes] = {}

    def watch() -> None:
        here = [path for path in tmp_path.rglob("*") if path.is_file()]
        there = [Path(f"/proc/{child}/{name}") for child in children(os.getpid()) for name in ("cmdline", "environ")]
        for path in here + there:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone meanwhile
                seen[path.name if path in there else str(path)] = path.read_bytes()

    with structlog.testing.capture_logs() as logs:
        hub.fetch_small(snapshot, tmp_path / "source", look=watch)
        fakehub.faults.add("^/storage/", truncate_at=10_000)  # so that the client says something
        hub.download(snapshot, snapshot.weights[0], tmp_path / "w", look=watch)
        fakehub.faults.add("/revision/", status=403, message=f"{fakehub.read_token} may not do this")
        with pytest.raises(HubError, match=r"\*\*\* may not do this") as error:
            hub.resolve(REPO, "main", look=watch)
    assert {"cmdline", "environ"} <= seen.keys()
    assert b"HF_HUB_DISABLE_IMPLICIT_TOKEN=1" in seen["environ"]
    assert any(entry["action"] == "hub_said" for entry in logs)
    assert not [name for name, content in seen.items() if token in content]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token in path.read_bytes()]
    for text in (repr(logs), str(error.value), repr(error.value), repr(hub), repr(hub.endpoint)):
        assert fakehub.read_token not in text
    assert not list(temporary.iterdir())


def test_what_the_child_says_on_stderr_is_cut_and_has_no_token(fakehub: FakeHub, hub: Hub, snapshot: Snapshot) -> None:
    """An unknown operation ends in a traceback, with the arguments of the call as its message."""
    with structlog.testing.capture_logs() as logs, pytest.raises(Exception, match=r"KeyError: '\*\*\*'"):
        hub.call(fakehub.read_token, look=look)
    (said,) = [entry for entry in logs if entry["action"] == "hub_said"]
    assert "Traceback" in said["text"]
    assert "***" in said["text"]
    assert fakehub.read_token not in said["text"]


def test_a_users_own_settings_and_tokens_are_not_the_childs(
    fakehub: FakeHub, stranger: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, as workers are, and logged in."""
    fakehub.add_repo(REPO, source, private=True)
    (tmp_path / "token").write_text(fakehub.read_token)
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_TOKEN": fakehub.read_token, "HF_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HubError, match="asked with no credential"):
        stranger.resolve(REPO, "main", look=look)
    assert not any(request.authorized for request in fakehub.requests.find("/api/"))


def test_a_request_larger_than_a_pipe_goes_in(fakehub: FakeHub, snapshot: Snapshot) -> None:
    hub = Hub(Endpoint(fakehub.endpoint, xet=False), fakehub.read_token, "x" * 300_000)
    assert hub.resolve(REPO, "main", look=look) == snapshot


TIMES = """
import sys
from worker.hub import session
from huggingface_hub.utils._http import get_session
session.ANSWER_S = 0.2
session.begin_session(sys.argv[1], None)
try:
    get_session().get(f"{sys.argv[1]}/api/models/team-a/tiny", timeout=None)
except Exception as error:
    print(type(error).__name__)
"""


def test_no_answer_is_waited_for_without_end(fakehub: FakeHub) -> None:
    """The client itself often wants no limit, and says so."""
    fakehub.faults.add("/api/models/", delay_s=LONG_S)
    done = subprocess.run([sys.executable, "-c", TIMES, fakehub.endpoint], check=True, capture_output=True, text=True)
    assert done.stdout == "ReadTimeout\n"


def test_the_child_loads_nothing_heavy(tmp_path: Path) -> None:
    script = "import sys; import worker.hub.operations; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "numpy", "sqlalchemy", "celery", "redis", "pydantic"} & set(loaded)
