"""Shards of a pinned source are verified soon after they are written, and nothing passes for that."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hqq_core import convert
from hqq_core.errors import VerificationError
from hqq_core.recipe import Recipe
from hqq_core.results import HeldPart, ShardResult
from service.common.models import Job
from service.common.settings import Settings
from service.common.status import JobStatus, UnitKind
from tests.checkpoints import VOCABULARY, damage, save_llama
from tests.fakehub.server import FakeHub
from tests.vocabularies import save_tokenizer
from tests.worker.conftest import Foreman, eventually
from tests.worker.of_hub.jobs import N_SHARDS, downloads, left_over, of_repo, result, sources
from worker import verification
from worker.sources import _Reading as Reading
from worker.workplace import Workplace

PLAIN = Recipe(format="hqq", energy="none")
FOLDED = Recipe(energy="analytic")
FIRST = "model-00001-of-00004.safetensors"


def checked(workplace: Workplace, job: Job) -> set[int]:
    """Shards of which a check is written down, when none is in work."""
    workplace.checker.settle(job.id, lambda: None)
    return set(workplace.store.read_checks(job.id))


@pytest.fixture
def slow_solver(monkeypatch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    """Each shard's unit takes as long as the check of what is there."""
    solve = convert.quantize_shard

    def wait_for_checks(*arguments: Any, **options: Any) -> Any:
        solved = solve(*arguments, **options)
        job_id = arguments[3].parent.name
        eventually(lambda: len(workplace.store.read_checks(job_id)) == arguments[2])
        return solved

    monkeypatch.setattr(convert, "quantize_shard", wait_for_checks)


@pytest.mark.usefixtures("slow_solver")
@pytest.mark.parametrize("recipe", [PLAIN, FOLDED], ids=["plain", "folded"])
def test_finish_needs_only_what_was_not_verified(
    foreman: Foreman, workplace: Workplace, fakehub: FakeHub, recipe: Recipe
) -> None:
    job = foreman.submit(of_repo(), recipe)
    foreman.run_up_to(UnitKind.FINISH)
    assert checked(workplace, job) == set(range(N_SHARDS - 1))
    for path in sources(workplace).values():
        path.unlink()
    before = len(downloads(fakehub))
    foreman.run_all()
    assert result(foreman, job)
    assert len(downloads(fakehub)) == before + 1
    assert left_over(workplace) == []


@pytest.mark.usefixtures("slow_solver")
def test_file_is_dropped_when_its_shard_is_verified(foreman: Foreman, workplace: Workplace) -> None:
    job = foreman.submit(of_repo(keep=False), PLAIN)
    foreman.run_up_to(UnitKind.FINISH)
    assert checked(workplace, job) == set(range(N_SHARDS - 1))
    assert len(sources(workplace)) == 1
    foreman.run_all()
    assert result(foreman, job)
    assert sources(workplace) == {}


@pytest.mark.usefixtures("slow_solver")
@pytest.mark.parametrize("recipe", [PLAIN, FOLDED], ids=["plain", "folded"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.", "model.embed_tokens.weight"])
def test_one_bit_that_changed_since_it_was_verified(
    foreman: Foreman, workplace: Workplace, recipe: Recipe, name: str
) -> None:
    job = foreman.submit(of_repo(), recipe, max_attempts=1)
    foreman.run_up_to(UnitKind.FINISH)
    assert 0 in checked(workplace, job)
    damage(workplace.store.output(job.id) / FIRST, name)
    foreman.run_all()
    job = foreman.get(job)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert job.error["code"] == "result_damaged"
    assert job.error["message"].startswith(f"what was written is not what was solved: {name}")


def test_what_is_wrong_early_is_said_at_the_end(foreman: Foreman, workplace: Workplace) -> None:
    job = foreman.submit(of_repo(), PLAIN, max_attempts=1)
    foreman.run_up_to(UnitKind.SHARD)
    foreman.run_next()
    damage(workplace.store.output(job.id) / FIRST, "model.layers.0.self_attn.q_proj.")
    foreman.run_up_to(UnitKind.FINISH)
    assert 0 in checked(workplace, job)
    assert workplace.store.read_checks(job.id)[0] == [None]
    foreman.run_all()
    error = foreman.get(job).error
    assert error is not None
    assert "model.layers.0.self_attn.q_proj.weight: digest" in error["message"]


@pytest.mark.usefixtures("slow_solver")
def test_parts_that_will_be_joined_are_verified_when_they_are(
    foreman: Foreman, workplace: Workplace, fakehub: FakeHub, tmp_path: Path
) -> None:
    with_tokenizer = save_tokenizer(save_llama(tmp_path / "llama", layers=4, n_shards=N_SHARDS), "gpt-2", VOCABULARY)
    fakehub.add_repo("team-a/llama", with_tokenizer)
    recipes = [Recipe(format="gguf", type="Q8_0", energy="none"), PLAIN]
    job = foreman.submit(of_repo(repo_id="team-a/llama"), *recipes)
    foreman.run_up_to(UnitKind.FINISH)
    assert checked(workplace, job) == set(range(N_SHARDS - 1))
    for index in checked(workplace, job):
        parts = workplace.store.read_checks(job.id)[index]
        assert [part is None for part in parts] == [True, False]
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED
    assert left_over(workplace) == []


def test_check_that_comes_late_leaves_nothing(
    foreman: Foreman, workplace: Workplace, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, go = threading.Event(), threading.Event()
    verify = verification.verify_part

    def wait(*arguments: Any, **options: Any) -> HeldPart:
        held = verify(*arguments, **options)
        at.set()
        assert go.wait(60)
        return held

    monkeypatch.setattr(verification, "verify_part", wait)
    job = foreman.submit(of_repo(), PLAIN)
    foreman.run_up_to(UnitKind.FINISH)
    assert at.wait(30)
    other = Foreman(Workplace.open(settings))
    other.run_all()
    assert result(other, job)
    go.set()
    workplace.checker.settle(job.id, lambda: None)
    assert left_over(workplace) == []
    other.workplace.close()


@pytest.mark.usefixtures("slow_solver")
def test_finish_fetches_nothing_that_was_dropped_as_verified(
    foreman: Foreman, workplace: Workplace, fakehub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in the middle was not verified; what comes after it was, and is gone."""
    verify = verification.verify_part

    def fail(folder: Path, part: ShardResult, *arguments: Any, **options: Any) -> HeldPart:
        if part.index == 1:
            raise VerificationError("model.norm.weight", "not today")
        return verify(folder, part, *arguments, **options)

    def slowly(self: Any, name: str) -> Any:
        lent = lend(self, name)
        time.sleep(2 * workplace.settings.cancel_poll_s)  # errands look for work meanwhile
        return lent

    monkeypatch.setattr(verification, "verify_part", fail)
    job = foreman.submit(of_repo(keep=False), PLAIN)
    foreman.run_up_to(UnitKind.FINISH)
    lend = Reading.lend
    monkeypatch.setattr(Reading, "lend", slowly)
    foreman.run_all()
    assert result(foreman, job)
    assert len(downloads(fakehub)) == N_SHARDS
    assert sources(workplace) == {}
