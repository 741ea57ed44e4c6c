"""The rows: the truth about every job."""

import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Enum, ForeignKey, Index, MetaData, String, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator
from ulid import ULID

from service.common.status import TERMINAL, JobStatus, Phase, UnitKind, UnitStatus


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python, on SQLite too, which keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _word(enum: type[StrEnum]) -> Enum:
    """A short text column that reads back as the enum: a new word needs no migration."""
    return Enum(enum, native_enum=False, length=16, values_callable=lambda words: [word.value for word in words])


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(none_as_null=True),
        dict[str, str]: JSON(),
        list[dict[str, Any]]: JSON(),
        int: BigInteger(),
        JobStatus: _word(JobStatus),
        Phase: _word(Phase),
        UnitKind: _word(UnitKind),
        UnitStatus: _word(UnitStatus),
    }


DEFAULT_OWNER = "default"
JOB_ID = re.compile(r"job_[0-9A-HJKMNP-TV-Z]{26}")
WATCH_ID = re.compile(r"watch_[0-9A-HJKMNP-TV-Z]{26}")


def new_id(kind: str) -> str:
    """`job_` and a ULID: sorts by time."""
    return f"{kind}_{ULID()}"


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_created_at_id", "created_at", "id"), Index("ix_jobs_status", "status"))

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    status: Mapped[JobStatus]
    phase: Mapped[Phase | None]
    version: Mapped[int]
    event_seq: Mapped[int]  # the last event's
    source: Mapped[dict[str, Any]]
    recipes: Mapped[list[dict[str, Any]]]
    target: Mapped[dict[str, Any] | None]  # where the result goes; none: it stays to be downloaded
    labels: Mapped[dict[str, str]]
    owner: Mapped[str] = mapped_column(String(64))  # whose share of the workers it takes
    priority: Mapped[int]
    attempt: Mapped[int]  # the most starts any of its units needed
    max_attempts: Mapped[int]
    nbytes_done: Mapped[int]  # of this phase
    nbytes_total: Mapped[int | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    queued_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    planned_at: Mapped[datetime | None]
    profiled_at: Mapped[datetime | None]  # never, where nothing was to be profiled
    quantized_at: Mapped[datetime | None]
    verified_at: Mapped[datetime | None]  # never, where nothing was to be uploaded
    finished_at: Mapped[datetime | None]

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def progress(self) -> dict[str, Any] | None:
        """How far the phase is, as of the last write, so that the same version always reads the same."""
        if self.phase is None:
            return None
        total, done = self.nbytes_total, self.nbytes_done
        since = {
            Phase.PREFLIGHT: self.started_at,
            Phase.PROFILING: self.planned_at,
            Phase.QUANTIZING: self.profiled_at or self.planned_at,
            Phase.VERIFYING: self.quantized_at,
            Phase.UPLOADING: self.verified_at,
        }[self.phase]
        eta_s = None
        if total and done and since and not self.is_terminal:
            eta_s = round((self.updated_at - since).total_seconds() / done * (total - done), 1)
        return {
            "phase": self.phase,
            "completed": done,
            "total": total,
            "unit": "bytes",
            "percent": round(100 * done / total, 1) if total else None,
            "eta_seconds": eta_s,
        }

    @property
    def durations(self) -> dict[str, float | None]:
        """Seconds in each phase that is over."""
        return {
            "queued": _seconds(self.queued_at, self.started_at),
            "plan": _seconds(self.started_at, self.planned_at),
            "profile": _seconds(self.planned_at, self.profiled_at),
            "quantize": _seconds(self.profiled_at or self.planned_at, self.quantized_at),
            "verify": _seconds(self.quantized_at, self.verified_at or self.finished_at),
            "upload": _seconds(self.verified_at, self.finished_at),
        }


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return round((end - start).total_seconds(), 3) if start and end else None


class Unit(Base):
    """One step of a job, done by one worker at a time: the plan, the profile, a shard, the finish, or the push."""

    __tablename__ = "units"
    __table_args__ = (
        UniqueConstraint("job_id", "kind", "index"),
        Index("ix_units_status_lease_expires_at", "status", "lease_expires_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    kind: Mapped[UnitKind]
    index: Mapped[int]
    status: Mapped[UnitStatus]
    attempt: Mapped[int]
    fence: Mapped[int]  # grows with every claim; a write with an older one changes nothing
    lease_owner: Mapped[str | None] = mapped_column(String(255))
    lease_expires_at: Mapped[datetime | None]
    available_at: Mapped[datetime]
    nbytes_total: Mapped[int]
    nbytes_done: Mapped[int]
    nbytes_out: Mapped[int]
    result: Mapped[dict[str, Any] | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Outbox(Base):
    """One row for each queued unit: when it may go out and when it last did. A claim removes it."""

    __tablename__ = "outbox"
    __table_args__ = (Index("ix_outbox_available_at", "available_at"),)

    unit_id: Mapped[str] = mapped_column(ForeignKey("units.id", ondelete="CASCADE"), primary_key=True)
    dispatch_seq: Mapped[int]
    available_at: Mapped[datetime]
    dispatched_at: Mapped[datetime | None]


class Turn(Base):
    """When an owner last had its turn."""

    __tablename__ = "turns"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    served_at: Mapped[datetime]


class Event(Base):
    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(16))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Watch(Base):
    """A branch of a repository that is followed: its new head becomes a job. Whoever changes the row counts its version on."""

    __tablename__ = "watches"
    __table_args__ = (
        Index("ix_watches_created_at_id", "created_at", "id"),
        Index("ix_watches_next_check_at", "next_check_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    version: Mapped[int]
    source: Mapped[dict[str, Any]]  # of a Hub; its revision is the branch
    recipes: Mapped[list[dict[str, Any]]]
    target: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, str]]
    owner: Mapped[str] = mapped_column(String(64))
    priority: Mapped[int]
    interval_s: Mapped[int]
    enabled: Mapped[bool]
    run_now: Mapped[bool]  # a job for the head that is there at the start, too
    last_commit: Mapped[str | None] = mapped_column(String(64))  # the head that was seen to
    last_job_id: Mapped[str | None] = mapped_column(String(40))
    last_checked_at: Mapped[datetime | None]  # with or without an answer
    next_check_at: Mapped[datetime]
    n_failures: Mapped[int]  # since the last answer
    last_error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]


class IdempotencyRecord(Base):
    """What a key was answered with."""

    __tablename__ = "idempotency_records"
    __table_args__ = (Index("ix_idempotency_records_expires_at", "expires_at"),)

    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    method: Mapped[str] = mapped_column(String(8), primary_key=True)
    path: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    status_code: Mapped[int]
    body: Mapped[dict[str, Any]]
    busy_until: Mapped[datetime | None]  # the first request may still be waiting for its answer
    expires_at: Mapped[datetime]


class Lease(Base):
    """Who does something only one may do; and, as `worker:<name>`, who is there."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    owner: Mapped[str] = mapped_column(String(255))
    expires_at: Mapped[datetime]
