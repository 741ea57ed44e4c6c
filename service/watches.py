"""What a user may do with watches."""

import structlog

from service import jobs
from service.common import repository
from service.common.errors import FieldError, RequestInvalid
from service.common.models import Watch
from service.job_places import HubTarget
from service.jobs import Service
from service.watch_schemas import WatchChange, WatchCreate, WatchQuery

WATCHES_PATH = "/v1/watches"

log = structlog.get_logger(__name__)


def add(service: Service, body: WatchCreate) -> Watch:
    """A new watch, which a worker looks after at once; the Hub is not asked here."""
    recipes = jobs.check_recipes(body.asked)
    jobs.check_source(service, body.source)
    jobs.check_target(service, body.target)
    _check_again(body)
    with service.database.write() as session:
        watch = repository.insert_watch(
            session,
            source=body.source.model_dump(),
            recipes=[recipe.to_dict() for recipe in recipes],
            target=body.target.model_dump(),
            labels=dict(body.labels),
            owner=body.owner,
            priority=body.priority,
            interval_s=body.interval_s,
            run_now=body.run_now,
        )
    log.info("A branch is watched", action="watch_added", watch_id=watch.id)
    return watch


def get(service: Service, watch_id: str) -> Watch:
    with service.database.read() as session:
        return repository.get_watch(session, watch_id)


def find(service: Service, query: WatchQuery) -> repository.Page[Watch]:
    """A stretch of the list of watches."""
    with service.database.read() as session:
        return repository.list_watches(
            session, limit=query.limit, after=query.after, before=query.before, ascending=query.order == "asc"
        )


def change(service: Service, watch_id: str, body: WatchChange) -> Watch:
    with service.database.write() as session:
        return repository.change_watch(session, watch_id, **body.model_dump(exclude_none=True))


def remove(service: Service, watch_id: str) -> None:
    with service.database.write() as session:
        repository.delete_watch(session, watch_id)
    log.info("A branch is no longer watched", action="watch_removed", watch_id=watch_id)


def _check_again(body: WatchCreate) -> None:
    """Refuse what goes well once and not a second time."""
    source, target = body.source, body.target
    pulls = isinstance(target, HubTarget) and target.create_pr
    if not (pulls or target.overwrite):
        _refuse("overwrite", "the second result finds the first there: wanted overwrite, or a pull request")
    if not isinstance(target, HubTarget):
        return
    if pulls and target.branch != "main":
        _refuse("branch", "pull requests are opened against main: leave it out, or create_pr false and overwrite true")
    same = source.repo_id.lower() == target.repo_id.lower()
    if same and (pulls or target.branch == source.revision):
        _refuse("repo_id", "each result would move the branch that is watched: wanted another repository or branch")


def _refuse(field: str, detail: str) -> None:
    raise RequestInvalid(detail, errors=(FieldError(f"/target/{field}", "watch_cannot_repeat", detail),))
