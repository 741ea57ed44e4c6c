"""The routes of watches."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from service import watches
from service.api.pages import add_links
from service.api.problems import responses
from service.common.models import Watch
from service.deps import ServiceDep, WatchId, no_query
from service.watch_schemas import WatchBody, WatchChange, WatchCreate, WatchList, WatchQuery

PLAIN = [Depends(no_query)]

router = APIRouter(prefix=watches.WATCHES_PATH, tags=["watches"], responses=responses(422, 500, 503))


@router.post("", status_code=201, response_model=WatchBody, responses=responses(413), dependencies=PLAIN)
def create_watch(body: WatchCreate, response: Response, service: ServiceDep) -> Watch:
    """Follow a branch: each new head becomes a job."""
    watch = watches.add(service, body)
    response.headers["Location"] = f"{watches.WATCHES_PATH}/{watch.id}"
    return watch


@router.get("", response_model=WatchList)
def list_watches(
    query: Annotated[WatchQuery, Query()], request: Request, response: Response, service: ServiceDep
) -> WatchList:
    page = watches.find(service, query)
    add_links(response, request, query, page)
    data = [WatchBody.model_validate(watch) for watch in page.rows]
    return WatchList(data=data, first_id=page.first_id, last_id=page.last_id, has_more=page.has_more)


@router.get("/{watch_id}", response_model=WatchBody, responses=responses(404), dependencies=PLAIN)
def get_watch(watch_id: WatchId, service: ServiceDep) -> Watch:
    return watches.get(service, watch_id)


@router.patch("/{watch_id}", response_model=WatchBody, responses=responses(404), dependencies=PLAIN)
def change_watch(watch_id: WatchId, body: WatchChange, service: ServiceDep) -> Watch:
    """Pause it, go on with it, or look more or less often; then it is looked at at once."""
    return watches.change(service, watch_id, body)


@router.delete("/{watch_id}", status_code=204, responses=responses(404), dependencies=PLAIN)
def delete_watch(watch_id: WatchId, service: ServiceDep) -> None:
    """Follow it no longer; its jobs go on."""
    watches.remove(service, watch_id)
