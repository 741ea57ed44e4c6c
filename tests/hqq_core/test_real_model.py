"""Real models through other people's loaders: SmolLM2-135M and MiniLM, from their packages."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from hqq_core import Checkpoint, Recipe, quantize_checkpoint
from hqq_core.energy import Energies, profile
from hqq_core.errors import CheckpointError
from hqq_core.evaluate import compare, generate, load_model, tokenize
from tests.models import cached, english
from tests.oracles import compressed_tensors_weights, gguf_keys, gguf_model, gguf_types, hqq_layers, stored_tensors
from tests.solved import dequantized, stored_as

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return cached("smollm2-135m")


@pytest.fixture(scope="module")
def energies(smollm2) -> Energies:
    return profile(Checkpoint.open(smollm2))


def test_compressed_tensors_in_transformers(smollm2, energies, tmp_path):
    recipe = Recipe(format="compressed-tensors", nbits=4, group_size=64)
    (manifest,) = quantize_checkpoint(smollm2, tmp_path / "out", recipe)
    assert manifest.metrics["tensors_quantized"] == 210
    assert manifest.metrics["bits_per_weight"] < 4.32
    assert manifest.metrics["energy_sources"] == {"synthetic": 210}
    model = load_model(tmp_path / "out")
    state, library = model.state_dict(), compressed_tensors_weights(tmp_path / "out")
    for module, weight in dequantized(smollm2, recipe, energies).items():
        assert torch.equal(weight, library[module]), module
        assert torch.equal(weight.float(), state[f"{module}.weight"]), module
    comparison = compare(load_model(smollm2), model, tokenize(smollm2, english(), 512))
    assert comparison.kl < 0.45
    assert comparison.perplexity < 1.5 * comparison.source_perplexity
    assert "Paris" in generate(model, smollm2, PROMPT, n_tokens=8)


def test_hqq_in_the_hqq_library(smollm2, energies, tmp_path):
    recipe = Recipe(format="hqq", nbits=4, group_size=64)
    quantize_checkpoint(smollm2, tmp_path / "out", recipe)
    layers = hqq_layers(tmp_path / "out", torch.bfloat16)
    assert len(layers) == 210
    for module, weight in dequantized(smollm2, recipe, energies).items():
        assert torch.equal(weight, layers[module].dequantize()), module
    model = load_model(smollm2)
    model.load_state_dict(stored_tensors(tmp_path / "out"), strict=False)  # norms, too, are not what they were
    for module, layer in hqq_layers(tmp_path / "out", torch.float32).items():
        model.set_submodule(module, layer)
    comparison = compare(load_model(smollm2), model, tokenize(smollm2, english(), 512))
    assert comparison.kl < 0.45
    assert "Paris" in generate(model, smollm2, PROMPT, n_tokens=8)


def test_gguf_in_transformers(smollm2, energies, tmp_path):
    """576 columns fill no super-block: Q4_K_M is blocks of 32 but for what meets 1536; tests/interop has llama.cpp."""
    from transformers import AutoTokenizer

    recipe = Recipe(format="gguf")
    quantize_checkpoint(smollm2, tmp_path / "out", recipe)
    types = gguf_types(tmp_path / "out")
    assert Counter(types.values()) == {"Q5_0": 166, "F32": 61, "Q4_K": 16, "Q8_0": 15, "Q6_K": 14}
    model = gguf_model(tmp_path / "out")
    state = model.state_dict()
    for name, weight in stored_as(smollm2, recipe, energies).items():
        assert torch.equal(weight, state[name]), name
    comparison = compare(load_model(smollm2), model, tokenize(smollm2, english(), 512))
    assert comparison.kl < 0.1
    assert "Paris" in generate(model, smollm2, PROMPT, n_tokens=8)
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    source = AutoTokenizer.from_pretrained(smollm2)
    words = re.sub(
        r"\d", "", english()[:20_000]
    )  # transformers reads no pre-tokenizer of its own kind from a GGUF file
    assert read(words)["input_ids"] == source(words)["input_ids"]
    assert gguf_keys(tmp_path / "out")["tokenizer.chat_template"] == source.chat_template


def test_input_energies_lower_the_divergence(smollm2, tmp_path):
    """At 4 bit against no energies; docs/solver.md has measured ratios below 0.7."""
    text, kl = tokenize(smollm2, english(), 512), {}
    for energy in ("none", "synthetic"):
        quantize_checkpoint(smollm2, tmp_path / energy, Recipe(energy=energy))
        kl[energy] = compare(load_model(smollm2), load_model(tmp_path / energy), text).kl
    assert kl["synthetic"] < 0.85 * kl["none"]


def test_transformers_5_is_kept_from_loading_hqq_with_random_weights(tmp_path, smollm2):
    quantize_checkpoint(smollm2, tmp_path / "out", Recipe(format="hqq", nbits=2, energy="none"))
    with pytest.raises(CheckpointError, match="format 'hqq' is read by the hqq library"):
        load_model(tmp_path / "out")


def test_sentence_embeddings_keep_their_direction(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    source = cached("minilm-l6")
    (manifest,) = quantize_checkpoint(source, tmp_path / "out", Recipe(nbits=4, group_size=32))
    assert manifest.metrics["tensors_quantized"] == 37
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    sentences = english().split("\n\n")[:16]
    inputs = tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        one, other = (
            AutoModel.from_pretrained(folder)(**inputs).last_hidden_state.mean(1)
            for folder in (source, tmp_path / "out")
        )
    assert torch.cosine_similarity(one, other).mean() > 0.95
