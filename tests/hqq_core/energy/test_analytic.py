"""White input through the real modules of each family: measured energies against analytic ones."""

import re

import pytest
import torch

from hqq_core import Checkpoint
from hqq_core.energy import _stream, _synthetic, analytic, synthetic
from tests import families
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint
from tests.families import FAMILIES

WIDTH, N_TOKENS = 256, 8192
WIDE = {"whisper": {"d_model": WIDTH, "max_source_positions": 1}, "gpt2": {"n_embd": WIDTH}}
MIXTURES = [name for name, own in FAMILIES.items() if "num_experts_per_tok" in own or name == "mixtral"]

# What chance may do to the ratio of a measured energy to the true one, at six standard deviations of a mean over N_TOKENS:
# x^2 has variance 2 for a normal x, act(n)^2 below 6, act(n)^2 u^2 below 20, each in units of its squared mean.
NORMED, ACTIVATED, GATED = (6 * (variance / N_TOKENS) ** 0.5 for variance in (2, 6, 20))
# What the formula leaves out: a LayerNorm takes the mean, (sum w)^2 / (d sum w^2), from a row w; gate and up are independent
# only up to the cosine of their rows. Both are chi-squared over the width: mean 1 / d, once in 16,000 rows 16 / d.
ROW = 16 / WIDTH


def bounds(name: str) -> tuple[float, float]:
    """How far one column's ratio, and the mean ratio of a tensor, may be from 1."""
    if re.search(r"down_proj|\.w2\.", name):
        return GATED + 4 * ROW, 0.05
    if re.search(r"fc2|mlp\.c_proj|dense_4h_to_h|\d\.output\.dense", name):
        return ACTIVATED + ROW, 0.02
    return NORMED + ROW, 0.01


@torch.no_grad()
def randomize(model) -> None:
    generator = torch.Generator().manual_seed(1)
    stored_less_one = 1.0 if model.config.model_type.startswith("gemma") else 0.0
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(torch.exp(0.5 * noise) - stored_less_one)


