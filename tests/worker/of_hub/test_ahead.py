"""Shards of a source at a Hub are solved while others are still measured; nothing but time depends on it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr

from hqq_core import convert
from hqq_core.checkpoint import Checkpoint
from hqq_core.convert import quantize_checkpoint
from hqq_core.energy import Energies
from hqq_core.recipe import Recipe
from service.common.models import Job
from service.common.status import JobStatus, UnitKind
from tests.fakehub.server import FakeHub
from tests.worker.conftest import RECIPE, Foreman
from tests.worker.of_hub.jobs import N_SHARDS, converted, downloads, eventually, left_over, of_repo, result
from worker import ahead, energies
from worker.workplace import Workplace


@pytest.fixture
def patient_profile(monkeypatch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    """Measuring goes on when what can be solved ahead has been."""
    profile = energies.profile

    def wait(checkpoint: Checkpoint, *arguments: Any, passed: Any = None, **options: Any) -> Energies:
        def then_wait(index: int, measured: Energies) -> None:
            passed(index, measured)
            eventually(lambda: sum(len(solved(job)) for job in workplace.store.job_ids()) > index)

        return profile(checkpoint, *arguments, passed=passed and then_wait, **options)

    def solved(job_id: str) -> list[int]:
        return workplace.store.noted(job_id, "solved")

    monkeypatch.setattr(energies, "profile", wait)


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards in the order in which they are solved."""
    indices: list[int] = []
    solve = convert.quantize_shard

    def note(*arguments: Any, **options: Any) -> Any:
        indices.append(arguments[2])
        return solve(*arguments, **options)

    monkeypatch.setattr(convert, "quantize_shard", note)
    return indices


def profiled(foreman: Foreman, workplace: Workplace, *recipes: Recipe, **more: Any) -> Job:
    """A job with its profile behind it, and nothing in work."""
    job = foreman.submit(of_repo(), *recipes, **more)
    foreman.run_up_to(UnitKind.SHARD)
    workplace.solver.settle(job.id, lambda: None)
    return job


RECIPES = [(RECIPE,), (Recipe(format="mlx"), Recipe(format="hqq", nbits=3, fold=False))]


@pytest.mark.usefixtures("patient_profile")
@pytest.mark.parametrize("recipes", RECIPES, ids=["one", "two"])
def test_all_but_the_last_are_solved_while_others_are_measured(
    foreman: Foreman, workplace: Workplace, fakehub: FakeHub, source: Path, tmp_path: Path, solves: list[int],
    recipes: tuple[Recipe, ...],
) -> None:  # fmt: skip
    job = profiled(foreman, workplace, *recipes)
    assert solves == workplace.store.noted(job.id, "solved") == list(range(N_SHARDS - 1))
    foreman.run_all()
    assert solves == list(range(N_SHARDS)), "none of them again"
    quantize_checkpoint(source, tmp_path / "direct", *recipes, threads=1)
    assert result(foreman, job) == converted(tmp_path / "direct")
    assert len(downloads(fakehub)) == N_SHARDS
    assert left_over(workplace) == []


@pytest.mark.usefixtures("patient_profile")
def test_energies_that_were_not_final(
    foreman: Foreman, workplace: Workplace, source: Path, tmp_path: Path, solves: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As of a weight that is used once more later in the pass."""
    obtain = energies.obtain

    def otherwise(*arguments: Any) -> Any:
        passed = arguments[-1]

        def uneven(index: int, measured: Energies) -> None:
            vectors = {name: vector * torch.arange(1, len(vector) + 1) for name, vector in measured.vectors.items()}
            passed(index, replace(measured, vectors=vectors) if index == 1 else measured)

        return obtain(*arguments[:-1], uneven)

    monkeypatch.setattr(energies, "obtain", otherwise)
    job = profiled(foreman, workplace)
    assert workplace.store.noted(job.id, "solved") == [0, 1, 2]
    foreman.run_all()
    assert solves == [0, 1, 2, 1, 3]
    quantize_checkpoint(source, tmp_path / "direct", RECIPE, threads=1)
    assert result(foreman, job) == converted(tmp_path / "direct")


@pytest.mark.usefixtures("patient_profile")
def test_files_that_are_gone_are_made_again(foreman: Foreman, workplace: Workplace, solves: list[int]) -> None:
    job = profiled(foreman, workplace)
    next(workplace.store.output(job.id).glob("model-00002-*")).unlink()
    foreman.run_all()
    assert solves == [0, 1, 2, 1, 3]
    assert result(foreman, job)


@pytest.mark.usefixtures("patient_profile")
def test_result_grows_at_the_target_while_the_source_is_measured(
    foreman: Foreman, workplace: Workplace, fakehub: FakeHub
) -> None:
    settings = workplace.settings.model_copy(update={"hub_token": SecretStr(fakehub.write_token)})
    object.__setattr__(workplace, "settings", settings)
    job = profiled(foreman, workplace, RECIPE, target={"repo_id": "team-a/out"})
    workplace.sender.settle(job.id, lambda: None)
    assert fakehub.requests.find(r"^/storage/", "PUT")
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED


def test_failed_guess_is_nobodys_business(
    foreman: Foreman, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no folds today")

    monkeypatch.setattr(ahead, "fold", fail)
    job = profiled(foreman, workplace)
    assert workplace.store.noted(job.id, "solved") == []
    foreman.run_all()
    assert result(foreman, job)


@pytest.mark.parametrize("recipe", [Recipe(preset="best"), Recipe(energy="analytic")], ids=["correlated", "analytic"])
def test_what_is_known_only_at_the_end_waits_for_it(foreman: Foreman, workplace: Workplace, recipe: Recipe) -> None:
    job = profiled(foreman, workplace, recipe)
    assert workplace.store.noted(job.id, "solved") == []


def test_folder_that_may_change_is_not_solved_ahead(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    foreman.run_up_to(UnitKind.SHARD)
    workplace.solver.settle(job.id, lambda: None)
    assert workplace.store.noted(job.id, "solved") == []


@pytest.mark.usefixtures("patient_profile")
def test_cancel_while_a_shard_is_solved_ahead(
    foreman: Foreman, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = foreman.submit(of_repo())
    foreman.run_up_to(UnitKind.PROFILE)
    solve = convert.quantize_shard

    def cancel(*arguments: Any, **options: Any) -> Any:
        foreman.cancel(job)
        return solve(*arguments, **options)

    monkeypatch.setattr(convert, "quantize_shard", cancel)
    foreman.run_next()
    assert foreman.get(job).status == JobStatus.CANCELLED
    assert not workplace.store.folder(job.id).exists()
