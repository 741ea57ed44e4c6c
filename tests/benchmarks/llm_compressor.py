"""GPTQ and AWQ of llm-compressor on a CPU, for the study's method `stored:folder=OUT`.

python tests/benchmarks/llm_compressor.py MODEL TEXT OUT gptq|awq NBITS GROUP_SIZE [--tokens 2048]

Runs in an environment of its own (pip install llmcompressor), which wants older versions of what Halfquad wants. Calibrates on
the text's last tokens in windows of 512, asymmetric integer grid, float32; writes all weights as it dequantizes them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 512

if not torch.cuda.is_available():  # AWQ pins its activations whether or not there is a GPU to copy them to
    torch.Tensor.pin_memory = lambda tensor, *_: tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("method", choices=["gptq", "awq"])
    parser.add_argument("nbits", type=int)
    parser.add_argument("group_size", type=int)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    ids = tokenizer(arguments.text.read_text(), add_special_tokens=False).input_ids[-arguments.tokens :]
    windows = torch.tensor(ids).view(-1, WINDOW)
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    start = time.perf_counter()
    oneshot(
        model=model, dataset=data, recipe=recipe(arguments), processor=tokenizer, max_seq_length=WINDOW,
        num_calibration_samples=len(windows),
    )  # fmt: skip
    print(
        f"{arguments.method} {arguments.nbits} bit, group {arguments.group_size}: {time.perf_counter() - start:.0f} s"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(weights(model), arguments.out / "model.safetensors")


def recipe(arguments: argparse.Namespace) -> list[object]:
    grid = {"num_bits": arguments.nbits, "symmetric": False, "strategy": "group", "group_size": arguments.group_size}
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", **grid}}}
    if arguments.method == "gptq":
        return [GPTQModifier(ignore=["lm_head"], config_groups=groups)]
    return [AWQModifier(), QuantizationModifier(ignore=["lm_head"], config_groups=groups)]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters but a tied head, the quantized ones as a reader sees them."""
    state = {}
    for name, module in model.named_modules():
        for kind in ("weight", "bias"):
            parameter = getattr(module, kind, None)
            if not isinstance(parameter, torch.Tensor) or name == "lm_head":
                continue
            if kind == "weight" and hasattr(module, "weight_scale"):
                arguments = module.weight_scale, module.weight_zero_point, module.quantization_scheme.weights
                parameter = fake_quantize(parameter, *arguments, getattr(module, "weight_g_idx", None))
            state[f"{name}.{kind}"] = parameter.detach().contiguous()
    return state


if __name__ == "__main__":
    main()
