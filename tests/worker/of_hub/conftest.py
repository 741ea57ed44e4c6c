"""A worker with a repo at a Hub as source."""

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from service.common.settings import Settings
from tests.checkpoints import save_llama
from tests.fakehub.server import FakeHub
from tests.worker.of_hub.jobs import N_SHARDS, REPO, work


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLite, unless a test asks for both: what differs between them is in the rows, not in the bytes."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path / 'halfquad.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def source(models: Path) -> Path:
    return save_llama(models / "tiny", layers=4, n_shards=N_SHARDS)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """41 MB in shards of 4."""
    return save_llama(tmp_path / "large", layers=24, hidden=256, n_shards=12)


@pytest.fixture
def commit(fakehub: FakeHub, source: Path) -> str:
    return fakehub.add_repo(REPO, source)


@pytest.fixture
def settings(settings: Settings, fakehub: FakeHub, commit: str) -> Settings:
    return settings.model_copy(update={"hub_endpoint": fakehub.endpoint})


@pytest.fixture
def worker(settings: Settings) -> Iterator[Callable[[str], BaseProcess]]:
    """Starts a worker process, of which nothing is left behind."""
    started: list[BaseProcess] = []

    def start(die_at: str = "") -> BaseProcess:
        started.append(multiprocessing.get_context("spawn").Process(target=work, args=(settings, die_at)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()
