"""Housekeeping in every worker: units of dead workers, files of dead jobs, events of old ones, and messages that never went."""

import threading
import time
from collections.abc import Sequence

import structlog

from service.common import outbox, repository
from service.common.errors import Unavailable
from worker.kept_source import drop_weights
from worker.workplace import Workplace

LEASE = "housekeeping"
SWEEP_S = 3600.0
# Rounds: whoever ends a job removes its files, but for a crash between the two, and for what the API leaves.
LATELY = 12
FOLDERS_AT_ONCE = 500  # in one query
JOBS_AT_ONCE = 50  # whose events are dropped in one round

logger = structlog.get_logger(__name__)


class Housekeeper(threading.Thread):
    """Looks after the rows every few seconds, beside the pool; of many, one reaps and all send."""

    def __init__(self, workplace: Workplace, name: str) -> None:
        super().__init__(name="housekeeper", daemon=True)
        self._workplace = workplace
        self._owner = name
        self._over = threading.Event()
        self._lease_s = 4 * workplace.settings.housekeeping_s
        self._swept_at: float | None = None
        self._dropping = False  # events, some in each round

    def run(self) -> None:
        while True:
            try:
                self.keep()
            except Unavailable as error:
                logger.warning("The broker took no message.", action="dispatch_failed", reason=error.detail)
            except Exception:
                logger.exception("Housekeeping failed; it is tried again.", action="housekeeping_failed")
            if self._over.wait(self._workplace.settings.housekeeping_s):
                return

    def stop(self) -> None:
        """Say goodbye, so that nobody waits for this worker."""
        self._over.set()
        self.join()
        with self._workplace.database.write() as session:
            repository.worker_left(session, self._owner)
            repository.drop_lease(session, LEASE, self._owner)

    def keep(self) -> None:
        with self._workplace.database.write() as session:
            repository.worker_seen(session, self._owner, ttl_s=self._lease_s)
            reaping = repository.take_lease(session, LEASE, self._owner, ttl_s=self._lease_s)
        if reaping:
            reap(self._workplace)
            self._sweep()
            self._dropping = self._dropping and drop_events(self._workplace)
            with self._workplace.database.write() as session:
                repository.purge(session)
        outbox.dispatch(self._workplace.database, self._workplace.broker, self._workplace.settings)

    def _sweep(self) -> None:
        """All folders are looked through at the start and then seldom: results stay, so there may be many."""
        if self._swept_at is None or time.monotonic() - self._swept_at >= SWEEP_S:
            discard_files(self._workplace, list(self._workplace.store.job_ids()))
            self._workplace.cache.sweep()
            self._dropping = True
            self._swept_at = time.monotonic()
            return
        with self._workplace.database.read() as session:
            ended = repository.ended_lately(session, LATELY * self._workplace.settings.housekeeping_s)
        discard_files(self._workplace, [job_id for job_id in ended if self._workplace.store.folder(job_id).is_dir()])


def drop_events(workplace: Workplace) -> bool:
    """Drop events of some jobs that are kept no longer; whether there may be more."""
    kept_s = workplace.settings.events_kept_s
    with workplace.database.read() as session:
        job_ids = repository.jobs_with_old_events(session, kept_s=kept_s, limit=JOBS_AT_ONCE)
    for job_id in job_ids:  # others write in between
        with workplace.database.write() as session:
            repository.drop_old_events(session, job_id, kept_s=kept_s)
    return len(job_ids) == JOBS_AT_ONCE


def reap(workplace: Workplace) -> None:
    """Queue again, or fail, the units whose workers have not been heard of for too long."""
    settings = workplace.settings
    with workplace.database.read() as session:
        unit_ids = repository.expired_units(session)
    for unit_id in unit_ids:
        with workplace.database.write() as session:
            job = repository.reap_unit(
                session, unit_id, backoff_s=settings.backoff_s, backoff_limit_s=settings.backoff_limit_s
            )
        if job is not None:
            logger.warning("Took a unit from a lost worker.", action="unit_reaped", unit_id=unit_id, job_id=job.id)
            discard_files(workplace, [job.id])


def discard_files(workplace: Workplace, job_ids: Sequence[str]) -> None:
    """Remove the files of failed and cancelled jobs once nobody writes any more."""
    for start in range(0, len(job_ids), FOLDERS_AT_ONCE):
        with workplace.database.read() as session:
            discarded = repository.discarded_jobs(session, job_ids[start : start + FOLDERS_AT_ONCE])
            sources = {job_id: repository.get_job(session, job_id).source for job_id in discarded}
        for job_id, source in sources.items():
            if not source.get("keep", True):
                drop_weights(workplace, job_id)
            workplace.store.remove(job_id)
            workplace.cache.sweep()
            logger.info("Removed the files of a job.", action="files_removed", job_id=job_id)
