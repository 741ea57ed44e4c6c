"""What the client raises, as plain values with a code of service.common.errors and what to do about it."""

import errno
import re
from dataclasses import asdict, dataclass
from typing import Any

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hqq_core.errors import HalfquadError
from service.common.errors import HUB_ERRORS

BUSY = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
RATE_LIMIT = re.compile(r'"\w+"\s*;\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})')
MESSAGE_LENGTH = 500


class HubFault(Exception):
    """A fault found on this side of the connection."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Fault:
    """An error as it goes to the parent."""

    code: str
    type: str
    message: str
    retryable: bool
    retry_after_s: int | None = None


def describe(error: BaseException, request: dict[str, Any]) -> dict[str, Any]:
    """An error of a request, with advice, for the parent."""
    return asdict(describe_error(error, request))


def describe_error(error: BaseException, request: dict[str, Any] | None = None) -> Fault:
    request = request or {}
    error = _innermost(error)
    match error:
        case HubFault():
            return _fault(error.code, str(error))
        case HalfquadError():
            return Fault(error.code, "user", str(error), False)
        case HfHubHTTPError():
            return _refusal(error, request)
        case HFValidationError():
            return _fault("hub_refused", _clean(str(error)))
        case OfflineModeIsEnabled():
            return _fault("hub_unavailable", "HF_HUB_OFFLINE is set for the process that speaks with the Hub")
        case httpx2.HTTPError() | httpx2.InvalidURL() | httpx2.StreamError() | ConnectionError() | TimeoutError():
            return _fault("hub_unavailable", f"{_where(request)} cannot be reached: {_clean(_named(error))}")
        case OSError(errno=number) if number in FULL:
            return Fault("storage_full", "system", f"no room left for what the Hub sends: {error.strerror}", True)
        case MemoryError():
            return _fault("hub_unavailable", f"{_where(request)} sends an answer that is too large to be one")
        case _:
            return Fault("internal_error", "system", _clean(_named(error)), True)


def wanted_wait_s(response: httpx2.Response) -> int | None:
    """Seconds that the Hub asks to wait for, by either of its headers."""
    limit = RATE_LIMIT.search(response.headers.get("RateLimit", "")) if response.status_code == 429 else None
    wanted = limit[1] if limit else response.headers.get("Retry-After", "").strip()
    return int(wanted) if re.fullmatch(r"[0-9]{1,9}", wanted) else None


def _innermost(error: BaseException) -> BaseException:
    """The error of HTTP below what the client made of it, where there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HubFault | HfHubHTTPError | httpx2.HTTPError):
        cause = cause.__cause__
    return cause or error


def _refusal(error: HfHubHTTPError, request: dict[str, Any]) -> Fault:
    status, repo, where = error.response.status_code, request.get("repo_id", "the repository"), _where(request)
    said = _clean(error.server_message or "")
    if status in BUSY:
        wait_s = wanted_wait_s(error.response)
        return _fault("hub_unavailable", f"{where} answered {status}: {said or error.response.reason_phrase}", wait_s)
    if isinstance(error, GatedRepoError):
        advice = f"accept its terms at {where}/{repo} with the account of {_credential(request)}"
        return _fault("repo_gated", f"{repo} is gated: {advice}, or name another credential")
    if isinstance(error, DisabledRepoError):
        return _fault("repo_disabled", f"{repo} is disabled at {where}: choose another repository")
    if isinstance(error, RevisionNotFoundError):
        revision = request.get("revision") or request.get("commit")
        return _fault(
            "revision_not_found", f"{repo} has no branch, tag or commit {revision!r}: see {where}/{repo}/commits"
        )
    if status == 401 and request.get("token") and not isinstance(error, RepositoryNotFoundError):
        advice = "it may be expired, revoked or of another Hub: put a valid one in its place"
        return _fault("token_refused", f"{where} does not know the token of {_credential(request)}: {advice}")
    if isinstance(error, RepositoryNotFoundError) or status == 401:  # over plain http the client leaves a 401 as it is
        advice = f"check its name, or name a credential whose account may read it (asked with {_credential(request)})"
        return _fault(
            "repo_not_found", f"{where} shows no model {repo}: it is missing or private, which no Hub tells: {advice}"
        )
    if status == 403:
        advice = "use a token with more rights, or another credential"
        return _fault("token_refused", f"{where} does not allow this to {_credential(request)}: {said}: {advice}")
    return _fault("hub_refused", f"{where} answered {status}: {said or error.response.reason_phrase}")


def _fault(code: str, message: str, retry_after_s: int | None = None) -> Fault:
    kind = HUB_ERRORS[code]
    return Fault(code, kind.type, message, kind.retryable, retry_after_s)


def _where(request: dict[str, Any]) -> str:
    return str(request.get("endpoint", "the Hub"))


def _credential(request: dict[str, Any]) -> str:
    if request.get("credential"):
        return f"credential {request['credential']!r}"
    return "the token" if request.get("token") else "no credential"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _clean(text: str) -> str:
    """What others wrote, as one printable line of bounded length."""
    line = " ".join(text.split())[:MESSAGE_LENGTH]
    return "".join(each if each.isprintable() else "?" for each in line)
