"""Whether the process lives, and whether it can do its work."""

from collections.abc import Callable

from fastapi import APIRouter, Response
from sqlalchemy.exc import SQLAlchemyError

from service.common import repository, schema
from service.common.errors import ServiceError
from service.deps import ServiceDep
from service.jobs import Service
from service.schemas import Check, Liveness, Readiness

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> Liveness:
    """The process answers. No look at anything else: a restart mends nothing else."""
    return Liveness()


@router.get("/readyz", responses={503: {"model": Readiness}})
def readyz(response: Response, service: ServiceDep) -> Readiness:
    """503 where jobs cannot be taken; without a worker they can, and wait: then it is only degraded."""
    needed = {
        "database": _check(service, _ping_database),
        "migration": _check(service, _check_migration),
        "broker": _check(service, _ping_broker),
        "disk": _check(service, _check_disk),
    }
    workers = _check(service, _count_workers)
    ready = all(check.ok for check in needed.values())
    response.status_code = 200 if ready else 503
    return Readiness(
        status="unavailable" if not ready else "ok" if workers.ok else "degraded",
        checks=needed | {"workers": workers},
    )


def _check(service: Service, look: Callable[[Service], str]) -> Check:
    try:
        return Check(ok=True, detail=look(service))
    except SQLAlchemyError:
        return Check(ok=False, detail="the database does not answer")
    except ServiceError as error:
        return Check(ok=False, detail=error.detail)
    except OSError as error:
        return Check(ok=False, detail=str(error))


def _ping_database(service: Service) -> str:
    with service.database.read() as session:
        repository.ping(session)
    return "answers"


def _check_migration(service: Service) -> str:
    schema.check_head(service.database)
    return "at head"


def _ping_broker(service: Service) -> str:
    service.broker.ping()
    return "answers"


def _check_disk(service: Service) -> str:
    service.store.check_writable()
    free, kept = service.store.free_nbytes(), service.settings.min_free_nbytes
    if free < kept:
        raise ServiceError(f"{free} bytes free, {kept} kept in reserve")
    return f"{free} bytes free"


def _count_workers(service: Service) -> str:
    with service.database.read() as session:
        online = repository.workers_online(session)
    if not online:
        raise ServiceError("no worker is online: jobs wait")
    return f"{online} online"
