"""News: how far the events of followed jobs have come, asked for in one query for all followers of a process."""

import asyncio
from dataclasses import dataclass, field

import structlog
from fastapi.concurrency import run_in_threadpool

from service import jobs
from service.jobs import Service

POLL_S = 0.25

logger = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Follower:
    """One stream that waits for an event after the last that it sent."""

    after: int
    told: asyncio.Event = field(default_factory=asyncio.Event)


class News:
    """Wakes streams that wait; it looks as long as there are any, in the event loop that they run in."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._followers: dict[str, set[_Follower]] = {}  # by job
        self._looking: asyncio.Task[None] | None = None

    async def wait(self, job_id: str, after: int, timeout_s: float) -> bool:
        """Whether there may be an event after that one; False once nothing has come for so long."""
        follower = _Follower(after)
        self._followers.setdefault(job_id, set()).add(follower)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            async with asyncio.timeout(timeout_s):
                await follower.told.wait()
            return True
        except TimeoutError:
            return False
        finally:
            self._followers[job_id].remove(follower)
            if not self._followers[job_id]:
                del self._followers[job_id]

    async def _look(self) -> None:
        while self._followers:
            await asyncio.sleep(POLL_S)
            seqs = await run_in_threadpool(self._seqs, list(self._followers))
            for job_id, followers in self._followers.items():
                for follower in followers:
                    if seqs is None or seqs.get(job_id, 0) > follower.after:
                        follower.told.set()

    def _seqs(self, job_ids: list[str]) -> dict[str, int] | None:
        """The last event of each job; None where the database cannot say, which each stream then finds out for itself."""
        try:
            return jobs.event_seqs(self._service, job_ids)
        except Exception as error:  # whatever it is, others wait for this look
            logger.warning("No news.", action="look_failed", reason=str(error))
            return None
