"""What the hqq library reads equals what was solved, to the last stored bit."""

import torch

from hqq_core import Checkpoint, Recipe, build_plan
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint
from tests.hqq_core.formats.contract import WriterContract
from tests.oracles import (
    hqq_layers,
)


class TestHqq(WriterContract):
    name = "hqq"

    def read(self, folder, dtype):
        return {module: layer.dequantize() for module, layer in hqq_layers(folder, dtype).items()}

    def test_rows_that_do_not_fill_a_byte_are_copied_with_the_reason(self, tmp_path):
        tensors = llama_tensors(1) | {"model.layers.0.self_attn.k_proj.weight": torch.ones(3, 64, dtype=torch.bfloat16)}
        plan = build_plan(
            Checkpoint.open(save_checkpoint(tmp_path / "m", tensors, llama_config(1))), Recipe(format="hqq")
        )
        odd = next(tensor for tensor in plan.tensors if "k_proj" in tensor.name)
        assert odd.reason == "3 rows of groups do not fill bytes of 2 codes"
