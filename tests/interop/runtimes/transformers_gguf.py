"""transformers' GGUF loader, which dequantizes; computes in float32."""

import causal
import torch
from protocol import Answer, Task, serve
from transformers import AutoModelForCausalLM, GgufConfig


def compute(task: Task) -> Answer:
    """On plain linear layers."""
    (file,) = task.folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        task.folder, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    return Answer(
        causal.greedy(model, task.prompt, task.n_new), "dequantized", logits=causal.logits(model, task.windows)
    )


if __name__ == "__main__":
    serve(compute, ["transformers", "gguf"])
