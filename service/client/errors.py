"""What a call can end in.

HalfquadClientError
├── ConnectionFailed         no answer; whether the request was done is not known
├── DownloadError            a file arrived that is not the one that was listed
└── ApiError                 a problem (RFC 9457) of the service; `code` is stable
    ├── InvalidRequestError  400, 413, 422; `errors` names the fields
    ├── NotFoundError        404
    ├── ConflictError        409
    └── ServerError          500 and above
"""

from dataclasses import dataclass
from typing import Any

import httpx


class HalfquadClientError(Exception):
    """Root of all errors of the client."""


class ConnectionFailed(HalfquadClientError):
    """The service gave no answer."""


class DownloadError(HalfquadClientError):
    """The bytes are not those that were announced."""


@dataclass(frozen=True)
class FieldProblem:
    """One field at fault."""

    pointer: str
    code: str
    detail: str


class ApiError(HalfquadClientError):
    """The service said no, and why."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status = status
        self.code: str = body.get("code", f"http_{status}")
        self.title: str = body.get("title", "")
        self.detail: str = body.get("detail", "")
        self.request_id: str = body.get("request_id", "")
        self.retryable: bool = body.get("retryable", status >= 500)
        self.errors = tuple(
            FieldProblem(item["pointer"], item["code"], item["detail"]) for item in body.get("errors", ())
        )
        super().__init__(f"{self.code}: {self.detail}" if self.detail else self.code)


class InvalidRequestError(ApiError):
    pass


class NotFoundError(ApiError):
    pass


class ConflictError(ApiError):
    pass


class ServerError(ApiError):
    pass


KINDS = {
    400: InvalidRequestError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidRequestError,
    422: InvalidRequestError,
}


def raise_for(response: httpx.Response) -> None:
    """Raise the problem that the response is, if it is one; its body must have been read."""
    if response.status_code < 400:
        return
    try:
        body = response.json()
    except ValueError:
        body = {"detail": response.text[:200]}  # a proxy, not the service
    kind = KINDS.get(response.status_code, ServerError if response.status_code >= 500 else ApiError)
    raise kind(response.status_code, body)
