"""A job whose result is not what was solved fails, names the tensor, and leaves nothing to download."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hqq_core.checkpoint import MANIFEST
from hqq_core.formats import base, hqq
from hqq_core.recipe import Recipe
from service.common.models import Job
from service.common.status import JobStatus, UnitKind
from tests.checkpoints import damage
from tests.worker.conftest import Foreman
from worker.workplace import Workplace

HQQ = Recipe(format="hqq", energy="none")
SHARD = "model-00001-of-00002.safetensors"


def failed(foreman: Foreman, workplace: Workplace, job: Job) -> str:
    """The message of a job that has failed for its result, and left nothing."""
    foreman.run_all()
    job = foreman.get(job)
    assert (job.status, job.result) == (JobStatus.FAILED, None)
    assert job.error is not None
    assert (job.error["code"], job.error["type"]) == ("result_damaged", "system")
    assert not workplace.store.folder(job.id).exists()
    return str(job.error["message"])


@pytest.mark.parametrize("recipe", [HQQ, Recipe(energy="analytic")], ids=["plain", "folded"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.", "model.embed_tokens.weight"])
def test_one_bit_that_changed_since_it_was_written(
    foreman: Foreman, workplace: Workplace, source: Path, recipe: Recipe, name: str
) -> None:
    job = foreman.submit(source, recipe, max_attempts=1)
    foreman.run_up_to(UnitKind.FINISH)
    damage(workplace.store.output(job.id) / SHARD, name)
    message = failed(foreman, workplace, job)
    assert message.startswith(f"what was written is not what was solved: {name}")
    assert "digest" in message


def test_writer_that_packs_wrongly(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = hqq.pack_strided
    monkeypatch.setattr(hqq, "pack_strided", lambda codes, nbits: pack(codes.flip(0), nbits))
    job = foreman.submit(source, HQQ)
    message = failed(foreman, workplace, job)
    assert "_proj.weight: digest" in message
    assert foreman.get(job).attempt == 3, "tried again: what was read may have been at fault"


def test_solver_that_reports_another_error(
    foreman: Foreman, workplace: Workplace, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = base.quantize

    def boast(*args: Any, **settings: Any) -> Any:
        solved = solve(*args, **settings)
        return dataclasses.replace(solved, squared_error=0.9 * solved.squared_error)

    monkeypatch.setattr(base, "quantize", boast)
    message = failed(foreman, workplace, foreman.submit(source, HQQ, max_attempts=1))
    assert "_proj.weight: error" in message
    assert "against the source" in message


def _negate(name: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = next(path for path in source.glob("*.safetensors") if name in load_file(path))
        tensors = load_file(path)
        tensors[name].neg_()
        save_file(tensors, path)

    return change


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj.weight", "model.norm.weight"])
def test_source_that_changed_meanwhile(foreman: Foreman, workplace: Workplace, source: Path, name: str) -> None:
    job = foreman.submit(source, HQQ, max_attempts=1)
    foreman.run_up_to(UnitKind.FINISH)
    _negate(name)(source)
    assert f"{name}: " in failed(foreman, workplace, job)


def test_factors_that_are_gone(foreman: Foreman, workplace: Workplace, source: Path) -> None:
    job = foreman.submit(source, Recipe(energy="analytic"), max_attempts=1)
    foreman.run_up_to(UnitKind.FINISH)
    (workplace.store.output(job.id) / "halfquad_folding.dat").unlink()
    assert "halfquad_folding.dat: written before, but gone" in failed(foreman, workplace, job)


def test_worker_that_leaves_while_it_verifies_hands_the_unit_back(
    foreman: Foreman, workplace: Workplace, source: Path
) -> None:
    job = foreman.submit(source, HQQ)
    foreman.run_up_to(UnitKind.FINISH)
    foreman.leaving.set()
    foreman.run_next()
    assert "unit_handed_back" in foreman.actions(job)
    assert not (workplace.store.output(job.id) / MANIFEST).exists()
    foreman.leaving.clear()
    foreman.run_all()
    assert foreman.get(job).status == JobStatus.SUCCEEDED
