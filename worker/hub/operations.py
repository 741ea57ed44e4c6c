"""What the child can be asked for, by name: functions of the client, their arguments and `progress`, to plain values."""

from collections.abc import Callable
from typing import Any

from worker.hub import writing
from worker.hub.listing import head, resolve
from worker.hub.reading import download, fetch_small

OPERATIONS: dict[str, Callable[..., Any]] = {
    "head": head,
    "resolve": resolve,
    "fetch_small": fetch_small,
    "download": download,
    "whoami": writing.whoami,
    "target": writing.target,
    "prepare": writing.prepare,
    "preupload": writing.preupload,
    "commit": writing.commit,
    "pull_requests": writing.pull_requests,
    "open_pull_request": writing.open_pull_request,
    "set_status": writing.set_status,
}
