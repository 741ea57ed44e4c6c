"""While a unit runs: keep it ours, write how far it is, and see when it has to stop."""

import threading
import time
from enum import Enum
from types import TracebackType

import structlog
from sqlalchemy.exc import SQLAlchemyError

from hqq_core.errors import Cancelled
from service.common import repository
from service.common.errors import LeaseLost, Unavailable
from service.common.repository import Claim
from service.common.status import JobStatus
from worker.workplace import Workplace

logger = structlog.get_logger(__name__)


class Stop(Enum):
    """Why a unit is to stop before its end."""

    JOB_OVER = "its job is no longer running"
    LEASE_LOST = "it is no longer ours"
    LEAVING = "its worker has to go"


class Heartbeat:
    """A thread beside the unit; `progress` is the unit's side of it, and raises Cancelled when the unit has to stop."""

    def __init__(
        self, workplace: Workplace, claim: Claim, *, leaving: threading.Event, delivery_tag: str | None = None
    ) -> None:
        self._workplace = workplace
        self._settings = workplace.settings
        self._claim = claim
        self._leaving = leaving
        self._delivery_tag = delivery_tag
        self._over = threading.Event()
        self._stop: Stop | None = None
        self._nbytes_done = self._nbytes_saved = 0
        self._renewed_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    @property
    def stop(self) -> Stop | None:
        return self._stop or (Stop.LEAVING if self._leaving.is_set() else None)

    def progress(self, nbytes_done: int) -> None:
        """Called by the unit several times a second, with the bytes it has put behind it."""
        self._nbytes_done = nbytes_done
        self.look()

    def look(self) -> None:
        """Cancelled when the unit has to stop."""
        if stop := self.stop:
            raise Cancelled(stop.value)

    def _run(self) -> None:
        while self._stop is None and not self._over.wait(self._settings.cancel_poll_s):
            try:
                self._beat()
            except LeaseLost:
                self._stop = Stop.LEASE_LOST
            except SQLAlchemyError as error:
                logger.warning("The database did not answer a heartbeat.", action="beat_missed", reason=str(error))
            except Exception:
                # as with the database: the lease's age decides, the thread goes on
                logger.exception("A heartbeat failed; it is tried again.", action="beat_failed")
            if time.monotonic() - self._renewed_at > self._settings.lease_s:
                self._stop = Stop.LEASE_LOST  # by now it may be another's: no need to ask

    def _beat(self) -> None:
        began_at, nbytes_done = time.monotonic(), self._nbytes_done
        due = began_at - self._renewed_at >= self._settings.heartbeat_s
        if nbytes_done != self._nbytes_saved or due:
            status = self._save(nbytes_done)
            self._renewed_at = began_at
        else:
            with self._workplace.database.read() as session:
                status = repository.get_job(session, self._claim.job_id).status
        if due:
            self._renew_message()
        if status != JobStatus.RUNNING:
            self._stop = Stop.JOB_OVER

    def _save(self, nbytes_done: int) -> JobStatus:
        lease_s = self._settings.lease_s
        with self._workplace.database.write() as session:
            if nbytes_done == self._nbytes_saved:
                return repository.renew_lease(session, self._claim, lease_s=lease_s)
            status = repository.save_progress(session, self._claim, nbytes_done, lease_s=lease_s)
        self._nbytes_saved = nbytes_done
        return status

    def _renew_message(self) -> None:
        if self._delivery_tag is None:
            return
        try:
            self._workplace.broker.renew(self._delivery_tag)
        except Unavailable as error:
            # a second message would find the unit taken
            logger.info("The broker did not renew the message.", action="renewal_missed", reason=error.detail)
