"""Annotated dependencies of the routes."""

import re
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from service.jobs import Service
from service.news import News
from service.schemas import NoQuery

MAX_WAIT_S = 60


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _news(request: Request) -> News:
    news: News = request.app.state.news
    return news


def _wait_s(prefer: Annotated[str | None, Header()] = None) -> int:
    """Seconds of `Prefer: wait=N` (RFC 7240); a preference that cannot be read is no preference."""
    found = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})\"?\s*(?:$|[,;])", prefer or "", re.IGNORECASE)
    return min(int(found[1]), MAX_WAIT_S) if found else 0


def no_query(query: Annotated[NoQuery, Query()]) -> None:
    """For routes without parameters: what is not known is refused, not passed over."""


NewsDep = Annotated[News, Depends(_news)]
ServiceDep = Annotated[Service, Depends(_service)]
WaitDep = Annotated[int, Depends(_wait_s)]
JobId = Annotated[str, Path(description="`job_...`", examples=["job_01K8Z3V4TQ8M3W1B0G6C2N9R5A"])]
WatchId = Annotated[str, Path(description="`watch_...`", examples=["watch_01K8Z3V4TQ8M3W1B0G6C2N9R5A"])]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255, pattern=r"^[\x20-\x7e]+$")]
