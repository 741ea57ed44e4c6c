"""What the compressed-tensors library and transformers read equals what was solved, to the last stored bit."""

import dataclasses
import json

import pytest
import torch

from hqq_core import Checkpoint, Recipe, build_plan, quantize, quantize_checkpoint
from hqq_core.errors import FormatError
from hqq_core.formats import FORMATS, check_recipe
from hqq_core.formats.compressed_tensors import EXPERT_FAMILIES
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint, save_llama
from tests.families import build, replaced
from tests.hqq_core.formats.contract import WriterContract
from tests.oracles import (
    compressed_tensors_weights,
)


class TestCompressedTensors(WriterContract):
    name = "compressed-tensors"
    more = (Recipe(include_modules=("lm_head",)),)

    def read(self, folder, dtype):
        return compressed_tensors_weights(folder)

    @pytest.mark.parametrize("zero", ["int", "none"])
    @pytest.mark.parametrize("nbits", FORMATS["compressed-tensors"].capabilities.nbits)
    def test_transformers_loads_it(self, tmp_path, nbits, zero):
        from transformers import AutoModelForCausalLM

        source = save_llama(tmp_path / "m")
        recipe = Recipe(nbits=nbits, zero=zero, skip_modules=["model.layers.0.mlp.up_proj"])
        quantize_checkpoint(source, tmp_path / "out", recipe)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        read = compressed_tensors_weights(tmp_path / "out")
        state = model.state_dict()
        assert all(torch.equal(state[f"{module}.weight"], weight) for module, weight in read.items())
        original = llama_tensors()["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], original)

    @pytest.mark.parametrize(("tied", "include"), [(False, ["lm_head"]), (False, []), (True, [])])
    def test_the_output_head_is_found_where_it_is(self, tmp_path, tied, include):
        build("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "m")
        recipe = Recipe(group_size=32, energy="none", include_modules=include)
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", recipe)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config["ignore"] == ([] if include else ["lm_head"])
        weights = compressed_tensors_weights(tmp_path / "out")
        expected = replaced(tmp_path / "m", tmp_path / "out", tmp_path / "dequantized", weights).state_dict()
        from transformers import AutoModelForCausalLM

        model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(told.values())
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("family", EXPERT_FAMILIES)
    def test_transformers_loads_symmetric_experts(self, tmp_path, family):
        from transformers import AutoModelForCausalLM

        latent = {"q_lora_rank": 32, "v_head_dim": 16} if family == "deepseek_v3" else {}
        build(family, intermediate_size=64, moe_intermediate_size=64, **latent).save_pretrained(tmp_path / "m")
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", Recipe(group_size=32, zero="none", energy="none"))
        read = compressed_tensors_weights(tmp_path / "out")
        assert any(".experts." in module for module in read)
        expected = replaced(tmp_path / "m", tmp_path / "out", tmp_path / "dequantized", read).state_dict()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())

    @pytest.mark.parametrize(
        ("recipe", "field", "message"),
        [
            ({}, "zero", "experts with 'none'"),
            ({"zero": "none", "skip_modules": ["experts.1.up_proj"]}, "format", "all experts or no model"),
            ({"zero": "none"}, "format", "experts of deepseek_v3.* alone; format"),
        ],
        ids=["zero points", "some left", "family"],
    )
    def test_experts_that_transformers_would_not_find_are_refused(self, tmp_path, recipe, field, message):
        experts = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": torch.zeros(64, 64) for i in range(2)}
        source = save_checkpoint(tmp_path / "m", llama_tensors(1) | experts, llama_config(1))
        with pytest.raises(FormatError, match=message) as caught:
            build_plan(Checkpoint.open(source), Recipe(**recipe))
        assert caught.value.field == field
        assert any(
            "experts" in tensor.name and tensor.spec
            for tensor in build_plan(Checkpoint.open(source), Recipe(format="hqq")).tensors
        )

    @pytest.mark.parametrize("zero", ["int", "none"])
    def test_fewer_rows_than_a_word_holds(self, tmp_path, zero):
        """Zero points are packed along the rows, which are padded."""
        tensors = llama_tensors(1) | {"model.layers.0.self_attn.k_proj.weight": torch.randn(7, 64).bfloat16()}
        source = save_checkpoint(tmp_path / "m", tensors, llama_config(1))
        quantize_checkpoint(source, tmp_path / "out", Recipe(nbits=3, zero=zero, energy="none"))
        plan = build_plan(Checkpoint.open(source), Recipe(nbits=3, zero=zero))
        spec = next(tensor.spec for tensor in plan.tensors if tensor.spec)
        solved = quantize(tensors["model.layers.0.self_attn.k_proj.weight"], spec).dequantize()
        assert torch.equal(compressed_tensors_weights(tmp_path / "out")["model.layers.0.self_attn.k_proj"], solved)

    def test_zero_points_are_solved_as_integers(self):
        writer = FORMATS[self.name]
        spec = writer.tensor_spec(check_recipe(Recipe()), "m.weight", (64, 128), "BF16")
        W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        solved = quantize(W, spec)
        real = quantize(W, dataclasses.replace(spec, zero="float"))
        rounded = (real.W_q - real.zero.float().round().clamp(0, 15)) * real.scale.float()
        assert solved.squared_error < (rounded.view(W.shape) - W.float()).square().sum()
