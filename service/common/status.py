"""Where a job and a unit may stand, and the only moves between."""

from enum import StrEnum


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Phase(StrEnum):
    PREFLIGHT = "preflight"
    PROFILING = "profiling"
    QUANTIZING = "quantizing"
    VERIFYING = "verifying"


class UnitKind(StrEnum):
    PLAN = "plan"
    PROFILE = "profile"
    SHARD = "shard"
    FINISH = "finish"


class UnitStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


MOVES: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset({JobStatus.CANCELLING, JobStatus.SUCCEEDED, JobStatus.FAILED}),
    # a result that was complete before the cancel reached its worker stands
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED, JobStatus.SUCCEEDED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}

TERMINAL = frozenset(status for status, onward in MOVES.items() if not onward)
DISCARDED = frozenset({JobStatus.FAILED, JobStatus.CANCELLED})  # their files go


def leading_to(status: JobStatus) -> frozenset[JobStatus]:
    """The statuses a job may come from."""
    return frozenset(earlier for earlier, onward in MOVES.items() if status in onward)
