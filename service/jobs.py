"""What a user may do with jobs."""

import hashlib
import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog

from hqq_core.errors import SpecError
from hqq_core.formats import settled
from hqq_core.outputs import output_folders
from hqq_core.recipe import Recipe
from service.common import outbox, repository
from service.common.credentials import Credential, Credentials
from service.common.errors import (
    CredentialUnknown,
    FieldError,
    IdempotencyBusy,
    IdempotencyKeyReused,
    NamespaceNotAllowed,
    NotFound,
    RecipeRefused,
    Unavailable,
)
from service.common.models import DEFAULT_OWNER, Event, IdempotencyRecord, Job
from service.common.queue import Broker
from service.common.roots import SourceRoots
from service.common.session import Database
from service.common.settings import Settings
from service.common.status import DISCARDED, JobStatus
from service.common.storage import ArtifactStore
from service.common.target_urls import check_target_url
from service.job_places import FolderSource, HubSource, HubTarget, UrlTarget
from service.schemas import Artifact, JobBody, JobCreate, JobQuery, JobRetry, RecipeBody

JOBS_PATH = "/v1/jobs"

log = structlog.get_logger(__name__)


class Service:
    """The parts that the verbs need: opened once, closed at the end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.database_url)
        self.broker = Broker(settings)
        self.store = ArtifactStore(settings.data_dir)
        self.roots = SourceRoots(settings.source_roots)

    def close(self) -> None:
        self.broker.close()
        self.database.close()


@dataclass(frozen=True)
class Answer:
    """What a submission is answered with, now or whenever its Idempotency-Key comes again."""

    job_id: str
    status_code: int
    body: dict[str, Any]
    replayed: bool = False


@dataclass(frozen=True)
class Download:
    """An artifact and where its bytes are."""

    artifact: Artifact
    path: Path


def submit(service: Service, body: JobCreate, *, idempotency_key: str | None = None, wait_s: float = 0) -> Answer:
    """A new job, durable with its key and its way to the workers; or what the key was answered with before."""
    fingerprint = _fingerprint(body)
    # before anything can be refused: what was answered once stands
    if idempotency_key is not None and (stored := _find_answer(service, idempotency_key, fingerprint)):
        return stored
    recipes = check_recipes(body.asked)
    check_source(service, body.source)
    check_target(service, body.target)
    with service.database.write() as session:
        job = repository.insert_job(
            session,
            source=body.source.model_dump(),
            recipes=[recipe.to_dict() for recipe in recipes],
            target=body.target.model_dump() if body.target else None,
            labels=dict(body.labels),
            owner=body.owner,
            priority=body.priority,
            max_attempts=service.settings.max_attempts,
        )
        session.flush()
        answer = Answer(job.id, 202, draw(job))
        if idempotency_key is not None:
            at = repository.now(session)
            record = IdempotencyRecord(
                key=idempotency_key,
                method="POST",
                path=JOBS_PATH,
                fingerprint=fingerprint,
                job_id=job.id,
                status_code=answer.status_code,
                body=answer.body,
                busy_until=at + timedelta(seconds=wait_s) if wait_s else None,
                expires_at=at + timedelta(seconds=service.settings.idempotency_s),
            )
            repository.insert_idempotency(session, record)
    log.info("A job was submitted", action="job_submitted", job_id=job.id)
    _dispatch(service)
    return answer


def settle(service: Service, job: Job, idempotency_key: str | None) -> Answer:
    """The answer after waiting, kept for the key."""
    answer = Answer(job.id, 200 if job.is_terminal else 202, draw(job))
    if idempotency_key is not None:
        with service.database.write() as session:
            repository.settle_idempotency(
                session, idempotency_key, "POST", JOBS_PATH, status_code=answer.status_code, body=answer.body
            )
    return answer


def get(service: Service, job_id: str) -> Job:
    with service.database.read() as session:
        return repository.get_job(session, job_id)


def find(service: Service, query: JobQuery) -> repository.Page[Job]:
    """A stretch of the list of jobs."""
    where = repository.JobFilter(
        statuses=tuple(query.status),
        labels=tuple((key, value) for key, _, value in (label.partition(":") for label in query.label)),
        created_after=query.created_after,
        created_before=query.created_before,
        q=query.q,
    )
    with service.database.read() as session:
        return repository.list_jobs(
            session,
            where,
            limit=query.limit,
            after=query.after,
            before=query.before,
            ascending=query.order == "asc",
        )


def cancel(service: Service, job_id: str) -> tuple[Job, bool]:
    """The job, cancelled or on its way there, and whether it was this call that stopped it in its run."""
    with service.database.write() as session:
        before = repository.get_job(session, job_id).status
        job = repository.cancel_job(session, job_id)
    if job.status in DISCARDED and job.source.get("keep", True):  # else housekeeping's: its weights go first
        service.store.remove(job_id)
    if job.status != before:
        log.info("A job is to stop", action="job_cancel", job_id=job_id, status=job.status)
    return job, job.status == JobStatus.CANCELLING and job.status != before


def retry(service: Service, job_id: str, body: JobRetry) -> Job:
    """Begin a failed upload again: its credential may have been mended, or its target is another now."""
    check_target(service, body.target)
    with service.database.write() as session:
        target = body.target.model_dump() if body.target else None
        job = repository.retry_upload(session, job_id, target=target)
    log.info("An upload is tried again", action="job_retried", job_id=job_id)
    _dispatch(service)
    return job


def events(service: Service, job_id: str, *, after: int, limit: int) -> list[Event]:
    with service.database.read() as session:
        repository.get_job(session, job_id)
        return repository.list_events(session, job_id, after=after, limit=limit)


def event_seqs(service: Service, job_ids: list[str]) -> dict[str, int]:
    """By job, the number of its last event."""
    with service.database.read() as session:
        return repository.event_seqs(session, job_ids)


def artifacts(service: Service, job_id: str) -> list[Artifact]:
    """What the job made; nothing until all of it was verified."""
    result = get(service, job_id).result
    return [Artifact(**artifact) for artifact in result["artifacts"]] if result else []


def download(service: Service, job_id: str, name: str) -> Download:
    """One of the job's files; only names that the result lists lead to a path."""
    for artifact in artifacts(service, job_id):
        path = service.store.output(job_id) / artifact.name
        if artifact.name == name and path.is_file():
            return Download(artifact, path)
    raise NotFound("artifact_not_found", f"job {job_id} has no artifact {name!r}")


