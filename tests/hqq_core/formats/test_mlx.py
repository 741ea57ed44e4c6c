"""What mlx and mlx-lm read equals what was solved, to the last stored bit."""

import dataclasses

import pytest
import torch

from hqq_core import Checkpoint, Recipe, build_plan, quantize, quantize_checkpoint
from hqq_core.errors import FormatError
from hqq_core.formats import FORMATS, check_recipe
from tests.families import build, replaced
from tests.hqq_core.formats.contract import WriterContract
from tests.oracles import (
    from_mlx,
    mlx_weights,
)


class TestMlx(WriterContract):
    name = "mlx"
    more = (Recipe(format="mlx", include_modules=("embed_tokens", "lm_head")),)

    def read(self, folder, dtype):
        return mlx_weights(folder)

    @pytest.mark.parametrize("nbits", FORMATS["mlx"].capabilities.nbits)
    def test_mlx_lm_computes_with_the_dequantized_weights(self, tmp_path, nbits):
        build("llama", num_hidden_layers=3).save_pretrained(tmp_path / "m", max_shard_size="150KB")
        recipe = Recipe(format="mlx", nbits=nbits, group_size=32, include_modules=["embed_tokens", "lm_head"])
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", recipe)
        self.compare(tmp_path)

    def test_a_tied_output_head_is_the_quantized_embedding(self, tmp_path):
        build("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "m")
        recipe = Recipe(format="mlx", group_size=32, include_modules=["embed_tokens"])
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", recipe)
        assert "model.embed_tokens" in mlx_weights(tmp_path / "out")
        self.compare(tmp_path)

    @pytest.mark.parametrize("family", ["mistral", "qwen3", "phi3", "mixtral", "olmoe", "qwen2_moe"])
    def test_mlx_lm_loads_other_families(self, tmp_path, family):
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} if family == "qwen2_moe" else {}
        build(family, intermediate_size=64, moe_intermediate_size=64, **rope).save_pretrained(tmp_path / "m")
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", Recipe(format="mlx", group_size=32, energy="none"))
        self.compare(tmp_path)

    def compare(self, folder):
        """Logits of mlx-lm beside those of transformers with the weights that mlx dequantizes."""
        import mlx.core as mx
        from mlx_lm.utils import load_model

        ids = torch.arange(1, 25)[None] * 7 % 320
        with torch.no_grad():
            wanted = replaced(folder / "m", folder / "out", folder / "dequantized", mlx_weights(folder / "out"))(
                ids
            ).logits
        got = from_mlx(load_model(folder / "out")[0](mx.array(ids.numpy())))
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()

    def test_other_mixtures_of_experts_are_refused(self, tmp_path):
        build("qwen3_moe", moe_intermediate_size=64).save_pretrained(tmp_path / "m")
        with pytest.raises(FormatError, match="experts of mixtral, olmoe, qwen2_moe alone; format"):
            build_plan(Checkpoint.open(tmp_path / "m"), Recipe(format="mlx", group_size=32))

    def test_offsets_are_solved_as_they_are_stored(self):
        """At 8 bit, bfloat16 holds an offset to a step or so: rounded afterwards it costs a third of the accuracy."""
        writer = FORMATS[self.name]
        spec = writer.tensor_spec(check_recipe(Recipe(format="mlx", nbits=8)), "m.weight", (64, 128), "BF16")
        W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        solved = quantize(W, spec)
        real = quantize(W, dataclasses.replace(spec, zero="float"))
        rounded = real.W_q * real.scale.float() + (-real.zero.float() * real.scale.float()).bfloat16().float()
        assert solved.squared_error < 0.75 * (rounded.view(W.shape) - W.float()).square().sum()
