"""The process that writes to a folder or a bucket: one request from stdin, JSON lines to stdout, as worker/hub/child.py has it.

    python -m worker.push

The store's own client may sleep and retry for minutes: this process can be killed in the middle of it.
"""

import errno
import json
import os
import sys
from typing import Any

from service.common.errors import HubError, ServiceError
from worker.death_signal import die_with_parent
from worker.hub.__main__ import Teller, say
from worker.push import at_url
from worker.push.files import PushFile
from worker.push.store import Store

FINAL = frozenset({errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.ELOOP})


def main() -> None:
    die_with_parent()
    request = json.loads(sys.stdin.buffer.read() or b"null")
    if request is None or os.getppid() != request.pop("parent"):
        os._exit(1)  # the parent died before the death signal was set
    request.pop("token")
    try:
        say({"result": perform(**request)})
    except BaseException as error:
        say({"error": describe(error, request["url"])})
    os._exit(0)


def perform(op: str, url: str, job_id: str, files: list[dict[str, Any]], overwrite: bool, stale: list[str]) -> Any:
    """One of `check`, `begin`, `upload` and `publish`."""
    store, listed = Store(url), [PushFile.from_dict(file) for file in files]
    match op:
        case "check":
            at_url.check(store, job_id, overwrite=overwrite)
        case "begin":
            marker = at_url.begin(store, job_id, listed, overwrite=overwrite)
            return None if marker is None else list(marker.stale)
        case "upload":
            at_url.upload(store, listed, Teller())
        case "publish":
            at_url.publish(store, at_url.Marker(job_id, tuple(stale)), listed)
    return None


def describe(error: BaseException, url: str) -> dict[str, Any]:
    """As worker.hub.faults has it. What a store says is told by its kind: it may hold what is nobody's business."""
    if isinstance(error, ServiceError):
        return _fault(error.code, error.detail, retryable=error.retryable)
    number = getattr(error, "errno", None)
    why = os.strerror(number) if isinstance(number, int) else type(error).__name__
    final = number in FINAL or isinstance(error, ValueError | PermissionError | FileNotFoundError | ImportError)
    if final or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return _fault("hub_refused", f"{url} cannot be written to: {why}", retryable=False)
    return _fault("hub_unavailable", f"{url} does not take the result now: {why}", retryable=True)


def _fault(code: str, message: str, *, retryable: bool) -> dict[str, Any]:
    kind = HubError.type if retryable else "user"
    return {"code": code, "type": kind, "message": message, "retryable": retryable, "retry_after_s": None}


if __name__ == "__main__":
    main()
