import dataclasses
import json

import pytest
import torch

from hqq_core import Checkpoint, Plan, QuantSpec, Recipe, build_plan
from hqq_core.energy import Energies
from hqq_core.errors import CheckpointError, FormatError, SpecError
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint, save_llama


def plan_of(folder, **settings) -> Plan:
    return build_plan(Checkpoint.open(folder), Recipe(**settings))


def test_plan_says_what_becomes_of_every_tensor_and_why(tmp_path):
    plan = plan_of(save_llama(tmp_path / "m", layers=1), format="hqq")
    reasons = {tensor.name: (tensor.spec is not None, tensor.reason) for tensor in plan.tensors}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == (True, "linear layer")
    assert reasons["lm_head.weight"] == (False, "output head: errors here meet the logits directly")
    assert reasons["model.embed_tokens.weight"] == (False, "embedding: looked up, not multiplied")
    assert reasons["model.norm.weight"] == (False, "bias, gain or other vector")
    assert all(tensor.nbytes_out == tensor.nbytes_in for tensor in plan.tensors if tensor.spec is None)


def test_plan_survives_json(tmp_path):
    plan = plan_of(save_llama(tmp_path / "m", n_shards=3), skip_modules=["down_proj"])
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_plan_names_the_solver_and_where_energies_come_from(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    energies = Energies({name: torch.ones(64)}, {name: "analytic"}, "no synthetic energies: no time")
    plan = plan_of(save_llama(tmp_path / "m"), format="hqq", preset="best").with_energies(energies)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.energy_note == "no synthetic energies: no time"
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    assert {tensor.energy for tensor in plan.tensors if tensor.spec and tensor.name != name} == {"none"}
    tensor, head = by_name[name], by_name["lm_head.weight"]
    assert (tensor.solver, tensor.preset, tensor.energy) == ("least squares", "best", "analytic")
    assert (head.solver, head.preset, head.energy) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "solver"),
    [
        ({"iters": 0, "starts": 1}, "round to nearest"),
        ({"iters": 0, "starts": 4}, "least squares"),
        ({"lp_norm": 0.7}, "half-quadratic"),
    ],
)
def test_the_solver_is_named_after_what_it_does(tmp_path, settings, solver):
    tensor = next(t for t in plan_of(save_llama(tmp_path / "m"), format="hqq").tensors if t.spec)
    assert dataclasses.replace(tensor, spec=QuantSpec(**settings)).solver == solver


def test_a_plan_of_another_version_is_refused(tmp_path):
    fields = plan_of(save_llama(tmp_path / "m")).to_dict()
    with pytest.raises(CheckpointError, match="plan of version 1: wanted 4"):
        Plan.from_dict(fields | {"version": 1})


def test_skip_and_include_take_full_names_and_last_parts(tmp_path):
    folder = save_llama(tmp_path / "m")
    plan = plan_of(
        folder,
        format="hqq",
        include_modules=["lm_head"],
        skip_modules=["mlp.down_proj", "model.layers.1.self_attn.q_proj"],
    )
    reasons = {tensor.name: tensor.reason for tensor in plan.tensors if tensor.spec is None and len(tensor.shape) == 2}
    assert set(reasons) == {
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    }
    assert reasons["model.layers.0.mlp.down_proj.weight"] == "skip_modules names it"


@pytest.mark.parametrize("field", ["include_modules", "skip_modules"])
def test_a_name_that_matches_nothing_is_an_error(tmp_path, field):
    with pytest.raises(SpecError, match=f"{field} 'lm_hed': no such module") as caught:
        plan_of(save_llama(tmp_path / "m"), **{field: ["lm_hed"]})
    assert caught.value.field == field


@pytest.mark.parametrize("module", ["embed_tokens", "norm"])
def test_what_a_format_cannot_hold_is_refused_when_asked_for(tmp_path, module):
    with pytest.raises(FormatError, match=f"{module}: cannot be quantized"):
        plan_of(save_llama(tmp_path / "m"), include_modules=[module])


def test_a_tied_head_is_not_quantized(tmp_path):
    folder = save_checkpoint(tmp_path / "m", llama_tensors(1), llama_config(1) | {"tie_word_embeddings": True})
    with pytest.raises(FormatError, match="lm_head: cannot be quantized: tied to the input embedding"):
        plan_of(folder, include_modules=["lm_head"])


def test_shapes_that_the_group_size_does_not_cut_are_copied_with_the_reason(tmp_path):
    tensors = llama_tensors(1) | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 65, dtype=torch.bfloat16)}
    plan = plan_of(save_checkpoint(tmp_path / "m", tensors, llama_config(1)))
    odd = next(tensor for tensor in plan.tensors if "q_proj" in tensor.name)
    assert odd.spec is None
    assert odd.reason == "group_size 64 does not divide 65 (axis 1 of (64, 65))"


def test_integers_and_doubles_are_copied_with_the_reason(tmp_path):
    tensors = llama_tensors(1) | {"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 64, dtype=torch.float64)}
    plan = plan_of(save_checkpoint(tmp_path / "m", tensors, llama_config(1)))
    assert next(tensor for tensor in plan.tensors if "up_proj" in tensor.name).reason == "dtype F64 is not solved"


def test_a_checkpoint_with_nothing_to_quantize_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="none of 21 tensors can be quantized: group_size 128 does not divide 64"):
        plan_of(save_llama(tmp_path / "m"), format="hqq", group_size=128, skip_modules=["down_proj"])


def test_names_that_would_collide_in_the_result_are_refused(tmp_path):
    tensors = llama_tensors(1) | {"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(64, 1)}
    with pytest.raises(
        CheckpointError, match=r"stored as 'model.layers.0.self_attn.q_proj.weight_scale', a name taken"
    ):
        plan_of(save_checkpoint(tmp_path / "m", tensors, llama_config(1)))
