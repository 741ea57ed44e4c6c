"""Jobs of several recipes: a folder each, the bytes of each alone, whatever is cut off on the way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hqq_core import convert
from hqq_core.checkpoint import Checkpoint
from hqq_core.convert import quantize_checkpoint
from hqq_core.outputs import output_folders
from hqq_core.plan import build_plan
from hqq_core.recipe import Recipe
from service.common import repository
from service.common.models import Job
from service.common.status import JobStatus, UnitKind
from tests.checkpoints import VOCABULARY, folder_bytes, jobless_bytes
from tests.vocabularies import save_tokenizer
from tests.worker.conftest import Foreman
from worker.reaper import reap
from worker.workplace import Workplace

RECIPES = [
    Recipe(format="mlx", energy="analytic"),
    Recipe(format="metal", energy="analytic"),
    Recipe(format="hqq", axis=0, nbits=3, energy="analytic"),
]


@pytest.fixture
def one_file(source: Path) -> Recipe:
    """Parts that the finish joins."""
    save_tokenizer(source, "gpt-2", VOCABULARY)
    return Recipe(format="gguf", type="Q4_1", energy="analytic")


def as_alone(foreman: Foreman, job: Job, source: Path, recipes: list[Recipe], tmp_path: Path) -> None:
    """The job has succeeded, and each of its folders is that of its recipe alone."""
    job = foreman.get(job)
    assert job.status == JobStatus.SUCCEEDED, job.error
    assert job.result is not None
    output, folders = foreman.workplace.store.output(job.id), output_folders(recipes)
    assert sorted(path.name for path in output.iterdir()) == sorted(folders)
    for recipe, folder, made in zip(recipes, folders, job.result["outputs"], strict=True):
        (manifest,) = quantize_checkpoint(source, tmp_path / "alone" / folder, recipe, threads=1)
        assert jobless_bytes(output / folder) == jobless_bytes(tmp_path / "alone" / folder)
        assert made == {"folder": folder, "format": recipe.format, "metrics": manifest.metrics}
    assert {file["name"] for file in job.result["artifacts"]} == set(folder_bytes(output))


def killed_in_next(foreman: Foreman, monkeypatch: pytest.MonkeyPatch, at: Callable[[pytest.MonkeyPatch], None]) -> None:
    """The next unit dies where `at` has put its end; another worker then finds it."""
    with monkeypatch.context() as patched:
        at(patched)
        with pytest.raises(KeyboardInterrupt):
            foreman.run_next()
    with foreman.workplace.database.write() as session:
        repository.expire_units(session, "worker@here")
    reap(foreman.workplace)


def test_each_recipe_has_its_folder(foreman: Foreman, source: Path, tmp_path: Path) -> None:
    job = foreman.submit(source, *RECIPES)
    foreman.run_all()
    as_alone(foreman, job, source, RECIPES, tmp_path)
    assert foreman.actions(job).count("unit_claimed") == 5, "plan, profile, two shards, finish"


def test_without_weights_there_is_no_profile(foreman: Foreman, source: Path, tmp_path: Path) -> None:
    recipes = [Recipe(format="mlx", energy="none"), Recipe(format="hqq", axis=0, energy="none")]
    job = foreman.submit(source, *recipes)
    foreman.run_all()
    as_alone(foreman, job, source, recipes, tmp_path)
    assert "energies_ready" not in foreman.actions(job)


def test_shard_killed_between_two_files_is_done_again(
    foreman: Foreman, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [recipe for recipe in RECIPES if recipe.format != "metal"]
    job = foreman.submit(source, *recipes)
    foreman.run_up_to(UnitKind.SHARD)
    killed_in_next(foreman, monkeypatch, lambda patched: dies_after(patched, convert._shard.ShardOutput, "close", 1))
    assert [path.parent.name for path in foreman.workplace.store.output(job.id).rglob("model*")] == ["mlx-4bit-g64"]
    foreman.run_all()
    as_alone(foreman, job, source, recipes, tmp_path)
    assert foreman.get(job).attempt == 2


def test_finish_killed_between_two_folders_is_done_again(
    foreman: Foreman, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = foreman.submit(source, *RECIPES)
    foreman.run_up_to(UnitKind.FINISH)
    killed_in_next(foreman, monkeypatch, lambda patched: dies_after(patched, convert, "finish_checkpoint", 1))
    foreman.run_all()
    as_alone(foreman, job, source, RECIPES, tmp_path)


@pytest.mark.parametrize("step", ["_remove_parts", "_config"], ids=["parts beside the manifest", "joined, no manifest"])
def test_finish_of_one_file_is_done_again(
    foreman: Foreman, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_file: Recipe, step: str
) -> None:
    job = foreman.submit(source, one_file, RECIPES[0])
    foreman.run_up_to(UnitKind.FINISH)
    killed_in_next(foreman, monkeypatch, lambda patched: dies_after(patched, convert._folder, step, 0))
    for part in list(foreman.workplace.store.output(job.id).rglob("*.part-00001-*")) if step == "_remove_parts" else []:
        part.unlink()  # the removal had begun
    foreman.run_all()
    as_alone(foreman, job, source, [one_file, RECIPES[0]], tmp_path)


def test_finish_that_runs_after_it_was_done_notices_damage(
    foreman: Foreman, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = foreman.submit(source, *RECIPES, max_attempts=2)
    foreman.run_up_to(UnitKind.FINISH)
    killed_in_next(foreman, monkeypatch, lambda patched: dies_after(patched, repository, "finish_succeeded", 0))
    config = foreman.workplace.store.output(job.id) / "metal-4bit-g64" / "config.json"
    config.write_text("{}")
    foreman.run_all()
    error = foreman.get(job).error
    assert error is not None
    assert error["code"] == "result_damaged"
    assert "config.json: sha256" in error["message"]


def test_room_is_looked_at_for_all_of_them(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch, one_file: Recipe
) -> None:
    asked: list[int] = []
    real = workplace.store.check_room
    monkeypatch.setattr(
        workplace.store, "check_room", lambda nbytes, **options: (asked.append(nbytes), real(nbytes, **options))
    )
    recipes = [one_file, RECIPES[0]]
    jobs = [foreman.submit(source, *some) for some in (recipes[:1], recipes[1:], recipes)]
    plans = []
    for _ in jobs:
        foreman.run_next()
        plans.append(asked.pop())
    joined, kept = (build_plan(Checkpoint.open(source), recipe) for recipe in recipes)
    assert joined.finish_nbytes > joined.nbytes_out, "parts, and the file that is made of them"
    twice = joined.nbytes_out + joined.finish_nbytes
    assert plans == [twice, kept.nbytes_out, twice + kept.nbytes_out]


def dies_after(patched: pytest.MonkeyPatch, where: Any, name: str, calls: int) -> None:
    real, left = getattr(where, name), iter(range(calls))

    def dying(*arguments: object, **options: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    patched.setattr(where, name, dying)
