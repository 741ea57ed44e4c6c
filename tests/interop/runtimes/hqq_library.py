"""The hqq library's layers in a model of transformers 5, format `hqq`; computes in float32. As docs/finetuning.md has it."""

import causal
import torch
from hqq.core.quantize import HQQLinear
from protocol import Answer, Task, counted, serve
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def compute(task: Task) -> Answer:
    """On HQQLinear, which dequantizes layer by layer."""
    tensors = {name: tensor for file in task.folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    config = AutoConfig.from_pretrained(task.folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(tensors, strict=False)
    for module in [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]:
        layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
        layer.load_state_dict(
            {name.rpartition(".")[2]: tensors[name] for name in tensors if name.startswith(f"{module}.")}
        )
        model.set_submodule(module, layer)
    layers = counted(name for module in model.modules() if (name := type(module).__name__) == "HQQLinear")
    return Answer(causal.greedy(model, task.prompt, task.n_new), layers, logits=causal.logits(model, task.windows))


if __name__ == "__main__":
    serve(compute, ["hqq", "transformers"])
