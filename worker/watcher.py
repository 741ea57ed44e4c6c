"""Watches in every worker: whichever is due is asked for its head, one at a time, and a new head becomes a job.

A thread of its own, so that a slow Hub holds up nothing else. Who may ask is settled by the row (take_due_watch), not by
a lease: several workers share the watches, and an answer counts only where the row is as it was taken.
"""

import threading
import time
from collections.abc import Callable

import structlog
from structlog.contextvars import bound_contextvars

from hqq_core.errors import Cancelled
from service.common import repository
from service.common.errors import HubUnavailable, ServiceError, describe
from service.common.models import Watch
from worker.access import hub_of
from worker.hub import Head
from worker.workplace import Workplace

ASK_S = 60.0  # for one head, with all that is tried again meanwhile
HOLD_S = 2 * ASK_S  # a watch whose asker was lost is due again after this

logger = structlog.get_logger(__name__)


class Watcher(threading.Thread):
    """Asks for heads, beside the pool, until it is stopped."""

    def __init__(self, workplace: Workplace) -> None:
        super().__init__(name="watcher", daemon=True)
        self._workplace = workplace
        self._over = threading.Event()

    def run(self) -> None:
        while True:
            try:
                while self.check_next() and not self._over.is_set():
                    pass
            except Exception:
                logger.exception("Looking after watches failed; it is tried again.", action="watching_failed")
            if self._over.wait(self._workplace.settings.housekeeping_s):
                return

    def stop(self) -> None:
        """Within a second: a question that waits for its answer is dropped."""
        self._over.set()
        self.join()

    def check_next(self) -> bool:
        """Ask for the head of one watch that is due; whether there was one."""
        with self._workplace.database.write() as session:
            watch = repository.take_due_watch(session, hold_s=HOLD_S)
        if watch is None:
            return False
        with bound_contextvars(watch_id=watch.id):
            try:
                head = self._head(watch)
            except Cancelled:
                return False
            except Exception as error:
                self._failed(watch, error)
            else:
                self._seen(watch, head)
        return True

    def _head(self, watch: Watch) -> Head:
        hub = hub_of(self._workplace.settings, watch.source.get("credential"))
        return hub.head(watch.source["repo_id"], watch.source["revision"], look=self._patience())

    def _patience(self) -> Callable[[], None]:
        give_up_at = time.monotonic() + ASK_S

        def look() -> None:
            if self._over.is_set():
                raise Cancelled("the worker has to go")
            if time.monotonic() > give_up_at:
                raise HubUnavailable(f"the Hub had no answer within {ASK_S:.0f} s")

        return look

    def _seen(self, watch: Watch, head: Head) -> None:
        settings = self._workplace.settings
        with self._workplace.database.write() as session:
            job = repository.watch_seen(
                session, watch, repo_id=head.repo_id, commit=head.commit, max_attempts=settings.max_attempts
            )
        if job is not None:  # housekeeping sends it
            logger.info("A watched branch has moved.", action="watch_moved", job_id=job.id, commit=head.commit)

    def _failed(self, watch: Watch, error: Exception) -> None:
        found = describe(error)
        ours = found.code == "internal_error"
        reason = {"code": found.code, "reason": found.message, "exc_info": error if ours else None}
        logger.warning("A watched branch could not be looked at.", action="watch_failed", **reason)
        with self._workplace.database.write() as session:
            repository.watch_failed(
                session,
                watch,
                found,
                backoff_s=self._workplace.settings.backoff_s,
                retry_after_s=error.retry_after_s if isinstance(error, ServiceError) else None,
            )
