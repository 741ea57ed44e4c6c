"""A checkpoint that is larger than the disk it passes through."""

import tempfile
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from hqq_core.convert import quantize_checkpoint
from hqq_core.recipe import Recipe
from tests.checkpoints import folder_bytes
from tests.fakehub.server import FakeHub
from tests.worker.conftest import Foreman
from tests.worker.of_hub.jobs import converted, of_repo, result, sources
from worker.source_cache import SourceCache
from worker.workplace import Workplace


def used_nbytes(folder: Path) -> int:
    """What is on the disk: files with holes count for what they hold, those with two names once."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.stat()
            found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


class Watch(threading.Thread):
    """Looks all the time how much of the disk a folder has, until it is left."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.over = folder, 0, threading.Event()

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        while not self.over.wait(0.001):
            with suppress(FileNotFoundError):
                self.most = max(self.most, used_nbytes(self.folder))


@pytest.mark.parametrize("target", [None, {"repo_id": "team-a/large-2bit"}], ids=["kept here", "published"])
def test_checkpoint_of_three_times_the_budget_passes_through(
    foreman: Foreman,
    workplace: Workplace,
    fakehub: FakeHub,
    large: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: dict[str, Any] | None,
) -> None:
    """Of the data directory and what processes keep for themselves: sources, results and all that a job has."""
    recipe = Recipe(format="hqq", nbits=2, group_size=128)
    quantize_checkpoint(large, tmp_path / "direct", recipe, threads=1)
    nbytes_in = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    nbytes_out = used_nbytes(tmp_path / "direct")
    budget = nbytes_in // 3
    fakehub.add_repo("team-a/large", large)
    settings = workplace.settings.model_copy(update={"hub_token": SecretStr(fakehub.write_token)})
    cache = SourceCache(workplace.cache.folder, budget - nbytes_out - 2**20)
    foreman.workplace = replace(workplace, settings=settings, cache=cache)
    temporary = settings.data_dir / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    with Watch(settings.data_dir) as watch:
        job = foreman.submit(of_repo(repo_id="team-a/large", keep=False), recipe, target=target)
        foreman.run_all()
    assert result(foreman, job) == converted(tmp_path / "direct")
    print(f"{nbytes_in} bytes in, budget {budget}, {nbytes_out} bytes out, at most {watch.most} at once")
    assert nbytes_out < watch.most <= budget
    assert sources(workplace) == {}
    if target is not None:
        output = workplace.store.output(job.id)
        assert fakehub.contents(target["repo_id"]) == folder_bytes(output)
