"""Request and response bodies of watches."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictBool, StrictInt, Tag

from service.job_places import HubSource, HubTarget, UrlTarget, kind_of_target
from service.schemas import JobCreate, JobErrorBody, PageQuery, RequestBody, ResponseBody

Interval = Annotated[StrictInt, Field(ge=60, le=7 * 24 * 3600)]


class WatchTarget(HubTarget):
    create_pr: StrictBool = True
    """Open a pull request for each result; false: commit to the branch, which needs `overwrite`."""


class WatchCreate(JobCreate):
    """A job as each new head is to become one, and how often to look."""

    source: HubSource
    """Its revision is the branch to follow."""
    target: Annotated[
        Annotated[WatchTarget, Tag("hub")] | Annotated[UrlTarget, Tag("url")], Discriminator(kind_of_target)
    ]
    interval_s: Interval = 900
    """Seconds between two looks."""
    run_now: StrictBool = False
    """Make a job for the head that is there at the first look, too."""


class WatchChange(RequestBody):
    """What is left out, or null, stays as it is."""

    enabled: StrictBool | None = None
    interval_s: Interval | None = None


class WatchQuery(PageQuery):
    """Which stretch of the list."""


class WatchBody(ResponseBody):
    id: str
    object: Literal["watch"] = "watch"
    enabled: bool
    source: dict[str, Any]
    recipes: list[dict[str, Any]]
    target: dict[str, Any]
    labels: dict[str, str]
    owner: str
    priority: int
    interval_s: int
    run_now: bool
    last_commit: str | None
    """The head that was seen to: a job was made for it, or it was there at the first look."""
    last_job_id: str | None
    last_checked_at: datetime | None
    next_check_at: datetime
    n_failures: int
    """Looks in a row that had no answer."""
    last_error: JobErrorBody | None
    """Why the last look had none."""
    created_at: datetime
    version: int


class WatchList(ResponseBody):
    object: Literal["list"] = "list"
    data: list[WatchBody]
    first_id: str | None
    last_id: str | None
    has_more: bool
