"""The parent's side of the child process: one request, one process, gone before the call returns.

The request is one JSON object on stdin, so that a token is in no argv and no environment. The answer is JSON lines on stdout:
{"progress": nbytes} any number of times, then {"result": ...} or {"error": {code, type, message, retryable, retry_after_s}}.
What the client says on stderr is kept to its last few KiB and logged. The token is struck from all that comes back.
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import structlog

from hqq_core.errors import CheckpointError, StorageFullError
from service.common.errors import HUB_ERRORS, ServiceError, Unavailable

LOOK_S = 0.2
SAID_NBYTES = 8192
PIECE_NBYTES = 65536
PASSED_ON = (
    "PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
)  # fmt: skip

logger = structlog.get_logger(__name__)


def ask(
    request: dict[str, Any],
    endpoint: str,
    *,
    xet: bool,
    look: Callable[[], None],
    progress: Callable[[int], None] | None = None,
) -> Any:
    """The result of one request; `look` is called several times a second, and what it raises kills the child."""
    with _home() as home:
        environment = _environment(endpoint, home, xet)
        return converse("worker.hub", request | {"endpoint": endpoint}, environment, look, progress)


def converse(
    module: str,
    request: dict[str, Any],
    environment: dict[str, str],
    look: Callable[[], None],
    progress: Callable[[int], None] | None = None,
) -> Any:
    """The same with any module that speaks as `worker.hub` does."""
    with _child(module, environment) as child:
        conversation = _Conversation(child, request | {"parent": os.getpid()}, look, progress)
        answer = conversation.run()
        if conversation.said:
            logger.info("The Hub's client had words.", action="hub_said", op=request["op"], text=conversation.said)
        if answer is None:
            raise _lost(request["op"], child.wait())
    if "error" in answer:
        raise _error(**answer["error"])
    return answer["result"]


class _Conversation:
    """What goes over the three pipes of one child."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        request: dict[str, Any],
        look: Callable[[], None],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._child = child
        self._unsent = memoryview(json.dumps(request).encode())
        token = request["token"] or ""
        self._tokens = {token.encode(), json.dumps(token)[1:-1].encode()} - {b""}  # as it is, and as JSON has it
        self._look, self._progress = look, progress
        self._received, self._said = b"", b""
        self._answer: dict[str, Any] | None = None

    @property
    def said(self) -> str:
        return self._said.decode(errors="replace").strip()

    def run(self) -> dict[str, Any] | None:
        """The answer; None where the child ended without one."""
        child = self._child
        steps = {child.stdin: self._send, child.stdout: self._receive, child.stderr: self._hear}
        with selectors.DefaultSelector() as selector:
            for pipe, step in steps.items():
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
                event = selectors.EVENT_WRITE if pipe is child.stdin else selectors.EVENT_READ
                selector.register(pipe, event, step)
            while self._answer is None and selector.get_map():
                self._look()
                for key, _ in selector.select(LOOK_S):
                    ready: Any = key.fileobj
                    if not key.data(ready):
                        selector.unregister(ready)
                        ready.close()
        return self._answer

    def _send(self, pipe: IO[bytes]) -> bool:
        try:
            self._unsent = self._unsent[os.write(pipe.fileno(), self._unsent) :]
        except BrokenPipeError:
            return False  # it has ended; how, is seen elsewhere
        return bool(self._unsent)

    def _receive(self, pipe: IO[bytes]) -> bool:
        piece = os.read(pipe.fileno(), PIECE_NBYTES)
        *lines, self._received = (self._received + piece).split(b"\n")
        for line in lines:
            message = json.loads(self._struck(line))
            if "progress" not in message:
                self._answer = message
            elif self._progress is not None:
                self._progress(message["progress"])
        return bool(piece)

    def _hear(self, pipe: IO[bytes]) -> bool:
        piece = os.read(pipe.fileno(), PIECE_NBYTES)
        self._said = self._struck(self._said + piece)[-SAID_NBYTES:]  # struck first: half a token is a secret too
        return bool(piece)

    def _struck(self, text: bytes) -> bytes:
        for token in self._tokens:
            text = text.replace(token, b"***")
        return text


@contextmanager
def _home() -> Iterator[str]:
    """A folder of its own for what the client may want to keep, gone afterwards."""
    # Whoever wants it makes it, which without Xet is nobody: so even a SIGKILL of ours leaves nothing.
    home = os.path.join(tempfile.gettempdir(), f"halfquad-hub-{uuid.uuid4().hex}")
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _child(module: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a session of its own; killed with all of its group, and its pipes closed, at the end."""
    # The child sets its death signal itself: a fork that runs our code first could hang in a process of many threads.
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            if child.stdin is not None and not child.stdin.closed:
                child.stdin.close()


def _environment(endpoint: str, home: str, xet: bool) -> dict[str, str]:
    """Nothing of ours but what a connection needs: the client finds no token, no cache and no setting of anyone's."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return kept | {
        "HOME": home,
        "HF_HOME": home,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0",
    }


def _error(code: str, type: str, message: str, retryable: bool, retry_after_s: int | None) -> Exception:
    if code == CheckpointError.code:
        return CheckpointError(message)
    if code == StorageFullError.code:
        return StorageFullError(message)
    if code in HUB_ERRORS:
        return HUB_ERRORS[code](message, retry_after_s=retry_after_s)
    return ServiceError(message)


def _lost(op: str, code: int) -> Unavailable:
    how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
    return Unavailable(f"the process that spoke with the Hub ended {how} before it had an answer for {op!r}")
