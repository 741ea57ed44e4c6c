"""Outcomes: what follows when a unit has succeeded, has stopped or is handed back."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.common.events import EventType, log_data
from service.common.models import Job, Unit
from service.common.repository.claims import Claim, claimed_unit, end_unit, lock_claimed_job
from service.common.repository.clock import now
from service.common.repository.events import append_event
from service.common.repository.job_row import end_job, enter_phase, settle_job
from service.common.repository.progress import count_progress
from service.common.repository.units import ShardWork, insert_units, queue_again, unit_context, unit_name
from service.common.status import JobStatus, Phase, UnitKind, UnitStatus


def plan_succeeded(session: Session, claim: Claim, shards: Sequence[ShardWork], *, profile: bool = False) -> Job:
    """The plan is stored: one unit to profile its source, or at once one for each of its shards."""
    if not shards:
        raise ValueError("a plan without shards has no end")
    job, at = end_unit(session, claim, UnitStatus.SUCCEEDED)
    if job.status != JobStatus.RUNNING:
        return settle_job(session, job, at)
    if not profile:
        return _begin_quantizing(session, job, shards, at, planned_at=at)
    nbytes = 2 * sum(shard.nbytes for shard in shards)  # each is hashed, then multiplied with
    job = enter_phase(session, job, Phase.PROFILING, nbytes, at, planned_at=at)
    insert_units(session, job, UnitKind.PROFILE, [ShardWork(0, nbytes)], at)
    return job


def profile_succeeded(session: Session, claim: Claim, shards: Sequence[ShardWork], entry: dict[str, Any]) -> Job:
    """The energies and the plan that names them are stored; `entry` is what the log says of them."""
    job, at = end_unit(session, claim, UnitStatus.SUCCEEDED, nbytes_done=Unit.nbytes_total)
    if job.status != JobStatus.RUNNING:
        return settle_job(session, job, at)
    append_event(session, job, EventType.LOG, entry, at)
    return _begin_quantizing(session, job, shards, at, profiled_at=at)


def _begin_quantizing(session: Session, job: Job, shards: Sequence[ShardWork], at: datetime, **values: Any) -> Job:
    job = enter_phase(session, job, Phase.QUANTIZING, sum(shard.nbytes for shard in shards), at, **values)
    insert_units(session, job, UnitKind.SHARD, shards, at)
    return job


def shard_succeeded(session: Session, claim: Claim, result: dict[str, Any], *, nbytes_out: int) -> Job:
    """The shard is on disk; the last one calls for the finish."""
    job, at = end_unit(
        session, claim, UnitStatus.SUCCEEDED, result=result, nbytes_out=nbytes_out, nbytes_done=Unit.nbytes_total
    )
    if job.status != JobStatus.RUNNING:
        return settle_job(session, job, at)
    job = count_progress(session, job, UnitKind.SHARD, at)
    open_shards, nbytes = session.execute(
        select(func.count().filter(Unit.status != UnitStatus.SUCCEEDED), func.sum(Unit.nbytes_out)).where(
            Unit.job_id == job.id, Unit.kind == UnitKind.SHARD
        )
    ).one()
    if open_shards:
        return job
    nbytes = int(nbytes)  # PostgreSQL sums bigints to a Decimal
    job = enter_phase(session, job, Phase.VERIFYING, nbytes, at, quantized_at=at)
    insert_units(session, job, UnitKind.FINISH, [ShardWork(0, nbytes)], at)
    return job


def shard_results(session: Session, job_id: str) -> list[dict[str, Any]]:
    """What the shards gave, in the order of the plan."""
    query = select(Unit.result).where(Unit.job_id == job_id, Unit.kind == UnitKind.SHARD).order_by(Unit.index)
    return [result for result in session.scalars(query) if result is not None]


def finish_succeeded(
    session: Session, claim: Claim, *, artifacts: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]
) -> Job:
    """The manifests are written: the result goes to the job's target or, without one, the job is done.

    Then a cancel comes too late; what has a target can still be stopped on its way.
    """
    job, at = end_unit(session, claim, UnitStatus.SUCCEEDED, nbytes_done=Unit.nbytes_total)
    if job.target is not None and job.status != JobStatus.RUNNING:
        return settle_job(session, job, at)
    for artifact in artifacts:
        append_event(session, job, EventType.ARTIFACT, artifact, at)
    result = {"outputs": list(outputs), "artifacts": list(artifacts)}
    if job.target is None:
        return _succeed(session, job, result, at)
    nbytes = sum(artifact["nbytes"] for artifact in artifacts)
    job = enter_phase(session, job, Phase.UPLOADING, nbytes, at, verified_at=at, result=result)
    insert_units(session, job, UnitKind.PUSH, [ShardWork(0, nbytes)], at)
    return job


def push_succeeded(session: Session, claim: Claim, pushed: dict[str, Any]) -> Job:
    """The result is where the job wanted it, `pushed` says where: the job is done, also where a cancel came too late."""
    job, at = end_unit(session, claim, UnitStatus.SUCCEEDED, nbytes_done=Unit.nbytes_total)
    return _succeed(session, job, {**(job.result or {}), "pushed": pushed}, at)


def _succeed(session: Session, job: Job, result: dict[str, Any], at: datetime) -> Job:
    if job.status == JobStatus.CANCELLING:
        data = log_data("cancel_too_late", "the result was complete before the cancel reached its worker")
        append_event(session, job, EventType.LOG, data, at)
    return end_job(session, job, JobStatus.SUCCEEDED, at, result=result, nbytes_done=job.nbytes_total or 0)


def unit_stopped(session: Session, claim: Claim) -> Job:
    """The unit has stopped because its job is no longer running."""
    job, at = end_unit(session, claim, UnitStatus.CANCELLED)
    return settle_job(session, job, at)


def hand_back(session: Session, claim: Claim) -> Job:
    """The worker has to go: the unit is queued again at once, and the start does not count."""
    job = lock_claimed_job(session, claim)
    unit = claimed_unit(session, claim)
    at = now(session)
    if job.status != JobStatus.RUNNING:
        return unit_stopped(session, claim)
    queue_again(session, unit, at, attempt=unit.attempt - 1)
    append_event(
        session,
        job,
        EventType.LOG,
        log_data("unit_handed_back", f"{unit_name(unit)} handed back", **unit_context(unit)),
    )
    return job
