"""What every request gets: an id, a line in the log, and problems instead of the framework's plain errors."""

import re
import time

import structlog
from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from service.api.problems import framework_problem

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

log = structlog.get_logger(__name__)


class Envelope:
    """Goes around the whole application, the framework's own middleware included."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Exchange(scope, send).run(self.app, receive)


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope = scope
        self.send = send
        self.status = 0
        self.replaced = False
        inbound = Headers(scope=scope).get("x-request-id", "")
        self.request_id = inbound if REQUEST_ID.fullmatch(inbound) else f"req_{ULID()}"
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        start = time.perf_counter()
        with structlog.contextvars.bound_contextvars(request_id=self.request_id):
            try:
                await app(self.scope, receive, self._send)
            except Exception:
                # the framework has answered 500 before it let the error through
                log.exception("A request failed", action="request_failed", path=self.scope["path"])
                if not self.status:
                    await self._replace(500, {})
            log.info(
                "A request was answered",
                action="request_done",
                method=self.scope["method"],
                path=self.scope["path"],
                status=self.status,
                duration_s=round(time.perf_counter() - start, 4),
            )

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if message["status"] >= 400 and headers.get("content-type", "").startswith("text/plain"):
                kept = {name: headers[name] for name in ("allow", "content-range") if name in headers}
                await self._replace(message["status"], kept)
                return
            self._stamp(message)
        if not self.replaced:
            await self.send(message)

    async def _replace(self, status: int, headers: dict[str, str]) -> None:
        """The framework's plain text (413, 416, 500) as a problem."""
        self.replaced = True
        response = framework_problem(Request(self.scope), status, headers)

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._stamp(message)
            await self.send(message)

        await response(self.scope, _nothing, send)

    def _stamp(self, message: Message) -> None:
        self.status = message["status"]
        headers = MutableHeaders(scope=message)
        headers["X-Request-Id"] = self.request_id
        headers["X-Content-Type-Options"] = "nosniff"


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
