"""verify_part: what holds of a folder holds of its parts, and a folder of verified parts is judged as if none had been."""

from dataclasses import replace
from pathlib import Path

import pytest

from hqq_core import Checkpoint, Recipe, build_plan
from hqq_core.checkpoint import FOLDING, REPORT
from hqq_core.convert import describe_part, finish_checkpoint, quantize_shard, write_folding
from hqq_core.energy import profile
from hqq_core.errors import VerificationError
from hqq_core.results import HeldPart
from hqq_core.verify import verify_folder, verify_part
from tests.checkpoints import damage, llama_config, llama_tensors, save_checkpoint
from tests.hqq_core.test_verify import RECIPES

N_SHARDS = 3
SAFETENSORS = {name: recipe for name, recipe in RECIPES.items() if name != "bitnet"}  # which wants a ternary source
Q = "model.layers.0.self_attn.q_proj.weight"


class Steps:
    """One conversion, each part of it verified as soon as it was there."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.source, self.output = folder / "source", folder / "output"
        save_checkpoint(self.source, llama_tensors(4, 128), llama_config(4, 128), N_SHARDS)
        self.output.mkdir()
        self.checkpoint = Checkpoint.open(self.source)
        plan = build_plan(self.checkpoint, recipe)
        self.energies = profile(self.checkpoint, "analytic" if plan.recipe.weighted else "none")
        self.plan = plan.with_energies(self.energies)
        write_folding(self.plan, self.energies, self.output)
        self.results = [self._solve(index) for index in range(N_SHARDS)]

    def _solve(self, index: int):
        return quantize_shard(self.checkpoint, [self.plan], index, self.output, self.energies, threads=1)[0]

    def held(self, index: int, **described) -> HeldPart:
        config, report = describe_part(self.checkpoint, self.plan, self.results[index])
        about = {"config": config, "report": report} | described
        return verify_part(self.output, self.results[index], source=self.checkpoint, threads=1, **about)

    def parts(self) -> list[HeldPart]:
        return [self.held(index) for index in range(N_SHARDS)]

    def finish(self) -> None:
        finish_checkpoint(self.checkpoint, self.plan, self.results, self.output)


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    return Steps(Recipe(format="hqq", fold=False, energy="none"), tmp_path)


@pytest.mark.parametrize("recipe", SAFETENSORS.values(), ids=SAFETENSORS)
def test_folder_of_verified_parts(tmp_path: Path, recipe: Recipe) -> None:
    steps = Steps(recipe, tmp_path)
    parts = steps.parts()
    steps.finish()
    found = verify_folder(steps.output, steps.checkpoint, held=parts)
    assert found == verify_folder(steps.output, steps.checkpoint)
    assert [HeldPart.from_dict(part.to_dict()) for part in parts] == parts


def test_verified_parts_need_no_weights_of_the_source(steps: Steps) -> None:
    parts = steps.parts()
    steps.finish()

    def lend(name: str):
        raise AssertionError(f"{name} was read")

    headers_alone = replace(steps.checkpoint, lender=lend)
    assert verify_folder(steps.output, headers_alone, held=parts).tensors_quantized == 28
    with pytest.raises(AssertionError, match="was read"):
        verify_folder(steps.output, headers_alone, held=parts[1:])


@pytest.mark.parametrize("held", [(0, 1, 2), (0,), (1, 2)])
def test_bit_that_changed_after_its_part_was_verified(steps: Steps, held: tuple[int, ...]) -> None:
    parts = [steps.held(index) for index in held]
    steps.finish()
    damage(steps.output / steps.results[0].files[0].name, Q.removesuffix("weight"))
    with pytest.raises(VerificationError, match=f"{Q}: digest"):
        verify_folder(steps.output, steps.checkpoint, held=parts)


def test_factors_that_changed_after_their_parts_were_verified(tmp_path: Path) -> None:
    steps = Steps(Recipe(energy="analytic"), tmp_path)
    parts = steps.parts()
    damage(steps.output / FOLDING, "")
    steps.finish()
    with pytest.raises(VerificationError, match="in the source"):
        verify_folder(steps.output, steps.checkpoint, held=parts)


def test_bit_that_changed_before(steps: Steps) -> None:
    damage(steps.output / steps.results[0].files[0].name, Q.removesuffix("weight"))
    with pytest.raises(VerificationError, match=f"{Q}: digest"):
        steps.held(0)


def test_part_that_is_gone_or_lacks_a_tensor(steps: Steps) -> None:
    _, report = describe_part(steps.checkpoint, steps.plan, steps.results[0])
    with pytest.raises(VerificationError, match="no tensor of the source becomes it"):
        steps.held(0, report=report[1:])
    with pytest.raises(VerificationError, match=r"model.norm.weight.*not in the weight files"):
        steps.held(0, report=[*report, {**report[0], "name": "another.model.norm.weight", "spec": None}])
    (steps.output / steps.results[0].files[0].name).unlink()
    with pytest.raises(VerificationError, match="no such file"):
        steps.held(0)


def test_config_that_readers_do_not_understand(steps: Steps) -> None:
    config, _ = describe_part(steps.checkpoint, steps.plan, steps.results[0])
    told = {**config["quantization_config"], "quant_method": "unheard-of"}
    with pytest.raises(VerificationError, match="no quantization_config that is understood"):
        steps.held(0, config={**config, "quantization_config": told})


def test_error_that_was_not_what_was_reported(steps: Steps) -> None:
    _, report = describe_part(steps.checkpoint, steps.plan, steps.results[0])
    boasted = [{**entry, "squared_error": 0.9 * entry["squared_error"]} if entry["spec"] else entry for entry in report]
    with pytest.raises(VerificationError, match="against the source"):
        steps.held(0, report=boasted)


def test_progress_comes_to_its_end_and_stops_the_work(steps: Steps) -> None:
    parts = steps.parts()
    steps.finish()
    told: list[tuple[int, int]] = []
    verify_folder(steps.output, steps.checkpoint, held=parts, progress=lambda *done: told.append(done))
    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)
    nbytes = sum(path.stat().st_size for path in steps.output.iterdir())
    assert told[-1][1] <= nbytes, "no weight is counted again"

    def stop(*done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_folder(steps.output, steps.checkpoint, held=parts, progress=stop)
    assert (steps.output / REPORT).is_file()
