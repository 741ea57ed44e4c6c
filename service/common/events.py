"""What a job tells those who follow it: the types and their data."""

from enum import StrEnum
from typing import Any

from service.common.models import Job
from service.common.status import JobStatus


class EventType(StrEnum):
    STATUS = "status"
    PROGRESS = "progress"
    LOG = "log"
    ARTIFACT = "artifact"
    DONE = "done"


def status_data(job: Job) -> dict[str, Any]:
    return {"status": job.status, "phase": job.phase}


def log_data(action: str, message: str, **context: Any) -> dict[str, Any]:
    return {"action": action, "message": message, **context}


def done_data(job: Job) -> dict[str, Any]:
    """The last event: a follower needs no further request to know how it ended."""
    data: dict[str, Any] = {"status": job.status}
    if job.status == JobStatus.FAILED:
        data["error"] = job.error
    if job.status == JobStatus.SUCCEEDED and job.result is not None:
        data |= {name: job.result[name] for name in ("outputs", "pushed") if name in job.result}
    return data
