"""Lists of jobs, a page at a time."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, or_, select, tuple_
from sqlalchemy.orm import Session

from service.common.errors import FieldError, RequestInvalid
from service.common.models import Job
from service.common.repository.job_row import find_job
from service.common.status import JobStatus


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
        at = find_job(session, cursor)
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
