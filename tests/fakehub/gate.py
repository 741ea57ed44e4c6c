"""What every request passes: the log, the faults, the redirects of renamed repos."""

import asyncio
import re
from collections.abc import Callable, Iterable
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.fakehub.connections import Connections
from tests.fakehub.errors import refusal_headers
from tests.fakehub.faults import Armed, Fault, Faults, Line
from tests.fakehub.requests import Request, RequestLog
from tests.fakehub.state import Hub

CONTROL = "/_control/"
SLICE_S = 0.05  # a slow body comes in as many pieces
SIGNATURE = re.compile(r"&?signature=[0-9a-f]+")
RATE_LIMIT = {"RateLimit": '"api";r=999;t=300', "RateLimit-Policy": '"fixed window";"api";q=1000;w=300'}


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, hub: Hub, faults: Faults, log: RequestLog, connections: Connections) -> None:
        self.app, self.hub, self.faults, self.log, self.connections = app, hub, faults, log, connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        raw_path = scope["raw_path"].decode()
        path, method = unquote(raw_path), scope["method"]
        scope = {**scope, "path": raw_path}  # routes are matched before %2F becomes a slash
        if path.startswith(CONTROL):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        query = SIGNATURE.sub("", scope["query_string"].decode())
        request = Request(method, path, query, "Authorization" in headers, headers.get("Range"))
        self.log.add(request)
        app = self.app if (target := self._renamed(raw_path)) is None else _redirect(target, scope)
        passage = _Passage(scope, receive, send, request, self.faults.meeting(method, path), self.connections)
        await passage.run(app)

    def _renamed(self, path: str) -> str | None:
        """The path with a repo's new name where it has an old one."""
        for old, new in self.hub.renamed.items():
            if found := re.match(rf"(/(?:api/models/)?){re.escape(old)}(?=$|/|\.git/)", path):
                return found[1] + new + path[found.end() :]
        return None


def _redirect(path: str, scope: Scope) -> ASGIApp:
    query = scope["query_string"].decode()
    return RedirectResponse(path + (f"?{query}" if query else ""), 307)


class _Passage:
    """One request on its way through the faults that meet it."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        request: Request,
        armed: list[Armed],
        connections: Connections,
    ) -> None:
        self.scope, self.request, self.connections = scope, request, connections
        faults = [each.fault for each in armed]
        self.before = [fault for fault in faults if not fault.after]
        self.behind = [fault for fault in faults if fault.after]
        self.download = _slowest(each.line("download_rate") for each in armed)
        self.upload = _slowest(each.line("upload_rate") for each in armed)
        self.truncate_at = min((f.truncate_at for f in faults if f.truncate_at is not None), default=None)
        self._receive, self._send = receive, send
        self.over = False  # the connection was cut, or the answer given: nothing more is sent

    async def run(self, app: ASGIApp) -> None:
        try:
            if await self._strike(self.before):
                return
            if not self.behind:
                await app(self.scope, self.receive, self.send)
                return
            held: list[Message] = []

            async def hold(message: Message) -> None:
                held.append(message)

            await app(self.scope, self.receive, hold)
            if not await self._strike(self.behind):
                for message in held:
                    await self.send(message)
        except ClientDisconnect:
            pass

    async def _strike(self, faults: list[Fault]) -> bool:
        """Let faults happen; true where the request has met its end by one."""
        for fault in faults:
            await asyncio.sleep(fault.delay_s)
            if fault.reset:
                await self._end(self.connections.reset)
                return True
            if fault.status is not None:
                await _answer(fault, fault.status)(self.scope, self._receive, self.send)
                return True
        return False

    async def receive(self) -> Message:
        message = await self._receive()
        nbytes = len(message.get("body", b""))
        self.request.received_nbytes += nbytes
        if self.upload is not None:
            await asyncio.sleep(self.upload.take(nbytes))
        return message

    async def send(self, message: Message) -> None:
        if self.over:
            return
        if message["type"] == "http.response.start":
            self.request.status = message["status"]
            headers = MutableHeaders(raw=message["headers"])
            for name, value in RATE_LIMIT.items():
                headers.setdefault(name, value)
            await self._send({**message, "headers": headers.raw})
            return
        for piece in self._pieces(message):
            await self._send(piece)
            self.request.sent_nbytes += len(piece["body"]) if self.request.method != "HEAD" else 0
            if self.download is not None:
                await asyncio.sleep(self.download.take(len(piece["body"])))
        if self.truncate_at is not None and self.request.sent_nbytes >= self.truncate_at:
            await self._end(self.connections.close)

    async def _end(self, cut: Callable[[Scope], None]) -> None:
        """Cut the connection, and wait until it is."""
        self.over = True
        cut(self.scope)
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _pieces(self, message: Message) -> list[Message]:
        """A part of the body in slices as slow as wanted, no more of it than wanted."""
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.truncate_at is not None:
            body, more = body[: self.truncate_at - self.request.sent_nbytes], True
        size = max(1, int(self.download.rate * SLICE_S) if self.download else len(body))
        slices = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
        last = len(slices) - 1
        return [
            {"type": "http.response.body", "body": piece, "more_body": more or index < last}
            for index, piece in enumerate(slices)
        ]


def _slowest(lines: Iterable[Line | None]) -> Line | None:
    return min((line for line in lines if line is not None), key=lambda line: line.rate, default=None)


def _answer(fault: Fault, status: int) -> JSONResponse:
    headers = refusal_headers(fault.code, fault.message)
    if fault.retry_after_s is not None:
        headers["Retry-After"] = str(fault.retry_after_s)
        if status == 429:
            headers["RateLimit"] = f'"api";r=0;t={fault.retry_after_s}'
    return JSONResponse({"error": fault.message}, status, headers)