def draw(job: Job) -> dict[str, Any]:
    """The job as JSON shows it."""
    return JobBody.model_validate(job).model_dump(mode="json")


def check_recipes(asked: dict[str, RecipeBody]) -> list[Recipe]:
    """The library's recipes; its refusal points at the field in the body."""
    recipes = []
    for place, body in asked.items():
        try:
            recipes.append(Recipe(**body.model_dump()))
        except SpecError as error:
            raise RecipeRefused(error.code, str(error), f"{place}/{error.field}") from error
    try:
        output_folders(recipes)
    except SpecError as error:
        raise RecipeRefused(error.code, str(error), f"{list(asked)[error.recipe]}/{error.field}") from error
    return [settled(recipe) for recipe in recipes]


def check_source(service: Service, source: FolderSource | HubSource) -> None:
    """What can be known of it without looking at it."""
    if isinstance(source, FolderSource):
        service.roots.resolve(source.path)
    else:
        _credential(service, source.credential, "/source/credential")


def check_target(service: Service, target: HubTarget | UrlTarget | None) -> None:
    """Whether this service may write there, as far as it can tell."""
    match target:
        case UrlTarget():
            check_target_url(target.url, service.settings.target_urls)
        case HubTarget():
            credential = _credential(service, target.credential, "/target/credential")
            namespace = target.repo_id.partition("/")[0]
            if credential.token is None:
                raise _credential_unknown(
                    "a target needs a credential, and there is no default one", "/target/credential"
                )
            if not credential.may_write_to(namespace):
                detail = f"{namespace} is not one of the namespaces of the credential {credential.name!r}"
                error = FieldError("/target/repo_id", NamespaceNotAllowed.code, detail)
                raise NamespaceNotAllowed(detail, errors=(error,))


def _credential(service: Service, name: str | None, pointer: str) -> Credential:
    try:
        return Credentials(service.settings).get(name)
    except CredentialUnknown as error:
        raise _credential_unknown(error.detail, pointer) from error


def _credential_unknown(detail: str, pointer: str) -> CredentialUnknown:
    return CredentialUnknown(detail, errors=(FieldError(pointer, CredentialUnknown.code, detail),))


def _fingerprint(body: JobCreate) -> str:
    recipes = [recipe.model_dump(mode="json") for recipe in body.asked.values()]
    # neither target nor owner where none is meant: as it was before there were any, so that older keys find their bodies
    none_meant = {"target": body.target is None, "owner": body.owner == DEFAULT_OWNER}
    left_out = {"recipe", "recipes", *(name for name, none in none_meant.items() if none)}
    meant = body.model_dump(mode="json", exclude=left_out)
    meant |= {"recipe": recipes[0]} if len(recipes) == 1 else {"recipes": recipes}  # one is one, however it was said
    canonical = json.dumps(meant, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _find_answer(service: Service, idempotency_key: str, fingerprint: str) -> Answer | None:
    with service.database.write() as session:
        record = repository.find_idempotency(session, idempotency_key, "POST", JOBS_PATH)
        return _replay(record, fingerprint, at=repository.now(session)) if record is not None else None


def _replay(record: IdempotencyRecord, fingerprint: str, *, at: Any) -> Answer:
    if record.fingerprint != fingerprint:
        raise IdempotencyKeyReused("the Idempotency-Key was used with another body")
    if record.busy_until is not None and record.busy_until > at:
        raise IdempotencyBusy("the first request with this key is still being answered", retry_after_s=1)
    return Answer(record.job_id, record.status_code, record.body, replayed=True)


def _dispatch(service: Service) -> None:
    """At once if the broker is there; else a worker's housekeeping does it later."""
    try:
        outbox.dispatch(service.database, service.broker, service.settings)
    except Unavailable as error:
        log.warning("The broker is away; the job waits in the outbox", action="dispatch_failed", error=str(error))
