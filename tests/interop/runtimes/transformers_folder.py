"""transformers 5, as it loads a folder in formats `compressed-tensors` and `metal`; computes in float32."""

import causal
import torch
from protocol import Answer, Task, counted, serve
from transformers import AutoModelForCausalLM


def compute(task: Task) -> Answer:
    """Weights as transformers dequantizes them, held in the model's own type, then widened."""
    model, told = AutoModelForCausalLM.from_pretrained(task.folder, device_map="cpu", output_loading_info=True)
    assert not any(told.values()), told
    model = model.float().eval()
    layers = counted(type(module).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear))
    return Answer(causal.greedy(model, task.prompt, task.n_new), layers, logits=causal.logits(model, task.windows))


if __name__ == "__main__":
    serve(compute, ["transformers", "compressed-tensors"])
