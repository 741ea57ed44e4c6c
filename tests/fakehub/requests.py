"""The log of requests: never a token, only whether there was one."""

import re
import threading
from dataclasses import dataclass


@dataclass
class Request:
    """One request; `status` is None while it is not answered, and where it never was."""

    method: str
    path: str  # unquoted
    query: str  # without signatures
    authorized: bool  # it came with an Authorization header
    range: str | None = None
    status: int | None = None
    received_nbytes: int = 0
    sent_nbytes: int = 0


class RequestLog:
    """All requests in the order they came; tests wait here for one to come."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._arrived = threading.Condition()

    def add(self, request: Request) -> None:
        with self._arrived:
            self._requests.append(request)
            self._arrived.notify_all()

    def find(self, path: str = "", method: str = "") -> list[Request]:
        """Those whose path holds, and whose whole method is, a regular expression."""
        with self._arrived:
            return self._found(path, method)

    def wait(self, path: str = "", method: str = "", count: int = 1, timeout_s: float = 30.0) -> list[Request]:
        """The same, once there are `count` of them."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self._found(path, method)) >= count, timeout_s):
                raise TimeoutError(
                    f"{len(self._found(path, method))} of {count} requests {method} {path} came in {timeout_s} s"
                )
            return self._found(path, method)

    def clear(self) -> None:
        with self._arrived:
            self._requests.clear()

    def _found(self, path: str, method: str) -> list[Request]:
        return [
            request
            for request in self._requests
            if re.search(path, request.path) and re.fullmatch(method or ".*", request.method)
        ]
