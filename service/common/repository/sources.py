"""Sources: which commit a job goes by, settled once."""

from typing import Any

from sqlalchemy.orm import Session

from service.common.events import EventType, log_data
from service.common.models import Job
from service.common.repository.claims import Claim, claimed_unit, lock_claimed_job
from service.common.repository.clock import now
from service.common.repository.events import append_event
from service.common.repository.job_row import change_job


def pin_source(session: Session, claim: Claim, source: dict[str, Any]) -> Job:
    """The job's source as it was found, with its `commit`: what every later unit, and a later start of this one, goes by."""
    job = lock_claimed_job(session, claim)
    claimed_unit(session, claim)
    if job.source == source:
        return job
    at = now(session)
    repo_id, commit = source["repo_id"], source["commit"]
    job = change_job(session, job, at, source=source)
    data = log_data("source_pinned", f"{repo_id} is at {commit}", repo_id=repo_id, commit=commit)
    append_event(session, job, EventType.LOG, data, at)
    return job
