"""A job's events as a stream."""

import json
from collections.abc import AsyncIterator

from fastapi.concurrency import run_in_threadpool
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from service import jobs
from service.common.events import EventType
from service.jobs import Service
from service.news import News

RETRY_MS = 3000
PING_S = 15
BATCH = 500


async def frames(service: Service, news: News, job_id: str, after: int) -> AsyncIterator[bytes]:
    """Frames of the events after a sequence number, as they come, until the job is done."""
    yield format_sse_event(retry=RETRY_MS)
    while True:
        batch = await run_in_threadpool(jobs.events, service, job_id, after=after, limit=BATCH)
        for event in batch:
            yield format_sse_event(event=event.type, data_str=json.dumps(event.data), id=str(event.seq))
            after = event.seq
            if event.type == EventType.DONE and await run_in_threadpool(_ended, service, job_id, after):
                return
        if not batch and not await news.wait(job_id, after, PING_S):
            yield KEEPALIVE_COMMENT


def _ended(service: Service, job_id: str, seq: int) -> bool:
    """Whether nothing follows: after a failed upload there may have been a retry."""
    job = jobs.get(service, job_id)
    return job.is_terminal and seq >= job.event_seq
