"""All queries. Nothing here commits: the caller's `with database.write()` does.

Whoever changes a job or its units locks the job row first. So writers of one job go one after the other, two of them
never wait for each other, and what is read under the lock is what is written back.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, and_, delete, func, insert, or_, select, text, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.common.errors import (
    FieldError,
    IdempotencyBusy,
    JobError,
    JobTerminal,
    LeaseLost,
    NotFound,
    RequestInvalid,
    StaleJob,
    WorkerLost,
    describe,
)
from service.common.events import EventType, done_data, log_data, status_data
from service.common.models import JOB_ID, Event, IdempotencyRecord, Job, Lease, Outbox, Unit, UtcDateTime, new_id
from service.common.status import DISCARDED, JobStatus, Phase, UnitKind, UnitStatus, leading_to

WORKER_LEASE = "worker:"


@dataclass(frozen=True)
class Claim:
    """A unit that is ours until its lease runs out; every write names its fence."""

    unit_id: str
    job_id: str
    kind: UnitKind
    index: int
    attempt: int
    fence: int
    owner: str
    source: dict[str, Any]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class ShardWork:
    """A shard of a plan, as its unit is made."""

    index: int
    nbytes: int


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list holds."""

    statuses: tuple[JobStatus, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    created_after: datetime | None = None
    created_before: datetime | None = None
    q: str | None = None


@dataclass(frozen=True)
class Page:
    """A stretch of a list, and whether there is more in the direction of reading."""

    jobs: list[Job]
    has_more: bool


def now(session: Session) -> datetime:
    """The database's clock: the one that all machines share."""
    if session.get_bind().dialect.name == "sqlite":
        return datetime.now(UTC)
    return session.scalars(select(func.clock_timestamp(type_=UtcDateTime()))).one()


def ping(session: Session) -> None:
    session.execute(text("SELECT 1"))


# Jobs


def insert_job(
    session: Session,
    *,
    source: dict[str, Any],
    recipe: dict[str, Any],
    labels: dict[str, str],
    priority: int,
    max_attempts: int,
) -> Job:
    """A queued job, its plan unit, its way to the broker and its first event."""
    at = now(session)
    job = Job(
        id=new_id("job"),
        status=JobStatus.QUEUED,
        phase=None,
        version=1,
        event_seq=0,
        source=source,
        recipe=recipe,
        labels=labels,
        priority=priority,
        attempt=0,
        max_attempts=max_attempts,
        nbytes_done=0,
        nbytes_total=None,
        created_at=at,
        updated_at=at,
        queued_at=at,
    )
    session.add(job)
    session.flush()
    _insert_units(session, job, UnitKind.PLAN, [ShardWork(0, 0)], at)
    append_event(session, job, EventType.STATUS, status_data(job), at)
    return job


def get_job(session: Session, job_id: str) -> Job:
    job = _find_job(session, job_id)
    if job is None:
        raise NotFound("job_not_found", f"there is no job {job_id!r}")
    return job


def list_jobs(
    session: Session,
    where: JobFilter,
    *,
    limit: int,
    after: str | None = None,
    before: str | None = None,
    ascending: bool = False,
) -> Page:
    """Jobs by (created_at, id), the newest first unless ascending, after or before the cursor job."""
    backwards = before is not None
    rising = ascending != backwards
    key = tuple_(Job.created_at, Job.id)
    query = select(Job).where(*_conditions(where))
    if cursor := after or before:
        at = _find_job(session, cursor)
        if at is None:
            name = "query/before" if backwards else "query/after"
            raise RequestInvalid("unknown cursor", errors=(FieldError(name, "cursor_unknown", f"no job {cursor!r}"),))
        edge = tuple_(at.created_at, at.id)
        query = query.where(key > edge if rising else key < edge)
    order = (Job.created_at.asc(), Job.id.asc()) if rising else (Job.created_at.desc(), Job.id.desc())
    found = list(session.scalars(query.order_by(*order).limit(limit + 1)))
    jobs = found[:limit]
    return Page(jobs[::-1] if backwards else jobs, has_more=len(found) > limit)


def _conditions(where: JobFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [Job.labels[key].as_string() == value for key, value in where.labels]
    if where.statuses:
        conditions.append(Job.status.in_(where.statuses))
    if where.created_after is not None:
        conditions.append(Job.created_at > where.created_after)
    if where.created_before is not None:
        conditions.append(Job.created_at < where.created_before)
    if where.q:
        conditions.append(
            or_(
                Job.id.icontains(where.q, autoescape=True),
                Job.source["path"].as_string().icontains(where.q, autoescape=True),
            )
        )
    return conditions


def cancel_job(session: Session, job_id: str) -> Job:
    """Stop what has not begun; a running unit sees the status and stops itself."""
    job = _find_job(session, job_id) and _lock_job(session, job_id)
    if job is None:
        raise NotFound("job_not_found", f"there is no job {job_id!r}")
    if job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED):
        return job
    if job.is_terminal:
        raise JobTerminal(f"the job has already {job.status}")
    at = now(session)
    _drop_queued_units(session, job, at)
    if job.status == JobStatus.QUEUED:
        return _end_job(session, job, JobStatus.CANCELLED, at)
    job = _move_job(session, job, JobStatus.CANCELLING, at)
    return _settle(session, job, at)


def discarded_jobs(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Those of the jobs whose files are to go and that nobody works on any more."""
    busy = select(Unit.job_id).where(Unit.status == UnitStatus.RUNNING)
    return set(
        session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.status.in_(DISCARDED), Job.id.not_in(busy)))
    )


def _find_job(session: Session, job_id: str) -> Job | None:
    """The job of an id that a user wrote: PostgreSQL refuses some strings."""
    return session.get(Job, job_id) if JOB_ID.fullmatch(job_id) else None


def _lock_job(session: Session, job_id: str) -> Job | None:
    # SQLite has no FOR UPDATE: there, write() has locked the whole file
    return session.get(Job, job_id, with_for_update=True, populate_existing=True)


def _change_job(session: Session, job: Job, at: datetime, *conditions: ColumnElement[bool], **values: Any) -> Job:
    """Compare-and-set: the job as changed, one version on."""
    changed = session.scalars(
        update(Job)
        .where(Job.id == job.id, Job.version == job.version, *conditions)
        .values(version=Job.version + 1, updated_at=at, **values)
        .returning(Job),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).one_or_none()
    if changed is None:
        raise StaleJob(f"{job.id} is no longer {job.status} at version {job.version}")
    return changed


def _move_job(session: Session, job: Job, to: JobStatus, at: datetime, **values: Any) -> Job:
    """Move along the table of status.py, and say so."""
    job = _change_job(session, job, at, Job.status.in_(leading_to(to)), status=to, **values)
    append_event(session, job, EventType.STATUS, status_data(job), at)
    return job


def _end_job(session: Session, job: Job, to: JobStatus, at: datetime, **values: Any) -> Job:
    job = _move_job(session, job, to, at, finished_at=at, **values)
    append_event(session, job, EventType.DONE, done_data(job), at)
    return job


def _enter_phase(session: Session, job: Job, phase: Phase, nbytes_total: int, at: datetime, **values: Any) -> Job:
    job = _change_job(session, job, at, phase=phase, nbytes_done=0, nbytes_total=nbytes_total, **values)
    append_event(session, job, EventType.STATUS, status_data(job), at)
    return job


def _settle(session: Session, job: Job, at: datetime) -> Job:
    """A job being cancelled is cancelled once the last of its units has stopped."""
    running = select(Unit.id).where(Unit.job_id == job.id, Unit.status == UnitStatus.RUNNING).limit(1)
    if job.status != JobStatus.CANCELLING or session.scalar(running) is not None:
        return job
    return _end_job(session, job, JobStatus.CANCELLED, at)


# Events


def append_event(
    session: Session, job: Job, type: EventType, data: dict[str, Any], at: datetime | None = None
) -> Event:
    """The job's next event; the counter on its row leaves no gap and holds back the next writer until we commit."""
    seq = session.scalars(
        update(Job).where(Job.id == job.id).values(event_seq=Job.event_seq + 1).returning(Job.event_seq),
        execution_options={"synchronize_session": False},
    ).one()
    event = Event(job_id=job.id, seq=seq, type=type, data=data, created_at=at or now(session))
    session.add(event)
    return event


def list_events(session: Session, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
    query = select(Event).where(Event.job_id == job_id, Event.seq > after).order_by(Event.seq).limit(limit)
    return list(session.scalars(query))


# Units: claim, renew, end


def claim_unit(session: Session, unit_id: str, *, owner: str, lease_s: float) -> Claim | None:
    """Make a queued unit ours; None when it is not there to be had, and then there is nothing to do."""
    job_id = session.scalar(select(Unit.job_id).where(Unit.id == unit_id))
    job = _lock_job(session, job_id) if job_id else None
    if job is None:
        return None
    at = now(session)
    unit = session.scalars(
        update(Unit)
        .where(
            Unit.id == unit_id,
            Unit.status == UnitStatus.QUEUED,
            Unit.available_at <= at,
            Unit.job_id.in_(select(Job.id).where(Job.status.in_((JobStatus.QUEUED, JobStatus.RUNNING)))),
        )
        .values(
            status=UnitStatus.RUNNING,
            attempt=Unit.attempt + 1,
            fence=Unit.fence + 1,
            lease_owner=owner,
            lease_expires_at=at + timedelta(seconds=lease_s),
            nbytes_done=0,
            started_at=func.coalesce(Unit.started_at, at),
        )
        .returning(Unit),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).one_or_none()
    if unit is None:
        return None
    session.execute(delete(Outbox).where(Outbox.unit_id == unit.id))
    if job.status == JobStatus.QUEUED:
        job = _move_job(session, job, JobStatus.RUNNING, at, phase=Phase.PREFLIGHT, started_at=at)
    if unit.attempt > job.attempt:
        job = _change_job(session, job, at, attempt=unit.attempt)
    data = log_data("unit_claimed", f"{_name(unit)} taken", **_context(unit), worker=owner)
    append_event(session, job, EventType.LOG, data, at)
    return Claim(
        unit.id, unit.job_id, unit.kind, unit.index, unit.attempt, unit.fence, owner, dict(job.source), dict(job.recipe)
    )


def renew_lease(session: Session, claim: Claim, *, lease_s: float) -> JobStatus:
    """Keep the unit ours; the job's status says whether to go on. LeaseLost when it is no longer ours."""
    at = now(session)
    _change_unit(session, claim, lease_expires_at=at + timedelta(seconds=lease_s))
    return session.scalars(select(Job.status).where(Job.id == claim.job_id)).one()


def save_progress(session: Session, claim: Claim, nbytes_done: int, *, lease_s: float) -> JobStatus:
    """Write how far the unit is and renew its lease; an event for every whole percent of the phase."""
    job = _lock_claimed_job(session, claim)
    at = now(session)
    _change_unit(session, claim, nbytes_done=nbytes_done, lease_expires_at=at + timedelta(seconds=lease_s))
    if job.status == JobStatus.RUNNING:
        _count_progress(session, job, claim.kind, at)
    return job.status


def plan_succeeded(session: Session, claim: Claim, shards: Iterable[ShardWork]) -> Job:
    """The plan is stored: one unit for each of its shards."""
    shards = list(shards)
    if not shards:
        raise ValueError("a plan without shards has no end")
    job, at = _end_unit(session, claim, UnitStatus.SUCCEEDED)
    if job.status != JobStatus.RUNNING:
        return _settle(session, job, at)
    job = _enter_phase(session, job, Phase.QUANTIZING, sum(shard.nbytes for shard in shards), at, planned_at=at)
    _insert_units(session, job, UnitKind.SHARD, shards, at)
    return job


def shard_succeeded(session: Session, claim: Claim, result: dict[str, Any], *, nbytes_out: int) -> Job:
    """The shard is on disk; the last one calls for the finish."""
    job, at = _end_unit(
        session, claim, UnitStatus.SUCCEEDED, result=result, nbytes_out=nbytes_out, nbytes_done=Unit.nbytes_total
    )
    if job.status != JobStatus.RUNNING:
        return _settle(session, job, at)
    job = _count_progress(session, job, UnitKind.SHARD, at)
    open_shards, nbytes = session.execute(
        select(func.count().filter(Unit.status != UnitStatus.SUCCEEDED), func.sum(Unit.nbytes_out)).where(
            Unit.job_id == job.id, Unit.kind == UnitKind.SHARD
        )
    ).one()
    if open_shards:
        return job
    nbytes = int(nbytes)  # PostgreSQL sums bigints to a Decimal
    job = _enter_phase(session, job, Phase.VERIFYING, nbytes, at, quantized_at=at)
    _insert_units(session, job, UnitKind.FINISH, [ShardWork(0, nbytes)], at)
    return job


def shard_results(session: Session, job_id: str) -> list[dict[str, Any]]:
    """What the shards gave, in the order of the plan."""
    query = select(Unit.result).where(Unit.job_id == job_id, Unit.kind == UnitKind.SHARD).order_by(Unit.index)
    return [result for result in session.scalars(query) if result is not None]


def finish_succeeded(
    session: Session, claim: Claim, *, artifacts: Sequence[dict[str, Any]], metrics: dict[str, Any]
) -> Job:
    """The manifest is written: the job is done, also where a cancel came too late."""
    job, at = _end_unit(session, claim, UnitStatus.SUCCEEDED, nbytes_done=Unit.nbytes_total)
    if job.status == JobStatus.CANCELLING:
        data = log_data("cancel_too_late", "the result was complete before the cancel reached its worker")
        append_event(session, job, EventType.LOG, data, at)
    for artifact in artifacts:
        append_event(session, job, EventType.ARTIFACT, artifact, at)
    result = {"artifacts": list(artifacts), "metrics": metrics}
    return _end_job(session, job, JobStatus.SUCCEEDED, at, result=result, nbytes_done=job.nbytes_total or 0)


def unit_stopped(session: Session, claim: Claim) -> Job:
    """The unit has stopped because its job is no longer running."""
    job, at = _end_unit(session, claim, UnitStatus.CANCELLED)
    return _settle(session, job, at)


def unit_failed(
    session: Session, claim: Claim, error: JobError, *, final: bool, backoff_s: float, backoff_limit_s: float
) -> Job:
    """Start the unit again after a while or, where that cannot help or was tried often enough, fail the job."""
    job = _lock_claimed_job(session, claim)
    unit = _claimed_unit(session, claim)
    return _fail_unit(session, job, unit, error, final=final, backoff_s=backoff_s, backoff_limit_s=backoff_limit_s)


def hand_back(session: Session, claim: Claim) -> Job:
    """The worker has to go: the unit is queued again at once, and the start does not count."""
    job = _lock_claimed_job(session, claim)
    unit = _claimed_unit(session, claim)
    at = now(session)
    if job.status != JobStatus.RUNNING:
        return unit_stopped(session, claim)
    _queue_again(session, unit, at, attempt=unit.attempt - 1)
    append_event(
        session, job, EventType.LOG, log_data("unit_handed_back", f"{_name(unit)} handed back", **_context(unit))
    )
    return job


def expired_units(session: Session, *, limit: int = 100) -> list[str]:
    """Running units whose worker has not been heard of for too long."""
    query = select(Unit.id).where(Unit.status == UnitStatus.RUNNING, Unit.lease_expires_at < now(session)).limit(limit)
    return list(session.scalars(query))


def expire_units(session: Session, owner: str) -> None:
    """End the leases of a worker known to be dead; the next round of reaping takes its units."""
    session.execute(
        update(Unit)
        .where(Unit.status == UnitStatus.RUNNING, Unit.lease_owner == owner)
        .values(lease_expires_at=now(session) - timedelta(seconds=1))
    )


def reap_unit(session: Session, unit_id: str, *, backoff_s: float, backoff_limit_s: float) -> Job | None:
    """Take a unit from the worker that was lost with it; None when it came back meanwhile."""
    job_id = session.scalar(select(Unit.job_id).where(Unit.id == unit_id))
    job = _lock_job(session, job_id) if job_id else None
    unit = session.get(Unit, unit_id, populate_existing=True)
    if job is None or unit is None or unit.status != UnitStatus.RUNNING:
        return None
    if unit.lease_expires_at is not None and unit.lease_expires_at >= now(session):
        return None
    error = describe(WorkerLost(f"the worker of {_name(unit)} was lost; start {unit.attempt} of {job.max_attempts}"))
    return _fail_unit(session, job, unit, error, final=False, backoff_s=backoff_s, backoff_limit_s=backoff_limit_s)


def _insert_units(session: Session, job: Job, kind: UnitKind, work: Iterable[ShardWork], at: datetime) -> None:
    units = [
        Unit(
            id=new_id("unit"),
            job_id=job.id,
            kind=kind,
            index=shard.index,
            status=UnitStatus.QUEUED,
            attempt=0,
            fence=0,
            available_at=at,
            nbytes_total=shard.nbytes,
            nbytes_done=0,
            nbytes_out=0,
        )
        for shard in work
    ]
    session.add_all(units)
    session.flush()
    session.add_all([Outbox(unit_id=unit.id, dispatch_seq=0, available_at=at) for unit in units])


def _lock_claimed_job(session: Session, claim: Claim) -> Job:
    job = _lock_job(session, claim.job_id)
    if job is None:
        raise LeaseLost(f"{claim.job_id} is gone")
    return job


def _held(claim: Claim) -> ColumnElement[bool]:
    return and_(Unit.id == claim.unit_id, Unit.fence == claim.fence, Unit.status == UnitStatus.RUNNING)


def _claimed_unit(session: Session, claim: Claim) -> Unit:
    unit = session.scalars(
        select(Unit).where(_held(claim)), execution_options={"populate_existing": True}
    ).one_or_none()
    if unit is None:
        raise LeaseLost(f"start {claim.attempt} of unit {claim.unit_id} has been taken over")
    return unit


def _change_unit(session: Session, claim: Claim, **values: Any) -> None:
    """Write to the unit where it is still ours."""
    changed = session.execute(
        update(Unit).where(_held(claim)).values(**values), execution_options={"synchronize_session": False}
    )
    assert isinstance(changed, CursorResult)
    if changed.rowcount != 1:
        raise LeaseLost(f"start {claim.attempt} of unit {claim.unit_id} has been taken over")


def _end_unit(session: Session, claim: Claim, status: UnitStatus, **values: Any) -> tuple[Job, datetime]:
    """End our unit; the job, locked, and the time of it."""
    job = _lock_claimed_job(session, claim)
    at = now(session)
    _change_unit(session, claim, status=status, finished_at=at, lease_expires_at=None, **values)
    return job, at


def _fail_unit(
    session: Session, job: Job, unit: Unit, error: JobError, *, final: bool, backoff_s: float, backoff_limit_s: float
) -> Job:
    """Under the job's lock: queue the unit again, or fail it and its job with it."""
    at = now(session)
    data = log_data("unit_failed", error.message, code=error.code, **_context(unit))
    append_event(session, job, EventType.LOG, data, at)
    if job.status != JobStatus.RUNNING:
        _stop_unit(unit, UnitStatus.CANCELLED, at)
        session.flush()
        return _settle(session, job, at)
    if not final and unit.attempt < job.max_attempts:
        wait_s = min(backoff_s * 2 ** (unit.attempt - 1), backoff_limit_s)
        _queue_again(session, unit, at + timedelta(seconds=wait_s), attempt=unit.attempt)
        return job
    _stop_unit(unit, UnitStatus.FAILED, at)
    session.flush()
    _drop_queued_units(session, job, at)
    return _end_job(session, job, JobStatus.FAILED, at, error=error.to_dict())


def _stop_unit(unit: Unit, status: UnitStatus, at: datetime) -> None:
    unit.status, unit.finished_at, unit.lease_expires_at = status, at, None


def _queue_again(session: Session, unit: Unit, available_at: datetime, *, attempt: int) -> None:
    unit.status, unit.attempt, unit.available_at = UnitStatus.QUEUED, attempt, available_at
    unit.lease_owner = unit.lease_expires_at = None
    session.add(Outbox(unit_id=unit.id, dispatch_seq=0, available_at=available_at))
    session.flush()


def _drop_queued_units(session: Session, job: Job, at: datetime) -> None:
    queued = and_(Unit.job_id == job.id, Unit.status == UnitStatus.QUEUED)
    session.execute(delete(Outbox).where(Outbox.unit_id.in_(select(Unit.id).where(queued))))
    session.execute(update(Unit).where(queued).values(status=UnitStatus.CANCELLED, finished_at=at))


def _count_progress(session: Session, job: Job, kind: UnitKind, at: datetime) -> Job:
    """Add up the phase's units on the job row."""
    summed = select(func.sum(Unit.nbytes_done)).where(Unit.job_id == job.id, Unit.kind == kind)
    nbytes_done = int(session.scalar(summed) or 0)
    if nbytes_done == job.nbytes_done:
        return job
    seen = _percent(job)
    job = _change_job(session, job, at, nbytes_done=nbytes_done)
    if _percent(job) > seen:
        append_event(session, job, EventType.PROGRESS, job.progress or {}, at)
    return job


def _percent(job: Job) -> int:
    return 100 * job.nbytes_done // job.nbytes_total if job.nbytes_total else 0


def _name(unit: Unit) -> str:
    return f"shard {unit.index}" if unit.kind == UnitKind.SHARD else f"the {unit.kind} step"


def _context(unit: Unit) -> dict[str, Any]:
    return {"unit": unit.kind, "index": unit.index, "attempt": unit.attempt}


# Outbox


@dataclass(frozen=True)
class Message:
    """All that the broker ever sees."""

    unit_id: str
    dispatch_seq: int


def take_due(session: Session, *, limit: int, redispatch_s: float) -> list[Message]:
    """Mark the most urgent units as sent, never sent or sent too long ago without a claim; send them after commit."""
    at = now(session)
    lost = at - timedelta(seconds=redispatch_s)
    due = session.scalars(
        select(Outbox)
        .join(Unit, Unit.id == Outbox.unit_id)
        .join(Job, Job.id == Unit.job_id)
        .where(Outbox.available_at <= at, or_(Outbox.dispatched_at.is_(None), Outbox.dispatched_at < lost))
        .order_by(Job.priority.desc(), Job.created_at, Job.id, Unit.kind, Unit.index)
        .limit(limit)
        .with_for_update(of=Outbox, skip_locked=True)
    ).all()
    for row in due:
        row.dispatched_at, row.dispatch_seq = at, row.dispatch_seq + 1
    return [Message(row.unit_id, row.dispatch_seq) for row in due]


def give_back(session: Session, message: Message) -> None:
    """The broker did not take it: it is due again at once."""
    session.execute(
        update(Outbox)
        .where(Outbox.unit_id == message.unit_id, Outbox.dispatch_seq == message.dispatch_seq)
        .values(dispatched_at=None)
    )


# Idempotency


def find_idempotency(session: Session, key: str, method: str, path: str) -> IdempotencyRecord | None:
    """The key's record, unless it has expired: then it goes."""
    record = session.get(IdempotencyRecord, (key, method, path), with_for_update=True, populate_existing=True)
    if record is not None and record.expires_at <= now(session):
        session.delete(record)
        session.flush()
        return None
    return record


def insert_idempotency(session: Session, record: IdempotencyRecord) -> None:
    """Remember the answer; IdempotencyBusy, and nothing of the transaction stays, when the same key was faster."""
    session.add(record)
    try:
        session.flush()
    except IntegrityError as error:
        raise IdempotencyBusy("a request with this key is being answered", retry_after_s=1) from error


def settle_idempotency(
    session: Session, key: str, method: str, path: str, *, status_code: int, body: dict[str, Any]
) -> None:
    """The request that waited has its answer."""
    session.execute(
        update(IdempotencyRecord)
        .where(IdempotencyRecord.key == key, IdempotencyRecord.method == method, IdempotencyRecord.path == path)
        .values(status_code=status_code, body=body, busy_until=None)
    )


# Leases


def take_lease(session: Session, name: str, owner: str, *, ttl_s: float) -> bool:
    """Take or renew what only one may hold."""
    at = now(session)
    expires_at = at + timedelta(seconds=ttl_s)
    taken = session.execute(
        update(Lease)
        .where(Lease.name == name, or_(Lease.owner == owner, Lease.expires_at < at))
        .values(owner=owner, expires_at=expires_at)
    )
    assert isinstance(taken, CursorResult)
    if taken.rowcount:
        return True
    try:
        with session.begin_nested():
            session.execute(insert(Lease).values(name=name, owner=owner, expires_at=expires_at))
    except IntegrityError:
        return False
    return True


def drop_lease(session: Session, name: str, owner: str) -> None:
    session.execute(delete(Lease).where(Lease.name == name, Lease.owner == owner))


def worker_seen(session: Session, name: str, *, ttl_s: float) -> None:
    """A worker says that it is there."""
    take_lease(session, WORKER_LEASE + name, name, ttl_s=ttl_s)


def worker_left(session: Session, name: str) -> None:
    """A worker says goodbye."""
    drop_lease(session, WORKER_LEASE + name, name)


def workers_online(session: Session) -> int:
    query = select(func.count()).where(Lease.name.startswith(WORKER_LEASE), Lease.expires_at > now(session))
    return session.scalars(query).one()


def purge(session: Session) -> None:
    """Drop what has run out: idempotency records and leases."""
    at = now(session)
    session.execute(delete(IdempotencyRecord).where(IdempotencyRecord.expires_at <= at))
    session.execute(delete(Lease).where(Lease.expires_at <= at))
