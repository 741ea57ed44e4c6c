"""The child process: one request from stdin, JSON lines to stdout (worker/hub/child.py has the format), then the end.

    python -m worker.hub

Nothing but the real client speaks with the Hub, and nothing of torch, the database or the broker is loaded here.
"""

import json
import os
import resource
import sys
import time
import traceback
from typing import Any

from worker.death_signal import die_with_parent

TELL_S = 0.1
MEMORY_NBYTES = 4 * 1024**3  # an answer that would fill more is none


def main() -> None:
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_NBYTES, MEMORY_NBYTES))
    request = json.loads(sys.stdin.buffer.read() or b"null")
    if request is None or os.getppid() != request.pop("parent"):
        os._exit(1)  # the parent died before the death signal was set
    try:
        say({"result": perform(**request)})
    except BaseException as error:
        from worker.hub.faults import describe

        fault = describe(error, request)
        if fault["code"] == "internal_error":
            traceback.print_exc()
        say({"error": fault})
    os._exit(0)  # the answer is out: no thread of the client's is waited for


def perform(op: str, token: str | None, endpoint: str, credential: str | None, **arguments: Any) -> Any:
    """One operation of the table, by its name."""
    from huggingface_hub import HfApi

    from worker.hub.operations import OPERATIONS
    from worker.hub.session import begin_session

    begin_session(endpoint, token)
    return OPERATIONS[op](HfApi(endpoint=endpoint, token=token or False), progress=Teller(), **arguments)


class Teller:
    """Tells the parent how many bytes are done, not more often than it can use."""

    def __init__(self) -> None:
        self._told_at = 0.0

    def __call__(self, nbytes: int) -> None:
        now = time.monotonic()
        if now - self._told_at >= TELL_S:
            self._told_at = now
            say({"progress": nbytes})


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
