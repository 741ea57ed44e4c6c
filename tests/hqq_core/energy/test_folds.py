"""Folds of every family: the model computes what it did; and what they do to a plan and its result."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from hqq_core import Checkpoint, Recipe, build_plan, quantize_checkpoint
from hqq_core.energy import fold, profile
from tests import families
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint, save_llama
from tests.families import FAMILIES

# Weights of the two layers whose columns are folded: a Conv1D is copied, BERT's norms feed the residual stream, too.
N_COLUMNS = {
    "phi3": 8,
    "gpt2": 0,
    "gpt_neox": 6,
    "opt": 12,
    "bert": 2,
    "qwen3_moe": 34,
    "mixtral": 34,
    "deepseek_v3": 29,
    "whisper": 24,
}


def applied(tensors, folds):
    """The tensors as a quantizer that loses nothing would leave them, in float32."""
    folded = {name: tensor.float() for name, tensor in tensors.items()}
    for one in folds:
        for name, factors in one.columns.items():
            folded[name] = folded[name] * factors
        for name, factors in one.rows.items():
            folded[name] = folded[name] * factors[:, None]
        folded |= {name: value.float() for name, value in one.values.items()}
    return folded


@torch.no_grad()
def answer(model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 512, (2, 9), generator=generator)
    if model.config.model_type == "whisper":
        return model(input_features=torch.randn(2, 16, 16, generator=generator), decoder_input_ids=ids)[0]
    return model(input_ids=ids)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_computes_what_it_did(family, dtype, tmp_path):
    model = families.build(family).to(dtype)
    model.save_pretrained(tmp_path)
    folds = fold(Checkpoint.open(tmp_path))
    assert sum(len(one.columns) for one in folds) == N_COLUMNS.get(family, 14)
    tensors = load_file(tmp_path / "model.safetensors")
    folded = applied(tensors, folds)
    changed = {name for name, tensor in tensors.items() if not torch.equal(folded[name], tensor.float())}
    assert changed == {name for one in folds for part in (one.columns, one.rows, one.values) for name in part}
    model = model.float()
    before = answer(model)
    stored = type(model).from_pretrained(None, config=model.config, state_dict=folded, dtype=torch.float32).eval()
    after = answer(stored)
    # biases of a norm are the one thing that is rounded; a router may pick another expert at a tie
    assert (after - before).norm() < (1e-5 if dtype is torch.float32 else 1e-3) * before.norm()


def test_columns_lie_closer_together(tmp_path):
    folder = save_llama(tmp_path / "m")
    tensors, folds = load_file(folder / "model.safetensors"), fold(Checkpoint.open(folder))

    def spread(W):
        return W.square().mean(0).log().std()

    folded = applied(tensors, folds)
    down = [name for name in tensors if "down_proj" in name]
    assert all(spread(folded[name]) < 0.6 * spread(tensors[name].float()) for name in down)


def test_all_of_a_fold_is_applied_or_none(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    energies = profile(checkpoint, "analytic")

    def folded(**settings):
        plan = build_plan(checkpoint, Recipe(**settings)).with_energies(energies)
        return {tensor.name.removeprefix("model.layers.0."): tensor.folded for tensor in plan.tensors if tensor.folded}

    whole = folded()
    assert whole["self_attn.v_proj.weight"] == ("columns", "rows")
    assert whole["input_layernorm.weight"] == ("values",)
    without_k = folded(skip_modules=["k_proj"])
    assert "input_layernorm.weight" not in without_k
    assert without_k["self_attn.v_proj.weight"] == ("rows",)
    assert without_k["self_attn.o_proj.weight"] == ("columns",)
    without_up = folded(skip_modules=["up_proj"])
    assert not {name for name in without_up if "mlp" in name or name.startswith("post_attention")}
    assert folded(fold=False) == {}
    assert folded(format="hqq", axis=0) == {}


def test_what_is_written_is_the_folded_model(tmp_path):
    folder = save_llama(tmp_path / "m")
    energies = profile(Checkpoint.open(folder), "analytic")
    recipe = Recipe(format="hqq", nbits=8, energy="analytic")
    quantize_checkpoint(folder, tmp_path / "folded", recipe)
    quantize_checkpoint(folder, tmp_path / "plain", dataclasses.replace(recipe, fold=False))
    wanted = applied(load_file(folder / "model.safetensors"), energies.folds)
    folded, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("folded", "plain"))
    for name in ("model.layers.1.self_attn.o_proj", "model.layers.0.mlp.up_proj"):
        W = wanted[f"{name}.weight"]
        W_q = folded[f"{name}.W_q"].float().reshape(len(folded[f"{name}.scale"]), -1)
        W_r = ((W_q - folded[f"{name}.zero"].float()) * folded[f"{name}.scale"].float()).reshape(W.shape)
        assert (W_r - W).norm() < 0.02 * W.norm()
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(folded[norm].float(), wanted[norm])
    assert not torch.equal(folded[norm], plain[norm])


def test_nothing_is_folded_where_the_config_does_not_say_how_heads_repeat(tmp_path):
    checkpoint = Checkpoint.open(families.save("llama", tmp_path / "m"))
    whole = fold(checkpoint)
    del checkpoint.config["num_key_value_heads"]
    assert len(whole) - len(fold(checkpoint)) == 2, "values of two layers"


@pytest.mark.parametrize("odd", ["stranger", "scalar gain", "row of gains", "float8 gain", "infinite gain"])
def test_a_layer_that_is_not_its_familys_keeps_its_norm(odd, tmp_path):
    tensors, config = llama_tensors(), llama_config()
    norm = "model.layers.1.input_layernorm.weight"
    changed = {
        "stranger": {"model.layers.1.self_attn.extra_proj.weight": torch.ones(4, 64)},
        "scalar gain": {norm: torch.ones(1)},
        "row of gains": {norm: torch.ones(1, len(tensors[norm]))},
        "float8 gain": {norm: tensors[norm].to(torch.float8_e4m3fn)},
        "infinite gain": {norm: torch.full_like(tensors[norm], torch.inf)},
    }[odd]
    folds = fold(Checkpoint.open(save_checkpoint(tmp_path / "m", tensors | changed, config)))
    values = {name for one in folds for name in one.values}
    assert norm not in values
    assert "model.layers.0.input_layernorm.weight" in values


def test_a_relu_that_another_key_denies_is_none(tmp_path):
    checkpoint = Checkpoint.open(families.save("opt", tmp_path / "m"))

    def folded():
        return {name for one in fold(checkpoint) for name in one.rows if "fc1" in name}

    assert len(folded()) == 2
    checkpoint.config["hidden_act"] = "gelu"
    assert folded() == set()
