"""What a reader in numpy, and mlx-lm read equals what was solved, to the last stored bit."""

import pytest
import torch

from hqq_core import Checkpoint, Recipe, build_plan, quantize_checkpoint
from hqq_core.errors import FormatError
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint
from tests.families import build, replaced
from tests.hqq_core.formats.contract import WriterContract
from tests.oracles import (
    awq_weights,
    from_mlx,
)


class TestAwq(WriterContract):
    name = "awq"

    def read(self, folder, dtype):
        return awq_weights(folder, dtype)

    def test_mlx_lm_loads_it(self, tmp_path):
        """It computes in the scales' half precision, and rounds -zero * scale to it."""
        import mlx.core as mx
        from mlx_lm.utils import load_model

        build("llama", num_hidden_layers=3, intermediate_size=64).save_pretrained(tmp_path / "m")
        quantize_checkpoint(
            tmp_path / "m", tmp_path / "out", Recipe(format="awq", skip_modules=["layers.1.mlp.up_proj"])
        )
        ids = torch.arange(1, 25)[None] * 7 % 320
        read = awq_weights(tmp_path / "out", torch.float32)
        with torch.no_grad():
            wanted = replaced(tmp_path / "m", tmp_path / "out", tmp_path / "dequantized", read)(ids).logits
        got = from_mlx(load_model(tmp_path / "out")[0](mx.array(ids.numpy())))
        assert (got - wanted).abs().max() < 5e-3 * wanted.abs().max()

    @pytest.mark.parametrize(
        ("family", "recipe", "field", "message"),
        [
            ("mixtral", {}, "format", "none; formats 'hqq', 'mlx' hold it"),
            ("gpt_neox", {}, "format", "no family that scales activations"),
            ("llama", {"include_modules": ["lm_head"]}, "include_modules", "lm_head: cannot be quantized"),
        ],
    )
    def test_what_readers_would_not_find_is_refused(self, tmp_path, family, recipe, field, message):
        build(family, intermediate_size=64).save_pretrained(tmp_path / "m")
        with pytest.raises(FormatError, match=message) as caught:
            build_plan(Checkpoint.open(tmp_path / "m"), Recipe(format="awq", **recipe))
        assert caught.value.field == field

    def test_outputs_that_do_not_fill_a_word_are_copied(self, tmp_path):
        tensors = llama_tensors(1) | {"model.layers.0.self_attn.k_proj.weight": torch.ones(12, 64).bfloat16()}
        source = save_checkpoint(tmp_path / "m", tensors, llama_config(1))
        plan = build_plan(Checkpoint.open(source), Recipe(format="awq"))
        assert next(t.reason for t in plan.tensors if "k_proj" in t.name) == "12 outputs do not fill words of 8"
