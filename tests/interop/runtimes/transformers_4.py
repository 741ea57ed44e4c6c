"""transformers 4.57 with the hqq library, format `hqq`; its HQQLinear computes in float32 whatever is asked for."""

import causal
import torch
from protocol import Answer, Task, counted, serve
from transformers import AutoModelForCausalLM


def compute(task: Task) -> Answer:
    """On HQQLinear, which dequantizes layer by layer."""
    model = AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32, device_map="cpu").eval()
    layers = counted(name for module in model.modules() if (name := type(module).__name__) == "HQQLinear")
    return Answer(causal.greedy(model, task.prompt, task.n_new), layers, logits=causal.logits(model, task.windows))


if __name__ == "__main__":
    serve(compute, ["transformers", "hqq"])
