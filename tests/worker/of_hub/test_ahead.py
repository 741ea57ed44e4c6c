"""Shards of a source at a Hub are solved while others are still measured; nothing but time depends on it."""

import threading
from collections.abc import Callable, Container
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
from service.common.settings import Settings
from service.common.status import JobStatus, UnitKind
from tests.fakehub.server import FakeHub
from tests.worker.conftest import RECIPE, Foreman, eventually
from tests.worker.of_hub.jobs import N_SHARDS, converted, downloads, left_over, of_repo, result, solved
from worker import ahead, energies
from worker.workplace import Workplace


@pytest.fixture
def patient_profile(monkeypatch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    """Measuring goes on when what can be solved ahead has been, or the job is gone."""
    profile = energies.profile

    def wait(checkpoint: Checkpoint, *arguments: Any, passed: Any = None, **options: Any) -> Energies:
        def then_wait(index: int, measured: Energies) -> None:
            passed(index, measured)
            eventually(lambda: all(index in solved(workplace, job_id) for job_id in workplace.store.job_ids()))

        return profile(checkpoint, *arguments, passed=passed and then_wait, **options)

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


def uneven_energies(obtain: Callable[..., Any], indices: Container[int]) -> Callable[..., Any]:
    """`energies.obtain`, but what it tells of some shards is not what there will be."""

    def otherwise(*arguments: Any) -> Any:
        passed = arguments[-1]

        def uneven(index: int, measured: Energies) -> None:
            vectors = {name: vector * torch.arange(1, len(vector) + 1) for name, vector in measured.vectors.items()}
            passed(index, replace(measured, vectors=vectors) if index in indices else measured)

        return obtain(*arguments[:-1], uneven)

    return otherwise


RECIPES = [(RECIPE,), (Recipe(format="mlx"), Recipe(format="hqq", nbits=3, fold=False))]


@pytest.mark.usefixtures("patient_profile")
@pytest.mark.parametrize("recipes", RECIPES, ids=["one", "two"])
def test_all_but_the_last_are_solved_while_others_are_measured(
    foreman: Foreman, workplace: Workplace, fakehub: FakeHub, source: Path, tmp_path: Path, solves: list[int],
    recipes: tuple[Recipe, ...],
) -> None:  # fmt: skip
    job = profiled(foreman, workplace, *recipes)
    assert solves == solved(workplace, job.id) == list(range(N_SHARDS - 1))
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
    monkeypatch.setattr(energies, "obtain", uneven_energies(energies.obtain, [1]))
    job = profiled(foreman, workplace)
    assert solved(workplace, job.id) == [0, 1, 2]
    foreman.run_all()
    assert solves == [0, 1, 2, 1, 3]
    quantize_checkpoint(source, tmp_path / "direct", RECIPE, threads=1)
    assert result(foreman, job) == converted(tmp_path / "direct")


@pytest.mark.usefixtures("patient_profile")
def test_files_that_are_gone_are_made_again(foreman: Foreman, workplace: Workplace, solves: list[int]) -> None:
    job = profiled(foreman, workplace)
    next(workplace.store.solved(job.id).glob("*/model-00002-*")).unlink()
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
    assert solved(workplace, job.id) == []
    foreman.run_all()
    assert result(foreman, job)


@pytest.mark.parametrize("recipe", [Recipe(preset="best"), Recipe(energy="analytic")], ids=["correlated", "analytic"])
def test_what_is_known_only_at_the_end_waits_for_it(foreman: Foreman, workplace: Workplace, recipe: Recipe) -> None:
    job = profiled(foreman, workplace, recipe)
    assert solved(workplace, job.id) == []


def test_folder_that_may_change_is_not_solved_ahead(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source)
    foreman.run_up_to(UnitKind.SHARD)
    workplace.solver.settle(job.id, lambda: None)
    assert solved(workplace, job.id) == []


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


class Held:
    """A function that waits to be let go."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.at, self.go = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.at.set()
        assert self.go.wait(60)
        return self._function(*arguments, **options)


@pytest.fixture
def held_fold(monkeypatch: pytest.MonkeyPatch) -> Held:
    """A guess that takes long: the folds wait for a neighbour's download."""
    held = Held(ahead.fold)
    monkeypatch.setattr(ahead, "fold", held)
    profile = energies.profile

    def wait(*arguments: Any, passed: Any, **options: Any) -> Energies:
        def then_wait(index: int, measured: Energies) -> None:
            passed(index, measured)
            assert held.at.wait(30)

        return profile(*arguments, passed=then_wait, **options)

    monkeypatch.setattr(energies, "profile", wait)
    return held


def test_no_shard_waits_while_a_guess_is_in_work(foreman: Foreman, workplace: Workplace, held_fold: Held) -> None:
    job = foreman.submit(of_repo())
    foreman.run_up_to(UnitKind.PROFILE)
    unit = threading.Thread(target=foreman.run_next)
    unit.start()
    eventually(workplace.store.energies(job.id).is_file)
    unit.join(1)
    assert foreman.units() == []
    held_fold.go.set()
    unit.join()
    assert {unit.kind for unit in foreman.units()} == {UnitKind.SHARD}


def test_wrong_guess_of_a_worker_that_was_given_up_harms_nobody(
    foreman: Foreman, workplace: Workplace, settings: Settings, held_fold: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker has all of its job done before the guess is written."""
    monkeypatch.setattr(workplace.solver, "settle", lambda job_id, look: None)
    monkeypatch.setattr(energies, "obtain", uneven_energies(energies.obtain, range(N_SHARDS)))
    job = foreman.submit(of_repo(), max_attempts=1)
    foreman.run_up_to(UnitKind.SHARD)
    other = Foreman(Workplace.open(settings))
    other.run_all()
    made = result(other, job)
    held_fold.go.set()
    workplace.solver.stop()
    assert result(other, job) == made
    assert left_over(workplace) == []
    other.workplace.close()


def fail_to_save(*arguments: Any) -> None:
    raise RuntimeError("the disk is tired")


@pytest.mark.usefixtures("patient_profile")
def test_profile_that_starts_again_solves_nothing_again(
    foreman: Foreman, workplace: Workplace, solves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Energies, "save", fail_to_save)
        job = foreman.submit(of_repo())
        foreman.run_up_to(UnitKind.PROFILE)
        foreman.run_next()
        assert foreman.get(job).status == JobStatus.RUNNING
        assert solves == [0, 1, 2]
    eventually(foreman.units)
    foreman.run_all()
    assert result(foreman, job)
    assert solves == [0, 1, 2, 3]
