"""transformers 5 with gptqmodel, formats `awq` and `gptq`; computes in the model's half precision, on packed weights."""

import causal
from protocol import Answer, Task, counted, serve
from transformers import AutoModelForCausalLM


def compute(task: Task) -> Answer:
    """On gptqmodel's own layers; the answer says which."""
    model = AutoModelForCausalLM.from_pretrained(task.folder, dtype="auto", device_map="cpu").eval()
    layers = counted(type(module).__name__ for module in model.modules() if hasattr(module, "qweight"))
    return Answer(causal.greedy(model, task.prompt, task.n_new), layers, logits=causal.logits(model, task.windows))


if __name__ == "__main__":
    serve(compute, ["gptqmodel", "transformers", "optimum"])
