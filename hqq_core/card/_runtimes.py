"""The table of snippets: what to copy, for each runtime that a format's capabilities name. docs/formats.md says what was run.

`$path` is the repository or the folder, `$kind` transformers' class, `$version` the runtime's in the capabilities. `$write` are
the lines that let a model write, and `$tokenizer` their import; both are empty for models that do not write. `$folder` is an
expression for a folder with the files, and `$download` the import that it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hqq_core.spec import QuantSpec

PROMPT = "The capital of France is"


@dataclass(frozen=True, slots=True)
class Snippet:
    """One block of code.

    Parameters
    ----------
    formats : tuple of str
    runtime : str
        Its name in the capabilities of those formats.
    language : {"python", "sh"}
    text : str
    title : str
        Of software that builds on the runtime; empty: the runtime itself.
    local : bool or None
        For a folder alone, or for a repository alone; None: for both.
    writes : bool
        For models that write text alone.
    holds : callable
        Whether the runtime takes such settings.
    """

    formats: tuple[str, ...]
    runtime: str
    language: str
    text: str
    title: str = ""
    local: bool | None = None
    writes: bool = True
    holds: Callable[[QuantSpec], bool] = lambda spec: True


def _has_kernels(spec: QuantSpec) -> bool:
    """The servers' own, for compressed-tensors; see docs/formats.md."""
    return spec.nbits == 4 or (spec.nbits == 8 and spec.zero == "none")


WRITE = f"""
tokenizer = AutoTokenizer.from_pretrained("$path")
inputs = tokenizer("{PROMPT}", return_tensors="pt").to(model.device)
ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=20)
print(tokenizer.decode(ids[0]))
"""

_TRANSFORMERS = """
from transformers import $kind$tokenizer

model = $kind.from_pretrained("$path", dtype="auto", device_map="auto")
$write
"""

_METAL = """
import torch
from transformers import $kind$tokenizer

device = "mps" if torch.backends.mps.is_available() else "cpu"  # dequantized, where there is no Mac's GPU
model = $kind.from_pretrained("$path", device_map=device)
$write
"""

_GGUF = """
from transformers import $kind$tokenizer

model = $kind.from_pretrained("$path", gguf_file="model.gguf", dtype="auto")
$write
"""

_TRANSFORMERS_4 = """
import torch
from transformers import $kind$tokenizer

model = $kind.from_pretrained("$path", dtype=torch.float32, device_map="cpu")
$write
"""

_HQQ = """
from pathlib import Path

import torch
from hqq.core.quantize import HQQLinear  # runs eval on two strings of the file: load only what you trust$download
from safetensors.torch import load_file
from transformers import AutoConfig, $kind$tokenizer

folder = Path($folder)
tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
config = AutoConfig.from_pretrained(folder)
del config.quantization_config
model = $kind.from_config(config, dtype=torch.float32)
model.load_state_dict(tensors, strict=False)  # what was not quantized
for module in [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]:
    layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
    layer.load_state_dict({name.rpartition(".")[2]: tensors[name] for name in tensors if name.startswith(f"{module}.")})
    model.set_submodule(module, layer)
$write
"""

_MLX = f"""
from mlx_lm import generate, load

model, tokenizer = load("$path")
print(generate(model, tokenizer, prompt="{PROMPT}", max_tokens=20))
"""

_MLX_SHELL = f"""
pip install mlx-lm
mlx_lm.generate --model "$path" --prompt "{PROMPT}" --max-tokens 20
"""

_VLLM = """
pip install vllm
vllm serve "$path"
"""

_VLLM_HUMMING = """
pip install vllm humming-kernels
vllm serve "$path"
"""

_SGLANG = """
pip install sglang
python -m sglang.launch_server --model-path "$path"
"""

_LLAMA_CPP = f"""
llama-cli -m "$path/model.gguf" -p "{PROMPT}" -n 20
"""

_LLAMA_CPP_HUB = f"""
llama-cli -hf "$path" -hff model.gguf -p "{PROMPT}" -n 20
"""

_OLLAMA = """
echo "FROM $path/model.gguf" > Modelfile
ollama create my-model -f Modelfile
ollama run my-model
"""

_OLLAMA_HUB = """
ollama run "hf.co/$path"
"""

SNIPPETS = (
    Snippet(
        ("compressed-tensors",), "transformers", "sh",
        'pip install "transformers>=$version" compressed-tensors accelerate', writes=False,
    ),
    Snippet(("awq",), "transformers", "sh", 'pip install "transformers>=$version" gptqmodel accelerate', writes=False),
    Snippet(("gptq",), "transformers", "sh", 'pip install "transformers>=$version" optimum gptqmodel accelerate', writes=False),
    Snippet(("bitnet", "metal"), "transformers", "sh", 'pip install "transformers>=$version" accelerate', writes=False),
    Snippet(("gguf",), "transformers", "sh", 'pip install "transformers>=$version" gguf', writes=False),
    Snippet(("hqq",), "transformers", "sh", 'pip install "transformers==$version.*" hqq accelerate', writes=False),
    Snippet(("hqq",), "hqq", "sh", "pip install hqq transformers", writes=False),
    Snippet(("compressed-tensors", "awq", "gptq", "bitnet"), "transformers", "python", _TRANSFORMERS, writes=False),
    Snippet(("metal",), "transformers", "python", _METAL, writes=False),
    Snippet(("gguf",), "transformers", "python", _GGUF, writes=False),
    Snippet(("hqq",), "transformers", "python", _TRANSFORMERS_4, writes=False),
    Snippet(("hqq",), "hqq", "python", _HQQ, writes=False),
    Snippet(("mlx", "awq", "bitnet"), "mlx-lm", "sh", _MLX_SHELL),
    Snippet(("mlx", "awq", "bitnet"), "mlx-lm", "python", _MLX),
    Snippet(("compressed-tensors",), "vLLM", "sh", _VLLM, holds=_has_kernels),
    Snippet(("awq", "gptq"), "vLLM", "sh", _VLLM),
    Snippet(("humming",), "vLLM", "sh", _VLLM_HUMMING),
    Snippet(("compressed-tensors",), "SGLang", "sh", _SGLANG, holds=_has_kernels),
    Snippet(("awq", "gptq", "humming"), "SGLang", "sh", _SGLANG),
    Snippet(("gguf",), "llama.cpp", "sh", _LLAMA_CPP, local=True),
    Snippet(("gguf",), "llama.cpp", "sh", _LLAMA_CPP_HUB, local=False),
    Snippet(("gguf",), "llama.cpp", "sh", _OLLAMA, title="Ollama (builds on llama.cpp; not run here)", local=True),
    Snippet(("gguf",), "llama.cpp", "sh", _OLLAMA_HUB, title="Ollama (builds on llama.cpp; not run here)", local=False),
)  # fmt: skip
