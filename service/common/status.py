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
    UPLOADING = "uploading"


class UnitKind(StrEnum):
    PLAN = "plan"
    PROFILE = "profile"
    SHARD = "shard"
    FINISH = "finish"
    PUSH = "push"


class UnitStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


MOVES: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset({JobStatus.CANCELLING, JobStatus.SUCCEEDED, JobStatus.FAILED}),
    # a result that was complete, and where it was to go, before the cancel reached its worker stands
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED, JobStatus.SUCCEEDED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset({JobStatus.RUNNING}),  # only by a retry of its upload
    JobStatus.CANCELLED: frozenset(),
}

TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})  # nothing more comes by itself
DISCARDED = frozenset(
    {JobStatus.FAILED, JobStatus.CANCELLED}
)  # their files go, but a whole result that failed to arrive


def leading_to(status: JobStatus) -> frozenset[JobStatus]:
    """The statuses a job may come from."""
    return frozenset(earlier for earlier, onward in MOVES.items() if status in onward)
