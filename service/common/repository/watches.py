"""Watches: due ones are taken for a while, and what their Hub answered is written down, with a job for a new head.

Whoever asks for a head holds nothing open meanwhile: the row's version tells whether the answer still counts.
"""

from datetime import timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.common.errors import JobError, NotFound
from service.common.events import EventType, log_data
from service.common.models import DEFAULT_OWNER, WATCH_ID, Job, Watch, new_id
from service.common.repository.clock import now
from service.common.repository.events import append_event
from service.common.repository.failures import RETRY_AFTER_LIMIT_S
from service.common.repository.job_row import lock_job
from service.common.repository.jobs import cancel_job, insert_job
from service.common.status import JobStatus

LABEL = "watch"  # of the jobs: the watch's id
BACKOFF_LIMIT_S = 24 * 3600.0  # what cannot be asked for is asked for once a day at least
MAX_DOUBLINGS = 30


def insert_watch(
    session: Session,
    *,
    source: dict[str, Any],
    recipes: list[dict[str, Any]],
    target: dict[str, Any],
    labels: dict[str, str],
    owner: str = DEFAULT_OWNER,
    priority: int,
    interval_s: int,
    run_now: bool,
) -> Watch:
    """A watch that is due at once."""
    at = now(session)
    watch = Watch(
        id=new_id("watch"),
        version=1,
        source=source,
        recipes=recipes,
        target=target,
        labels=labels,
        owner=owner,
        priority=priority,
        interval_s=interval_s,
        enabled=True,
        run_now=run_now,
        next_check_at=at,
        n_failures=0,
        created_at=at,
    )
    session.add(watch)
    session.flush()
    return watch


def find_watch(session: Session, watch_id: str, *, lock: bool = False) -> Watch | None:
    """The watch of an id that a user wrote: PostgreSQL refuses some strings."""
    if not WATCH_ID.fullmatch(watch_id):
        return None
    return session.get(Watch, watch_id, with_for_update=lock or None, populate_existing=True)


def get_watch(session: Session, watch_id: str, *, lock: bool = False) -> Watch:
    watch = find_watch(session, watch_id, lock=lock)
    if watch is None:
        raise NotFound("watch_not_found", f"there is no watch {watch_id!r}")
    return watch


def change_watch(session: Session, watch_id: str, **values: Any) -> Watch:
    """Change settings; whoever does so has mended what was wrong, so it is due at once."""
    watch = get_watch(session, watch_id, lock=True)
    for name, value in values.items():
        setattr(watch, name, value)
    watch.version += 1
    watch.next_check_at, watch.n_failures = now(session), 0
    session.flush()
    return watch


def delete_watch(session: Session, watch_id: str) -> None:
    """Its jobs go on."""
    session.delete(get_watch(session, watch_id, lock=True))


def take_due_watch(session: Session, *, hold_s: float) -> Watch | None:
    """The watch that has been due for longest, for as long as it takes to ask for its head; then it is due again."""
    at = now(session)
    due = select(Watch).where(Watch.enabled, Watch.next_check_at <= at).order_by(Watch.next_check_at, Watch.id).limit(1)
    watch = session.scalars(due.with_for_update(skip_locked=True)).one_or_none()
    if watch is not None:
        watch.version += 1
        watch.next_check_at = at + timedelta(seconds=hold_s)
        session.flush()
    return watch


def watch_seen(session: Session, taken: Watch, *, repo_id: str, commit: str, max_attempts: int) -> Job | None:
    """The head of a watch that was taken; the job where it has moved, which is made with the note that it was seen to.

    A watch has one job at a time. One that still waits for its start makes way for the new head; one that has begun is
    let end, and whatever is the head then is the next one.
    """
    watch = _held(session, taken)
    if watch is None:
        return None
    at = now(session)
    watch.last_checked_at, watch.next_check_at = at, at + timedelta(seconds=watch.interval_s)
    watch.last_error, watch.n_failures = None, 0
    if commit == watch.last_commit:
        return None
    if watch.last_commit is None and not watch.run_now:
        watch.last_commit = commit
        return None
    if not _make_way(session, watch, commit):
        return None
    job = insert_job(
        session,
        source={**watch.source, "repo_id": repo_id, "commit": commit},
        recipes=watch.recipes,
        target=watch.target,
        labels={**watch.labels, LABEL: watch.id},
        owner=watch.owner,
        priority=watch.priority,
        max_attempts=max_attempts,
    )
    data = log_data("watch_moved", f"{repo_id} is at {commit} now", watch_id=watch.id, before=watch.last_commit)
    append_event(session, job, EventType.LOG, data)
    watch.last_commit, watch.last_job_id = commit, job.id
    session.flush()
    return job


def watch_failed(
    session: Session, taken: Watch, error: JobError, *, backoff_s: float, retry_after_s: float | None = None
) -> Watch | None:
    """Keep why there was no answer, and when to ask again; None where the watch was changed meanwhile."""
    watch = _held(session, taken)
    if watch is None:
        return None
    at = now(session)
    asked_s = min(retry_after_s or 0.0, RETRY_AFTER_LIMIT_S)
    wait_s = max(_backoff_s(watch, backoff_s, again=error.retryable), asked_s)
    watch.last_checked_at, watch.next_check_at = at, at + timedelta(seconds=wait_s)
    watch.last_error, watch.n_failures = error.to_dict(), watch.n_failures + 1
    session.flush()
    return watch


def _held(session: Session, taken: Watch) -> Watch | None:
    """The row, locked and one version on, where nobody has changed it since it was taken."""
    watch = find_watch(session, taken.id, lock=True)
    if watch is None or watch.version != taken.version:
        return None
    watch.version += 1
    return watch


def _make_way(session: Session, watch: Watch, commit: str) -> bool:
    """Whether there may be a job for this head now."""
    former = lock_job(session, watch.last_job_id) if watch.last_job_id else None
    if former is None or former.is_terminal:
        return True
    if former.status != JobStatus.QUEUED:
        return False
    append_event(session, former, EventType.LOG, log_data("watch_superseded", f"{commit} is the head now"))
    cancel_job(session, former.id)
    return True


def _backoff_s(watch: Watch, backoff_s: float, *, again: bool) -> float:
    """What may pass by itself is tried soon, up to the usual interval; what somebody has to mend, later than that."""
    doublings = 2.0 ** min(watch.n_failures, MAX_DOUBLINGS)
    if again:
        return min(backoff_s * doublings, watch.interval_s)
    return min(watch.interval_s * doublings, max(BACKOFF_LIMIT_S, watch.interval_s))
