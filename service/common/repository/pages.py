"""Lists of jobs and watches, a page at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Generic, TypeVar

from sqlalchemy import ColumnElement, or_, select, tuple_
from sqlalchemy.orm import Session

from service.common.errors import FieldError, RequestInvalid
from service.common.models import Job, Watch
from service.common.repository.job_row import find_job
from service.common.repository.watches import find_watch
from service.common.status import JobStatus

Row = TypeVar("Row", Job, Watch)


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list holds."""

    statuses: tuple[JobStatus, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    created_after: datetime | None = None
    created_before: datetime | None = None
    q: str | None = None


@dataclass(frozen=True)
class Page(Generic[Row]):
    """A stretch of a list, and whether there is more in the direction of reading."""

    rows: list[Row]
    has_more: bool

    @property
    def first_id(self) -> str | None:
        return self.rows[0].id if self.rows else None

    @property
    def last_id(self) -> str | None:
        return self.rows[-1].id if self.rows else None


def list_jobs(
    session: Session,
    where: JobFilter,
    *,
    limit: int,
    after: str | None = None,
    before: str | None = None,
    ascending: bool = False,
) -> Page[Job]:
    """Jobs by (created_at, id), the newest first unless ascending, after or before the cursor job."""
    find = partial(find_job, session)
    return _page(session, Job, _conditions(where), find, limit=limit, after=after, before=before, ascending=ascending)


def list_watches(
    session: Session, *, limit: int, after: str | None = None, before: str | None = None, ascending: bool = False
) -> Page[Watch]:
    """Watches, likewise."""
    find = partial(find_watch, session)
    return _page(session, Watch, [], find, limit=limit, after=after, before=before, ascending=ascending)


def _page(
    session: Session,
    kind: type[Row],
    conditions: Sequence[ColumnElement[bool]],
    find: Callable[[str], Row | None],
    *,
    limit: int,
    after: str | None,
    before: str | None,
    ascending: bool,
) -> Page[Row]:
    backwards = before is not None
    rising = ascending != backwards
    key = tuple_(kind.created_at, kind.id)
    query = select(kind).where(*conditions)
    if cursor := after or before:
        at = find(cursor)
        if at is None:
            name, detail = "query/before" if backwards else "query/after", f"no {kind.__name__.lower()} {cursor!r}"
            raise RequestInvalid("unknown cursor", errors=(FieldError(name, "cursor_unknown", detail),))
        edge = tuple_(at.created_at, at.id)
        query = query.where(key > edge if rising else key < edge)
    order = (kind.created_at.asc(), kind.id.asc()) if rising else (kind.created_at.desc(), kind.id.desc())
    found = list(session.scalars(query.order_by(*order).limit(limit + 1)))
    rows = found[:limit]
    return Page(rows[::-1] if backwards else rows, has_more=len(found) > limit)


def _conditions(where: JobFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [Job.labels[key].as_string() == value for key, value in where.labels]
    if where.statuses:
        conditions.append(Job.status.in_(where.statuses))
    if where.created_after is not None:
        conditions.append(Job.created_at > where.created_after)
    if where.created_before is not None:
        conditions.append(Job.created_at < where.created_before)
    if where.q:
        places = [Job.source["path"], Job.source["repo_id"], Job.target["repo_id"], Job.target["url"]]
        texts = [Job.id, *(place.as_string() for place in places)]
        conditions.append(or_(*(text.icontains(where.q, autoescape=True) for text in texts)))
    return conditions
