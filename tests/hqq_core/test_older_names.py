"""Readers that know transformers 4's names for rotary settings compute with the same angles."""

import json

import pytest
import torch

from hqq_core import Recipe, quantize_checkpoint
from hqq_core.architectures import with_older_names
from tests.families import build, replaced
from tests.oracles import from_mlx, mlx_weights

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e5}, LINEAR], ids=["default", "linear"])
def test_mlx_lm_turns_by_the_angles_of_the_source(tmp_path, rope):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    build("llama", rope_parameters=rope).save_pretrained(tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "out", Recipe(format="mlx", group_size=32, energy="none"))
    ids = torch.arange(1, 60)[None] * 7 % 320
    with torch.no_grad():
        model = replaced(tmp_path / "m", tmp_path / "out", tmp_path / "dequantized", mlx_weights(tmp_path / "out"))
        wanted = model(ids).logits
    got = from_mlx(load_model(tmp_path / "out")[0](mx.array(ids.numpy())))
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_transformers_5_reads_both_spellings_as_one(tmp_path):
    from transformers import AutoConfig

    build("llama", rope_parameters=LINEAR).save_pretrained(tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "out", Recipe(group_size=32, energy="none"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 1e5
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == LINEAR


@pytest.mark.parametrize(
    "config",
    [{}, {"rope_theta": 5.0}, {"rope_parameters": None}, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}],
    ids=["none", "older", "null", "by layer"],
)
def test_what_has_no_older_name_is_left_alone(config):
    assert with_older_names(config) == config


def test_an_older_name_that_is_there_is_kept():
    assert with_older_names({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}})["rope_theta"] == 5.0
