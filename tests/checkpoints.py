"""Tiny checkpoints for tests: Llama-like tensors, written by the safetensors library."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from hqq_core.checkpoint import MANIFEST
from hqq_core.safetensors_file import read_header

HIDDEN, FEED_FORWARD, VOCABULARY = 64, 192, 320


def llama_tensors(layers: int = 2, hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    """Tensors of a Llama with random weights, by name, in the order of its layers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)

    feed_forward = 3 * hidden
    tensors = {"model.embed_tokens.weight": random(VOCABULARY, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.self_attn.{name}_proj.weight": random(hidden, hidden) for name in "qkvo"}
        tensors |= {f"{layer}.mlp.{name}_proj.weight": random(feed_forward, hidden) for name in ("gate", "up")}
        tensors[f"{layer}.mlp.down_proj.weight"] = random(hidden, feed_forward)
        tensors[f"{layer}.input_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        tensors[f"{layer}.post_attention_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
    return tensors | {
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": random(VOCABULARY, hidden),
    }


def llama_config(layers: int = 2, hidden: int = HIDDEN) -> dict:
    """The config.json that goes with `llama_tensors`."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": VOCABULARY, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    }  # fmt: skip


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict, n_shards: int = 1) -> Path:
    """Write a checkpoint folder of `n_shards` files, with an index where there is more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    names = list(tensors)
    if n_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        part = names[i * len(names) // n_shards : (i + 1) * len(names) // n_shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_llama(folder: Path, layers: int = 2, hidden: int = HIDDEN, n_shards: int = 1, seed: int = 0) -> Path:
    """Write a random Llama; transformers loads it."""
    return save_checkpoint(folder, llama_tensors(layers, hidden, seed=seed), llama_config(layers, hidden), n_shards)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, to compare two of them byte by byte."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def jobless_bytes(folder: Path) -> dict[str, bytes]:
    """As `folder_bytes`, but for the job in manifests: what all jobs on a source, and the library, have alike."""
    return {
        name: re.sub(rb'"job_id": *"[^"]*"', b'"job_id": null', content) if name.endswith(MANIFEST) else content
        for name, content in folder_bytes(folder).items()
    }


def damage(path: Path, tensor: str) -> None:
    """Change the last byte of the first of a file's larger tensors whose name begins so."""
    with path.open("r+b") as file:
        entries = read_header(file.fileno(), path.name).values()
        entry = next(entry for entry in entries if entry.name.startswith(tensor) and entry.nbytes > 64)
        (byte,) = os.pread(file.fileno(), 1, entry.end - 1)
        os.pwrite(file.fileno(), bytes([byte ^ 3]), entry.end - 1)
