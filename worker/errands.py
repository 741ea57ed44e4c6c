"""Errands: one thread of a process that does what a job will need later, while a unit of it computes."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from hqq_core.errors import Cancelled
from service.common import repository
from service.common.session import Database
from service.common.status import JobStatus

LOOK_S = 0.2

Look = Callable[[], None]
Errand = Callable[[Look], bool]
Task = tuple[str, Errand]  # of a job

logger = structlog.get_logger(__name__)


class Errands:
    """Runs one errand again and again while it finds something to do: a download of what comes next, a check or an upload of
    what is ready.

    An errand does one piece of work, says whether there was any, and calls the `look` that it gets several times a second: that
    raises Cancelled when the job is no longer running or `stop` was called. What fails here is only logged; the unit that needs
    it decides.
    """

    def __init__(self, database: Database, poll_s: float) -> None:
        self._database, self._poll_s = database, poll_s
        self._changed = threading.Condition()
        self._task: Task | None = None
        self._at: Task | None = None  # in work
        self._stopping = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def during(self, job_id: str, errand: Errand) -> Iterator[None]:
        """Run the errand beside what the `with` does. What is in work at its end goes on, unless it ends by an error."""
        task = job_id, errand
        with self._changed:
            self._task = task
            self._changed.notify_all()
            if self._thread is None:
                # one for the life of the process: the processes that it starts die with their thread
                self._thread = threading.Thread(target=self._run, name="errands", daemon=True)
                self._thread.start()
        try:
            yield
        except BaseException:
            self.stop()
            raise
        finally:
            self._forget(task)

    def stop(self) -> None:
        """End what is in work, and wait for that."""
        with self._changed:
            self._task, self._stopping = None, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._at is None)
            self._stopping = False

    def settle(self, job_id: str, look: Look) -> None:
        """Wait until nothing of a job is in work; `look` is called several times a second, and what it raises ends that."""
        try:
            while self._is_at(job_id):
                look()
        except BaseException:
            self.stop()
            raise

    def _is_at(self, job_id: str) -> bool:
        """After a moment, if it is."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._at is None or self._at[0] != job_id, LOOK_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._at = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._task is not None)
                task = self._at = self._task
            assert task is not None
            if not self._do(task):
                with self._changed:
                    self._changed.wait_for(self._is_over(task), self._poll_s)

    def _do(self, task: Task) -> bool:
        job_id, errand = task
        try:
            return errand(self._look_for(job_id))
        except Cancelled:
            self._forget(task)
        except BaseException as error:  # whatever it is, others wait for this thread
            logger.info("Nothing was done ahead.", action="errand_failed", job_id=job_id, reason=str(error))
            self._forget(task)
        return False

    def _is_over(self, task: Task) -> Callable[[], bool]:
        return lambda: self._task is not task

    def _forget(self, task: Task) -> None:
        with self._changed:
            if self._task is task:
                self._task = None
                self._changed.notify_all()

    def _look_for(self, job_id: str) -> Look:
        looked_at = time.monotonic()

        def look() -> None:
            nonlocal looked_at
            if self._stopping:
                raise Cancelled("nobody waits for it any more")
            if time.monotonic() - looked_at >= self._poll_s:
                looked_at = time.monotonic()
                with self._database.read() as session:
                    if repository.get_job(session, job_id).status != JobStatus.RUNNING:
                        raise Cancelled("its job is no longer running")

        return look
