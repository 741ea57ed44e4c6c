"""/v1/jobs"""

import base64
import time
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse
from fastapi.sse import EventSourceResponse

from service import jobs
from service.api.events import frames
from service.api.pages import add_links
from service.api.problems import responses
from service.common.models import Job
from service.deps import IdempotencyKey, JobId, NewsDep, ServiceDep, WaitDep, no_query
from service.jobs import Answer, Service
from service.news import News
from service.schemas import (
    ArtifactList,
    EventBody,
    EventList,
    EventQuery,
    JobBody,
    JobCreate,
    JobList,
    JobQuery,
    JobRetry,
)

RETRY_AFTER_S = 2
WAIT_POLL_S = 0.2
PLAIN = [Depends(no_query)]

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=responses(422, 500, 503))


@router.post(
    "",
    status_code=202,
    response_model=JobBody,
    responses={200: {"model": JobBody}, **responses(409, 413)},
    dependencies=PLAIN,
)
async def create_job(
    body: JobCreate, service: ServiceDep, wait_s: WaitDep, idempotency_key: IdempotencyKey = None
) -> Response:
    """Submit a job. `Prefer: wait=N` answers with its end if that comes within N seconds."""
    answer = await run_in_threadpool(jobs.submit, service, body, idempotency_key=idempotency_key, wait_s=wait_s)
    if wait_s and not answer.replayed:
        job = await _wait(service, answer.job_id, wait_s)
        answer = await run_in_threadpool(jobs.settle, service, job, idempotency_key)
    return _answered(answer)


@router.get("", response_model=JobList)
def list_jobs(
    query: Annotated[JobQuery, Query()], request: Request, response: Response, service: ServiceDep
) -> JobList:
    page = jobs.find(service, query)
    add_links(response, request, query, page)
    data = [JobBody.model_validate(job) for job in page.rows]
    return JobList(data=data, first_id=page.first_id, last_id=page.last_id, has_more=page.has_more)


@router.get(
    "/{job_id}",
    response_model=JobBody,
    responses={304: {"description": "Not Modified"}, **responses(404)},
    dependencies=PLAIN,
)
def get_job(
    job_id: JobId, response: Response, service: ServiceDep, if_none_match: Annotated[str | None, Header()] = None
) -> Job | Response:
    job = jobs.get(service, job_id)
    headers = {"ETag": f'W/"{job.version}"', "Cache-Control": "no-cache"}
    if not job.is_terminal:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if _names(if_none_match, str(job.version)):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return job


@router.post(
    "/{job_id}/cancel",
    response_model=JobBody,
    responses={202: {"model": JobBody}, **responses(404, 409)},
    dependencies=PLAIN,
)
def cancel_job(job_id: JobId, response: Response, service: ServiceDep) -> Job:
    """Stop a job: at once where it has not begun, within seconds where it runs."""
    job, stopping = jobs.cancel(service, job_id)
    if stopping:
        response.status_code = 202
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return job


@router.post(
    "/{job_id}/retry",
    status_code=202,
    response_model=JobBody,
    responses=responses(404, 409),
    dependencies=PLAIN,
)
def retry_job(job_id: JobId, response: Response, service: ServiceDep, body: JobRetry | None = None) -> Job:
    """Begin the upload of a job again that failed in it, to another target where one is given."""
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return jobs.retry(service, job_id, body or JobRetry())


@router.get(
    "/{job_id}/events",
    response_model=EventList,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "The job is done and all its events were seen: do not come back"},
        **responses(404),
    },
)
def list_events(
    job_id: JobId,
    service: ServiceDep,
    news: NewsDep,
    query: Annotated[EventQuery, Query()],
    accept: Annotated[str, Header()] = "*/*",
    last_event_id: Annotated[int | None, Header(ge=0, lt=2**63)] = None,
) -> EventList | Response:
    """Events after a sequence number, as a list or, with `Accept: text/event-stream`, as they come."""
    if "text/event-stream" in accept:
        seen = next((seq for seq in (last_event_id, query.last_event_id) if seq is not None), query.after)
        return _stream(service, news, job_id, seen)
    found = jobs.events(service, job_id, after=query.after, limit=query.limit + 1)
    data = [EventBody.model_validate(event) for event in found[: query.limit]]
    return EventList(data=data, has_more=len(found) > query.limit)


@router.get("/{job_id}/artifacts", response_model=ArtifactList, responses=responses(404), dependencies=PLAIN)
def list_artifacts(job_id: JobId, service: ServiceDep) -> ArtifactList:
    return ArtifactList(data=jobs.artifacts(service, job_id))


@router.head("/{job_id}/artifacts/{name:path}", include_in_schema=False, dependencies=PLAIN)
@router.get(
    "/{job_id}/artifacts/{name:path}",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "Partial Content"},
        304: {"description": "Not Modified"},
        **responses(404, 416),
    },
    dependencies=PLAIN,
)
def download_artifact(
    job_id: JobId, name: str, service: ServiceDep, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """A file of the result, whole or by Range."""
    found = jobs.download(service, job_id, name)
    sha256 = found.artifact.sha256
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    headers = {"ETag": f'"{sha256}"', "Repr-Digest": f"sha-256=:{digest}:", "Cache-Control": "private, no-cache"}
    if _names(if_none_match, sha256):
        return Response(status_code=304, headers=headers)
    return FileResponse(found.path, headers=headers, filename=found.path.name, media_type="application/octet-stream")


async def _wait(service: Service, job_id: str, wait_s: float) -> Job:
    """The job at its end, or as it is after the wait."""
    deadline = time.monotonic() + wait_s
    while True:
        job = await run_in_threadpool(jobs.get, service, job_id)
        if job.is_terminal or time.monotonic() >= deadline:
            return job
        await anyio.sleep(WAIT_POLL_S)


def _answered(answer: Answer) -> Response:
    headers = {"Location": f"{jobs.JOBS_PATH}/{answer.job_id}"}
    if answer.status_code == 202:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    else:
        headers["Preference-Applied"] = "wait"
    if answer.replayed:
        headers["Idempotent-Replayed"] = "true"
    return JSONResponse(answer.body, status_code=answer.status_code, headers=headers)


def _stream(service: Service, news: News, job_id: str, seen: int) -> Response:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    job = jobs.get(service, job_id)
    if job.is_terminal and seen >= job.event_seq:
        return Response(status_code=204, headers=headers)  # an EventSource comes back on anything else
    return EventSourceResponse(frames(service, news, job_id, seen), headers=headers)


def _names(if_none_match: str | None, tag: str) -> bool:
    """Whether the header lists the tag; weak comparison, as RFC 9110 has it for If-None-Match."""
    listed = [item.strip().removeprefix("W/") for item in (if_none_match or "").split(",")]
    return "*" in listed or f'"{tag}"' in listed
