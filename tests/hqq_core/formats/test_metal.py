"""What transformers reads equals what was solved, to the last stored bit."""

import pytest
import torch

from hqq_core import Checkpoint, Recipe, build_plan, quantize_checkpoint
from hqq_core.errors import FormatError
from hqq_core.evaluate import load_model
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint, save_llama
from tests.families import build, replaced
from tests.hqq_core.formats.contract import WriterContract
from tests.oracles import (
    stored_tensors,
)


class TestMetal(WriterContract):
    name = "metal"
    more = (Recipe(format="metal", include_modules=("lm_head",), skip_modules=("layers.0.mlp.up_proj",)),)
    arithmetic = torch.float32

    def read(self, folder, dtype):
        """Transformers itself, which dequantizes where there is no Mac; all that it loads must be there."""
        from transformers import AutoModelForCausalLM

        model, told = AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", dtype=dtype, output_loading_info=True
        )
        assert not any(told.values())
        packed = {name.removesuffix(".qbiases") for name in stored_tensors(folder) if name.endswith(".qbiases")}
        return {module: model.get_submodule(module).weight.detach() for module in packed}

    def test_it_can_be_evaluated(self, tmp_path):
        quantize_checkpoint(save_llama(tmp_path / "m"), tmp_path / "out", Recipe(format="metal"))
        ids = torch.arange(1, 25)[None] * 7 % 320
        with torch.no_grad():
            got = load_model(tmp_path / "out")(ids).logits
            weights = self.read(tmp_path / "out", torch.bfloat16)
            assert torch.equal(
                got, replaced(tmp_path / "m", tmp_path / "out", tmp_path / "dequantized", weights)(ids).logits
            )

    def test_a_layer_left_alone_is_left_alone(self, tmp_path):
        """Also where another's name begins with its name."""
        from transformers import AutoModelForCausalLM

        tensors = llama_tensors(11)
        source = save_checkpoint(tmp_path / "m", tensors, llama_config(11))
        recipe = Recipe(format="metal", energy="none", skip_modules=["layers.1.mlp.up_proj"])
        quantize_checkpoint(source, tmp_path / "out", recipe)
        layers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu").model.layers
        alike = [
            torch.equal(layers[i].mlp.up_proj.weight, tensors[f"model.layers.{i}.mlp.up_proj.weight"])
            for i in range(11)
        ]
        assert alike == [i == 1 for i in range(11)]

    def test_a_mixture_of_experts_is_refused(self, tmp_path):
        build("mixtral", intermediate_size=64).save_pretrained(tmp_path / "m")
        with pytest.raises(FormatError, match="formats 'hqq', 'mlx' hold it"):
            build_plan(Checkpoint.open(tmp_path / "m"), Recipe(format="metal"))
