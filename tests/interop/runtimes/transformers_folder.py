"""transformers 5, as it loads a folder in formats `compressed-tensors`, `metal` and `bitnet`; computes in float32."""

from typing import Any

import causal
from protocol import Answer, Task, counted, serve
from transformers import AutoModelForCausalLM


def compute(task: Task) -> Answer:
    """Weights as transformers dequantizes them, held in the model's own type, then widened."""
    model, told = AutoModelForCausalLM.from_pretrained(task.folder, device_map="cpu", output_loading_info=True)
    assert not any(told.values()), told
    model = _widened(model).eval()
    layers = counted(type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Linear"))
    return Answer(causal.greedy(model, task.prompt, task.n_new), layers, logits=causal.logits(model, task.windows))


def _widened(model: Any) -> Any:
    """In float32: transformers refuses float() for bitnet, whose codes are bytes and stay so."""
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
    return model


if __name__ == "__main__":
    serve(compute, ["transformers", "compressed-tensors"])
