"""llama.cpp on what format `gguf` writes: `python -m tests.interop.llamacpp NODE_FOLDER tiny`, or `smollm2 [FILE_TYPE ...]`.

NODE_FOLDER has node-llama-cpp: `npm i node-llama-cpp@3.22.1` there (binaries for a CPU come with it). llama.cpp's CPU kernels
round activations to 8 bit before they meet blocks, so logits are near those of the dequantized weights, not the same.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from hqq_core import Recipe, quantize_checkpoint
from tests.families import build
from tests.models import cached, english
from tests.oracles import gguf_model
from tests.vocabularies import BYTE_LEVEL, SENTENCEPIECE, TEXT, save_tokenizer

SCRIPT = Path(__file__).with_suffix(".mjs")
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
# family, tokenizer, changes
TINY = [
    *(("llama", pre, {}) for pre in BYTE_LEVEL),
    *(("mistral", kind, {}) for kind in SENTENCEPIECE),
    ("llama", "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", "llama-bpe", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    ("qwen2", "qwen2", {}),
    ("qwen3", "qwen2", {"head_dim": 128}),
    ("gemma", "gemma", {"tie_word_embeddings": True}),
    ("gemma2", "gemma", {"tie_word_embeddings": True, "sliding_window": 16}),
    ("gemma3_text", "gemma", {"tie_word_embeddings": True, "sliding_window": 16, "num_hidden_layers": 7}),
    ("phi3", "llama", {"original_max_position_embeddings": 64}),
    ("phi3", "gpt-4o", {"original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "long_factor": [float(i) for i in range(1, 9)], "short_factor": [1.0] * 8}}),
]  # fmt: skip


def ask(node: Path, model: Path, **wanted: Any) -> dict[str, Any]:
    """What llama.cpp says."""
    question = {"model": str(model), "threads": THREADS, "texts": [], "windows": []} | wanted
    said = subprocess.run(
        ["node", SCRIPT], cwd=node, input=json.dumps(question), capture_output=True, text=True, timeout=1800
    )
    if said.returncode:
        raise SystemExit(said.stderr)
    return json.loads(said.stdout.strip().splitlines()[-1])


def reference(source: Path, recipe: Recipe) -> Any:
    """The source with our dequantized weights, by transformers in float32."""
    from transformers import AutoModelForCausalLM

    from tests.solved import stored_as

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(stored_as(source, recipe), strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def compare(node: Path, source: Path, result: Path, windows: list[list[int]]) -> dict[str, float]:
    """llama.cpp, transformers' reader of the same file and the source, on the same tokens."""
    from transformers import AutoModelForCausalLM

    model, original = gguf_model(result), AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    said = ask(node, result / "model.gguf", windows=windows)
    before = nll = same = theirs = scored = 0.0
    for ids, their_nlls, tops in zip(windows, said["nlls"], said["tops"], strict=True):
        tokens = torch.tensor(ids)
        logits, source_logits = (one(tokens[None]).logits[0] for one in (model, original))
        nll += torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum").item()
        before += torch.nn.functional.cross_entropy(source_logits[:-1], tokens[1:], reduction="sum").item()
        same += (logits.argmax(-1) == torch.tensor(tops)).sum().item()
        theirs, scored = theirs + sum(their_nlls), scored + len(their_nlls)
    return {
        "source": math.exp(before / scored),
        "in_transformers": math.exp(nll / scored),
        "in_llama_cpp": math.exp(theirs / scored),
        "same_top": same / sum(map(len, windows)),
    }


def source_tokens(folder: Path, text: str) -> list[int]:
    """By the tokenizers library, as a text alone: without bos."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@torch.no_grad()
def tiny(node: Path) -> bool:
    """Every family and tokenizer, random weights: the same tokens, and the same logits where a single weight is quantized."""
    good = True
    for family, kind, changes in TINY:
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch, "m")
            model = build(family, **changes)
            model.save_pretrained(source, max_shard_size="150KB")
            save_tokenizer(source, kind, model.config.vocab_size)
            weights = [name.removesuffix(".weight") for name, value in model.state_dict().items() if value.ndim == 2]
            kept = "embed_tokens"
            if model.config.tie_word_embeddings:  # as a head it would round what it meets
                weights.remove("lm_head")
                kept = f"layers.{model.config.num_hidden_layers - 1}.self_attn.q_proj"
            left = [name for name in weights if kept not in name]
            exact = off(node, source, Recipe(format="gguf", type="Q8_0", energy="none", skip_modules=left))
            rounded = off(node, source, Recipe(format="gguf", type="Q4_1", energy="none"))
            same = tokens_agree(node, source, Path(scratch, "m-Q4_1"))
            good &= same and exact < 2e-3 and rounded < 0.05
            print(f"{family:12} {kind:10} logits off by {exact:.6f}, Q4_1 {rounded:.4f}   tokens {same}", flush=True)
    return good


@torch.no_grad()
def off(node: Path, source: Path, recipe: Recipe) -> float:
    """||llama.cpp's logits - the reference's|| over the latter."""
    result = source.with_name(f"{source.name}-{recipe.type}")
    quantize_checkpoint(source, result, recipe)
    ids = [int(i) for i in torch.arange(3, 51) * 7 % 320]
    raw = result / "logits"
    ask(node, result / "model.gguf", windows=[ids], logits=str(raw))
    got = torch.frombuffer(bytearray(raw.read_bytes()), dtype=torch.float32).view(len(ids), -1)
    wanted = reference(source, recipe)(torch.tensor(ids)[None]).logits[0]
    return ((got - wanted).norm() / wanted.norm()).item()


def tokens_agree(node: Path, source: Path, result: Path) -> bool:
    """Whether llama.cpp cuts texts as the tokenizers library does."""
    texts = [TEXT, english()[:20_000]]
    return ask(node, result / "model.gguf", texts=texts)["tokens"] == [source_tokens(source, text) for text in texts]


def smollm2(node: Path, *file_types: str) -> bool:
    """The real model: perplexity on 8 windows of 256 tokens, greedy text, tokens."""

    source, good = cached("smollm2-135m"), True
    text = english()
    ids = source_tokens(source, text[:20_000])
    windows = [ids[i : i + 256] for i in range(0, 8 * 256, 256)]
    with tempfile.TemporaryDirectory() as scratch:
        for file_type in file_types or ("Q4_1", "Q4_K_M"):
            result, recipe = Path(scratch, file_type), Recipe(format="gguf", type=file_type)
            (manifest,) = quantize_checkpoint(source, result, recipe)
            figures = compare(node, source, result, windows)
            said = ask(node, result / "model.gguf", greedy={"prompt": "The capital of France is", "n": 12})
            same = tokens_agree(node, source, result)
            nbytes = next(file.nbytes for file in manifest.files if file.name == "model.gguf")
            print(
                file_type, nbytes, manifest.metrics["bits_per_weight"], figures, repr(said["text"]), same, said["facts"]
            )
            good &= same and figures["in_llama_cpp"] < 1.02 * figures["in_transformers"]
    return good


if __name__ == "__main__":
    folder, what, *named = sys.argv[1:]
    raise SystemExit(0 if {"tiny": tiny, "smollm2": smollm2}[what](Path(folder), *named) else 1)
