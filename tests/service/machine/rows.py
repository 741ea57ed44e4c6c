"""The rows as the model's own types, so that the two can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.common import models, repository
from service.common.session import Database
from tests.service.machine.clock import seconds
from tests.service.machine.model import Job, Key, Unit, Way


@dataclass(frozen=True)
class Rows:
    """Jobs in the order of their submission; of each unit id, whose it is."""

    jobs: list[Job]
    names: dict[str, tuple[int, Key]]
    numbers: list[list[int]]  # of each job's events
    versions: list[int]  # of each job
    discarded: set[int]  # jobs whose files may go


def read(database: Database, job_ids: Sequence[str]) -> Rows:
    number_of = {job_id: number for number, job_id in enumerate(job_ids)}
    with database.read() as session:
        found = {job.id: job for job in session.scalars(select(models.Job))}
        assert set(found) == set(number_of), "other jobs than those that were submitted"
        jobs = [_job(found[job_id]) for job_id in job_ids]
        versions = [found[job_id].version for job_id in job_ids]
        names = _read_units(session, jobs, number_of)
        numbers = _read_events(session, jobs, number_of)
        discarded = {number_of[job_id] for job_id in repository.discarded_jobs(session, job_ids)}
    return Rows(jobs, names, numbers, versions, discarded)


def _read_units(session: Session, jobs: list[Job], number_of: dict[str, int]) -> dict[str, tuple[int, Key]]:
    ways = {row.unit_id: _way(row) for row in session.scalars(select(models.Outbox))}
    names = {}
    for unit in session.scalars(select(models.Unit).order_by(models.Unit.kind, models.Unit.index)):
        number, key = names[unit.id] = number_of[unit.job_id], (str(unit.kind), unit.index)
        jobs[number].units[key] = _unit(unit, ways.pop(unit.id, None))
    assert not ways, "outbox rows of no unit"
    return names


def _read_events(session: Session, jobs: list[Job], number_of: dict[str, int]) -> list[list[int]]:
    numbers: list[list[int]] = [[] for _ in jobs]
    columns = models.Event.job_id, models.Event.seq, models.Event.type, models.Event.data
    for job_id, seq, type, data in session.execute(select(*columns).order_by(models.Event.seq)):
        jobs[number_of[job_id]].events.append(_event(type, data))
        numbers[number_of[job_id]].append(seq)
    return numbers


def _job(row: models.Job) -> Job:
    return Job(
        seconds(row.created_at),
        row.priority,
        row.max_attempts,
        row.target,
        row.source,
        str(row.status),
        row.phase and str(row.phase),
        row.attempt,
        row.nbytes_done,
        row.nbytes_total,
        row.result,
        row.error and row.error["code"],
        row.finished_at is not None,
    )


def _way(row: models.Outbox) -> Way:
    return Way(seconds(row.available_at), seconds(row.dispatched_at), row.dispatch_seq)


def _unit(row: models.Unit, way: Way | None) -> Unit:
    waits, runs = row.status == "queued", row.status == "running"
    return Unit(
        row.nbytes_total,
        str(row.status),
        seconds(row.available_at) if waits else None,
        way,
        row.attempt,
        row.fence,
        row.lease_owner if runs else None,
        seconds(row.lease_expires_at) if runs else None,
        row.nbytes_done,
        row.nbytes_out,
        row.result,
    )


def _event(type: str, data: dict[str, Any]) -> tuple[Any, ...]:
    match type:
        case "status":
            return type, data["status"], data["phase"]
        case "progress":
            return type, data["completed"], data["total"]
        case "artifact":
            return type, data["name"]
        case "done":
            return type, data["status"]
    return (type, data["action"], data["code"]) if "code" in data else (type, data["action"])
