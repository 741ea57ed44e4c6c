"""What we know of model families: which tensors are linear weights, and which to leave alone."""

from __future__ import annotations

from enum import Enum
from typing import Any


class Role(Enum):
    """What a tensor is to its model; the value says why it is copied where it is."""

    LINEAR = "linear layer"
    EMBEDDING = "embedding: looked up, not multiplied"
    HEAD = "output head: errors here meet the logits directly"
    ROUTER = "router: decides which expert runs"
    NORM = "norm"
    CONV1D = "Conv1D: stored as (in, out)"
    FUSED = "more than two axes: a convolution or fused experts"
    VECTOR = "bias, gain or other vector"
    OTHER = "not the weight of a module"


_HEADS = {"lm_head", "embed_out", "score", "classifier", "decoder_head", "qa_outputs"}
_ROUTERS = {"gate", "router", "shared_expert_gate", "wg"}
_CONV1D_FAMILIES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}


def role(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> Role:
    """Tell a tensor's role from its name and shape.

    Parameters
    ----------
    name : str
        Name in the checkpoint, such as `model.layers.0.mlp.gate.weight`.
    shape : tuple of int
    config : dict
        The model's config.json; only `model_type` is read.
    """
    if len(shape) < 2:
        return Role.VECTOR
    if len(shape) > 2:
        return Role.FUSED
    module, _, kind = name.rpartition(".")
    if kind != "weight":
        return Role.OTHER
    parts = module.split(".")
    if any("embed" in part or part in ("wte", "wpe", "shared", "relative_attention_bias") for part in parts):
        return Role.HEAD if parts[-1] in _HEADS else Role.EMBEDDING
    if parts[-1] in _HEADS or module.endswith("predictions.decoder"):
        return Role.HEAD
    if parts[-1] in _ROUTERS or "router" in parts:
        return Role.ROUTER
    if "norm" in parts[-1].lower() or parts[-1].startswith("ln_"):
        return Role.NORM
    if config.get("model_type") in _CONV1D_FAMILIES and parts[-1] in _CONV1D:
        return Role.CONV1D
    return Role.LINEAR


def ties_head(config: dict[str, Any]) -> bool:
    """Whether config.json says that the output head is the input embedding."""
    text = config.get("text_config")
    return bool(config.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings")))