@pytest.fixture
def white_norms(monkeypatch):
    """Every norm is given white noise in place of its input; positions one by one, so that attention hands values on. Nothing is
    known of the stream then.
    """
    monkeypatch.setattr(_stream, "_FAMILIES", set())
    build = _synthetic._build

    def build_white(*args):
        model, generator = build(*args), torch.Generator().manual_seed(2)

        def whiten(module, args):
            return torch.randn(args[0].shape, generator=generator), *args[1:]

        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.register_forward_pre_hook(whiten)
        return model

    monkeypatch.setattr(_synthetic, "_build", build_white)
    monkeypatch.setattr(_synthetic, "WINDOW", 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_analytic_energies_are_those_of_white_input(family, tmp_path, white_norms):
    changes = dict(WIDE.get(family, {"hidden_size": WIDTH}))
    if family == "opt":
        changes["word_embed_proj_dim"] = WIDTH
    if family in MIXTURES:
        changes["num_experts_per_tok"] = 4  # all: what a router picks is not white
    model = families.build(family, **changes)
    randomize(model)
    model.save_pretrained(tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    guessed, measured = analytic(checkpoint), synthetic(checkpoint, n_tokens=N_TOKENS).vectors
    measured.pop("pooler.dense.weight", None)  # one vector of a text, after all layers
    assert guessed.note == ""
    assert measured.keys() <= guessed.vectors.keys()
    for name, vector in measured.items():
        ratio = vector / guessed.vectors[name]
        each, mean = bounds(name)
        assert (ratio.log().abs().max() < each) & (abs(ratio.mean() - 1) < mean), (name, ratio.aminmax(), ratio.mean())


@torch.no_grad()
def loud_channels(model) -> None:
    """A stream like a trained model's: an embedding, and outputs that join it, with a few channels far louder than the rest."""
    generator = torch.Generator().manual_seed(1)
    loudness = torch.exp(torch.randn(WIDTH, generator=generator))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        if "embed_tokens" in name:
            parameter.mul_(loudness)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(0.5 * loudness[:, None])


@pytest.mark.parametrize("family", sorted(_stream._FAMILIES))
def test_loud_channels_of_the_stream_are_foreseen(family, tmp_path, monkeypatch):
    """Behind norms, within sampling: positions one by one, so that attention hands values on."""
    monkeypatch.setattr(_synthetic, "WINDOW", 1)
    model = families.build(family, hidden_size=WIDTH, num_hidden_layers=3)
    loud_channels(model)
    model.save_pretrained(tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    measured = synthetic(checkpoint, n_tokens=N_TOKENS).vectors
    foreseen = analytic(checkpoint).vectors
    monkeypatch.setattr(_stream, "_FAMILIES", set())
    white = analytic(checkpoint).vectors
    behind_norms = [name for name in measured if re.search("(q|k|v|qkv|gate|up|gate_up)_proj", name)]
    assert len(behind_norms) >= 6

    def off(guess, name):
        return (measured[name] / guess[name]).log().std().item()

    assert all(off(foreseen, name) < 0.35 * off(white, name) for name in behind_norms)


@pytest.mark.parametrize("family", MIXTURES)
def test_fused_experts_get_what_each_would_alone(family, tmp_path):
    model = families.build(family)
    randomize(model)
    model.save_pretrained(tmp_path / "alone")
    alone = analytic(Checkpoint.open(tmp_path / "alone")).vectors
    fused = analytic(Checkpoint.open(families.save_fused(model, tmp_path / "fused"))).vectors
    stacks = [name for name in fused if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(stacks) == 2 * sum("shared" not in name and name.endswith("gate_up_proj") for name in fused) > 0
    for name in stacks:
        layer, _, kind = name.partition(".mlp.")
        kinds = {"experts.gate_up_proj": ("gate_proj", "w1"), "experts.down_proj": ("down_proj", "w2")}[kind]
        for expert, vector in enumerate(fused[name]):
            [own] = [
                n for n in alone if n.startswith(f"{layer}.") and any(f"experts.{expert}.{k}." in n for k in kinds)
            ]
            torch.testing.assert_close(vector, alone[own], rtol=1e-6, atol=0)


def test_an_unknown_family_has_no_analytic_energies(tmp_path):
    folder = save_checkpoint(tmp_path / "m", llama_tensors(), llama_config() | {"model_type": "starling"})
    found = analytic(Checkpoint.open(folder))
    assert (found.vectors, found.note) == ({}, "no analytic energies: model_type 'starling' is not known")


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "deepseek_v3"])
def test_a_config_that_does_not_fit_costs_the_energies_of_what_it_describes(family, tmp_path):
    checkpoint = Checkpoint.open(families.save(family, tmp_path / "m"))
    whole = analytic(checkpoint).vectors
    del checkpoint.config["num_attention_heads"]
    found = analytic(checkpoint)
    assert found.note.startswith("no analytic energies for ")
    assert {name.split(".")[-2] for name in whole.keys() - found.vectors.keys()} <= {"o_proj", "dense"}
    assert 0 < len(found.vectors) < len(whole)


@pytest.mark.parametrize("odd", ["two embeddings", "no loudness", "one weight too large"])
def test_what_the_stream_cannot_follow_is_taken_for_white(odd, tmp_path):
    tensors = llama_tensors()
    embedding, output = "model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"
    if odd == "two embeddings":
        tensors["draft.embed_tokens.weight"] = tensors[embedding].clone()
    elif odd == "no loudness":
        tensors[embedding] = torch.zeros_like(tensors[embedding])
    else:
        tensors[output][0, 0] = 2e19
    found = analytic(Checkpoint.open(save_checkpoint(tmp_path / "m", tensors, llama_config())))
    names = [name for name in tensors if name.endswith("_proj.weight")]
    assert found.vectors.keys() >= set(names)
    assert all(found.vectors[name].isfinite().all() for name in names)
