"""llama.cpp on what format `gguf` writes, in every family and kind of tokenizer: `python -m tests.interop.llamacpp_families`.

`make interop` has the real model in every type; here are tiny ones. llama.cpp's CPU kernels round activations to 8 bit before
they meet blocks, so logits are near those of the dequantized weights, not the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from hqq_core import Recipe, quantize_checkpoint
from tests.families import build
from tests.interop.runtime import RUNTIMES
from tests.models import cached, english
from tests.vocabularies import BYTE_LEVEL, SENTENCEPIECE, TEXT, save_tokenizer

RUNTIME = RUNTIMES["llama.cpp"]
IDS = [int(i) for i in torch.arange(3, 51) * 7 % 320]
TASK = {"windows": [IDS], "prompt": IDS[:1], "n_new": 1}
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


def main() -> int:
    """The same tokens everywhere, and the same logits where a single weight is quantized."""
    good = agrees_on_text(cached("smollm2-135m"), "Q4_1")
    print(f"SmolLM2's tokens {good}", flush=True)
    for family, kind, changes in TINY:
        with tempfile.TemporaryDirectory() as scratch:
            good &= agrees(Path(scratch, "m"), family, kind, changes)
    return 0 if good else 1


def agrees(source: Path, family: str, kind: str, changes: dict[str, Any]) -> bool:
    """One family with one tokenizer and random weights; printed."""
    model = build(family, **changes)
    model.save_pretrained(source, max_shard_size="150KB")
    save_tokenizer(source, kind, model.config.vocab_size)
    weights = [name.removesuffix(".weight") for name, value in model.state_dict().items() if value.ndim == 2]
    kept = "embed_tokens"
    if model.config.tie_word_embeddings:  # as a head it would round what it meets
        weights.remove("lm_head")
        kept = f"layers.{model.config.num_hidden_layers - 1}.self_attn.q_proj"
    left = [name for name in weights if kept not in name]
    exact = off(source, Recipe(format="gguf", type="Q8_0", energy="none", skip_modules=left))
    rounded = off(source, Recipe(format="gguf", type="Q4_1", energy="none"))
    same = agrees_on_text(source, "Q4_0")
    print(f"{family:12} {kind:10} logits off by {exact:.6f}, Q4_1 {rounded:.4f}   tokens {same}", flush=True)
    return same and exact < 2e-3 and rounded < 0.05


@torch.no_grad()
def off(source: Path, recipe: Recipe) -> float:
    """||llama.cpp's logits - the reference's|| over the latter."""
    got = torch.from_numpy(RUNTIME.answer(made(source, recipe), TASK).logits[0])
    wanted = reference(source, recipe)(torch.tensor(IDS)[None]).logits[0]
    return ((got - wanted).norm() / wanted.norm()).item()


def agrees_on_text(source: Path, file_type: str) -> bool:
    """Whether llama.cpp cuts texts as the tokenizers library does, which adds no bos here."""
    from tokenizers import Tokenizer

    texts = [TEXT, english()[:20_000]]
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result")
        quantize_checkpoint(source, result, Recipe(format="gguf", type=file_type, energy="none"))
        found = RUNTIME.answer(result, {**TASK, "texts": texts}).tokens
    library = Tokenizer.from_file(str(source / "tokenizer.json"))
    return found == [library.encode(text, add_special_tokens=False).ids for text in texts]


def made(source: Path, recipe: Recipe) -> Path:
    """The result, beside its source."""
    result = source.with_name(f"{source.name}-{recipe.type}")
    quantize_checkpoint(source, result, recipe)
    return result


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


if __name__ == "__main__":
    raise SystemExit(main())
