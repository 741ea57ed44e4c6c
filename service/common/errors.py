"""What can go wrong, with a stable code, an HTTP status, whose fault it is, and whether trying again helps.

ServiceError
├── Refused                  the request cannot be done as asked (user)
│   ├── RequestInvalid       422 request_invalid
│   ├── RecipeRefused        422 the library's own code
│   ├── SourceNotAllowed     422 source_not_allowed
│   ├── SourceNotFound       422 source_not_found
│   ├── IdempotencyKeyReused 422 idempotency_key_reused
│   ├── IdempotencyBusy      409 idempotency_in_progress
│   ├── JobTerminal          409 job_terminal
│   ├── JobNotRetryable      409 job_not_retryable
│   ├── NotFound             404 job_not_found, artifact_not_found, watch_not_found
│   ├── CredentialUnknown    422 credential_unknown
│   ├── TargetNotAllowed     422 target_not_allowed
│   └── HubRefused           422 hub_refused: a Hub will not do it, or has it not; a HubError
│       ├── RepoNotFound         repo_not_found
│       ├── RepoGated            repo_gated
│       ├── RepoDisabled         repo_disabled
│       ├── RevisionNotFound     revision_not_found
│       ├── TokenRefused         token_refused
│       ├── RepoExists           repo_exists
│       └── NamespaceNotAllowed  namespace_not_allowed
├── HubError                 what came of asking a Hub (upstream)
│   ├── HubRefused           as above
│   ├── HubUnavailable   503 hub_unavailable (retryable)
│   └── SourceDamaged    502 source_damaged: not the bytes the Hub says it has (retryable)
├── CredentialsInvalid       500 the file of credentials cannot be used
├── Unavailable              503 the service cannot do it now (system, retryable)
├── NotMigrated              503 database_not_migrated
├── StaleJob                 409 another writer changed the job first (retryable)
├── ResultDamaged        500 what was written is not what was solved (system, retryable)
├── StorageReadOnly      500 the data directory cannot be written to (system, retryable)
├── WorkerLost               500 the worker of a unit died too often (system, retryable)
└── LeaseLost                500 the unit is no longer ours: stop, write nothing
"""

from dataclasses import dataclass
from typing import Any, Literal

from hqq_core.errors import HalfquadError, StorageFullError

Fault = Literal["user", "system", "upstream"]


@dataclass(frozen=True)
class FieldError:
    """One field at fault; the pointer is a JSON pointer into the body, or names a header or parameter."""

    pointer: str
    code: str
    detail: str


class ServiceError(Exception):
    code = "internal_error"
    status = 500
    type: Fault = "system"
    retryable = False

    def __init__(self, detail: str, *, errors: tuple[FieldError, ...] = (), retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.retry_after_s = retry_after_s


class Refused(ServiceError):
    code = "refused"
    status = 422
    type: Fault = "user"


class RequestInvalid(Refused):
    code = "request_invalid"


class RecipeRefused(Refused):
    """A recipe the library refuses, with the library's code and field."""

    def __init__(self, code: str, detail: str, pointer: str) -> None:
        super().__init__(detail, errors=(FieldError(pointer, code, detail),))
        self.code = code


class SourceNotAllowed(Refused):
    code = "source_not_allowed"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, errors=(FieldError("/source/path", self.code, detail),))


class SourceNotFound(Refused):
    code = "source_not_found"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, errors=(FieldError("/source/path", self.code, detail),))


class IdempotencyKeyReused(Refused):
    code = "idempotency_key_reused"


class IdempotencyBusy(Refused):
    code = "idempotency_in_progress"
    status = 409
    retryable = True


class JobTerminal(Refused):
    code = "job_terminal"
    status = 409


class JobNotRetryable(Refused):
    code = "job_not_retryable"
    status = 409


class NotFound(Refused):
    status = 404

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class CredentialUnknown(Refused):
    code = "credential_unknown"


class TargetNotAllowed(Refused):
    code = "target_not_allowed"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, errors=(FieldError("/target/url", self.code, detail),))


class HubError(ServiceError):
    code = "hub_error"
    type: Fault = "upstream"


class HubRefused(Refused, HubError):
    code = "hub_refused"


class RepoNotFound(HubRefused):
    code = "repo_not_found"


class RepoGated(HubRefused):
    code = "repo_gated"


class RepoDisabled(HubRefused):
    code = "repo_disabled"


class RevisionNotFound(HubRefused):
    code = "revision_not_found"


class TokenRefused(HubRefused):
    code = "token_refused"


class RepoExists(HubRefused):
    code = "repo_exists"


class NamespaceNotAllowed(HubRefused):
    code = "namespace_not_allowed"


class HubUnavailable(HubError):
    code = "hub_unavailable"
    status = 503
    retryable = True


class SourceDamaged(HubError):
    code = "source_damaged"
    status = 502
    retryable = True


class CredentialsInvalid(ServiceError):
    code = "credentials_invalid"


class Unavailable(ServiceError):
    code = "unavailable"
    status = 503
    retryable = True


class NotMigrated(ServiceError):
    code = "database_not_migrated"
    status = 503


class StaleJob(ServiceError):
    code = "job_changed"
    status = 409
    retryable = True


class ResultDamaged(ServiceError):
    code = "result_damaged"
    retryable = True


class StorageReadOnly(ServiceError):
    """Not for good: a file system that met an error is mounted so until somebody looks."""

    code = "storage_read_only"
    retryable = True


class WorkerLost(ServiceError):
    code = "worker_lost"
    retryable = True


class LeaseLost(ServiceError):
    code = "lease_lost"


HUB_ERRORS: dict[str, type[HubError]] = {
    kind.code: kind
    for kind in (
        HubRefused,
        RepoNotFound,
        RepoGated,
        RepoDisabled,
        RevisionNotFound,
        TokenRefused,
        RepoExists,
        NamespaceNotAllowed,
        HubUnavailable,
        SourceDamaged,
    )
}
"""By code, as the process that speaks with the Hub tells them."""


@dataclass(frozen=True)
class JobError:
    """Why a job failed, as the API shows it."""

    code: str
    type: Fault
    message: str
    retryable: bool

    def to_dict(self) -> dict[str, Any]:
        return {"code": self.code, "type": self.type, "message": self.message, "retryable": self.retryable}


def describe(error: BaseException) -> JobError:
    """The error as a job's `error`: ours speak for themselves, anything else is ours to mend."""
    match error:
        case ServiceError():
            return JobError(error.code, error.type, error.detail, error.retryable)
        case StorageFullError():
            return JobError(error.code, "system", str(error), True)
        case HalfquadError():
            return JobError(error.code, "user", str(error), False)
        case _:
            return JobError("internal_error", "system", f"{type(error).__name__}: {error}", True)


def is_final(error: BaseException) -> bool:
    """Whether starting the unit again cannot help."""
    return isinstance(error, HalfquadError | Refused)
