"""A worker's workplace over real servers, and jobs driven through it without Celery."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select

from hqq_core.recipe import Recipe
from service.common import repository, schema
from service.common.models import Job, Unit
from service.common.repository import Claim
from service.common.settings import Settings
from service.common.status import UnitKind, UnitStatus
from tests.checkpoints import save_llama
from tests.fakehub.server import FakeHub
from worker.steps import run_unit
from worker.workplace import Workplace

RECIPE = Recipe()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The folder that sources may come from."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def source(models: Path) -> Path:
    return save_llama(models / "tiny", n_shards=2)


@pytest.fixture
def settings(tmp_path: Path, models: Path, database_url: str, redis_url: str) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        database_url=database_url,
        broker_url=redis_url,
        source_roots=(models,),
        threads=1,
        min_free_nbytes=0,
        backoff_s=0,
        cancel_poll_s=0.02,
        heartbeat_s=0.05,
    )


@pytest.fixture
def workplace(settings: Settings) -> Iterator[Workplace]:
    """Once over each kind of database."""
    settings.data_dir.mkdir()
    workplace = Workplace.open(settings)
    schema.migrate(workplace.database)
    yield workplace
    workplace.close()


def at_hub(settings: Settings, fakehub: FakeHub, folder: Path) -> Settings:
    """With the Hub of the tests: the default credential writes, the one called `reader` reads."""
    file = folder / "credentials.json"
    file.write_text(json.dumps({"reader": {"token": fakehub.read_token}}))
    file.chmod(0o600)
    hub = {"hub_endpoint": fakehub.endpoint, "hub_token": SecretStr(fakehub.write_token), "credentials_file": file}
    return settings.model_copy(update=hub)


class Foreman:
    """Submits a job and drives its units one by one."""

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace
        self.leaving = threading.Event()

    def submit(
        self,
        source: Path | dict[str, Any],
        *recipes: Recipe,
        target: dict[str, Any] | None = None,
        max_attempts: int = 3,
    ) -> Job:
        """A job on a folder, or on what a source says."""
        with self.workplace.database.write() as session:
            return repository.insert_job(
                session,
                source=source if isinstance(source, dict) else {"type": "folder", "path": str(source)},
                recipes=[recipe.to_dict() for recipe in recipes or (RECIPE,)],
                target=target,
                labels={},
                priority=5,
                max_attempts=max_attempts,
            )

    def units(self, status: UnitStatus = UnitStatus.QUEUED) -> list[Unit]:
        with self.workplace.database.read() as session:
            return list(session.scalars(select(Unit).where(Unit.status == status).order_by(Unit.kind, Unit.index)))

    def run_next(self) -> None:
        run_unit(self.workplace, self.units()[0].id, owner="worker@here", leaving=self.leaving)

    def run_up_to(self, kind: UnitKind) -> None:
        """All that comes before the first unit of this kind."""
        while self.units()[0].kind != kind:
            self.run_next()

    def run_all(self) -> None:
        while self.units():
            self.run_next()

    def claim_next(self, lease_s: float = 60) -> Claim:
        with self.workplace.database.write() as session:
            claim = repository.claim_unit(session, self.units()[0].id, owner="worker@here", lease_s=lease_s)
        assert claim is not None
        return claim

    def cancel(self, job: Job) -> None:
        with self.workplace.database.write() as session:
            repository.cancel_job(session, job.id)

    def get(self, job: Job) -> Job:
        with self.workplace.database.read() as session:
            return repository.get_job(session, job.id)

    def actions(self, job: Job) -> list[str]:
        with self.workplace.database.read() as session:
            return [event.data.get("action", "") for event in repository.list_events(session, job.id)]


@pytest.fixture
def foreman(workplace: Workplace) -> Foreman:
    return Foreman(workplace)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for it, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)
