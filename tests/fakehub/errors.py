"""Refusals, as the Hub words them: a status, a code the client reads, a message."""

import uuid

from fastapi import Request
from fastapi.responses import JSONResponse


class Refusal(Exception):
    """An answer other than success; `code` becomes X-Error-Code, from which the client picks its exception class."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: object) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


def repo_not_found(known_caller: bool) -> Refusal:
    """The Hub does not tell a missing repo from a private one; without a token it says 401 for both."""
    if known_caller:
        return Refusal(404, "Repository not found", "RepoNotFound")
    return Refusal(401, "Invalid username or password.", "RepoNotFound")


def revision_not_found(revision: str) -> Refusal:
    return Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str) -> Refusal:
    return Refusal(404, f"Entry not found: {path}", "EntryNotFound")


def refusal_headers(code: str | None, message: str) -> dict[str, str]:
    headers = {"X-Error-Message": message.encode("ascii", "replace").decode(), "X-Request-Id": f"Root={uuid.uuid4()}"}
    return headers | ({"X-Error-Code": code} if code else {})


def answer_refusal(_: Request, refusal: Exception) -> JSONResponse:
    """What FastAPI sends for a Refusal."""
    assert isinstance(refusal, Refusal)
    body = {"error": refusal.message} | refusal.extra
    return JSONResponse(body, refusal.status, refusal_headers(refusal.code, refusal.message))
