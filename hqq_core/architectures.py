"""What we know of model families: which tensors are linear weights, and which to leave alone."""

from __future__ import annotations

from enum import Enum
from typing import Any


class Role(Enum):
    """What a tensor is to its model; the value says why it is copied where it is."""

    LINEAR = "linear layer"
    EXPERT = "linear layer of an expert"
    EMBEDDING = "embedding: looked up, not multiplied"
    HEAD = "output head: errors here meet the logits directly"
    ROUTER = "router: decides which expert runs"
    NORM = "norm"
    CONV1D = "Conv1D: stored as (in, out)"
    FUSED = "more than two axes: a convolution or fused experts"
    VECTOR = "bias, gain or other vector"
    OTHER = "not the weight of a module"


QUANTIZED = (Role.LINEAR, Role.EXPERT)  # the others are copied unless asked for

_HEADS = {"lm_head", "generator_lm_head", "embed_out", "score", "classifier", "decoder_head", "qa_outputs", "v_head"}
_ROUTERS = {"gate", "router", "switch", "shared_expert_gate", "wg"}
_EMBEDDINGS = {"wte", "wpe", "emb", "shared", "relative_attention_bias"}
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
        The model's config.json; `model_type` and `vocab_size` are read.
    """
    if len(shape) < 2:
        return Role.VECTOR
    if len(shape) > 2:
        return Role.FUSED
    module, _, kind = name.rpartition(".")
    if kind != "weight" or not module:
        return Role.OTHER
    parts = module.split(".")
    if parts[-1] not in _HEADS and any("embed" in part or part in _EMBEDDINGS for part in parts):
        return Role.EMBEDDING
    if not _ROUTERS.isdisjoint(parts):
        return Role.ROUTER
    if not _HEADS.isdisjoint(parts) or _is_vocabulary(parts, shape, config):
        return Role.HEAD
    if "norm" in parts[-1].lower() or parts[-1].startswith("ln_"):
        return Role.NORM
    if str(config.get("model_type")) in _CONV1D_FAMILIES and parts[-1] in _CONV1D:
        return Role.CONV1D
    return Role.EXPERT if "experts" in parts else Role.LINEAR


def _is_vocabulary(parts: list[str], shape: tuple[int, ...], config: dict[str, Any]) -> bool:
    """Whether a weight outside the layers has a row per token of the vocabulary: an output head by another name."""
    sizes = (config.get("vocab_size"), text_config(config).get("vocab_size"))
    return shape[0] in sizes and not any(part.isdigit() for part in parts)


def ties_head(config: dict[str, Any]) -> bool:
    """Whether config.json says that the output head is the input embedding."""
    return bool(config.get("tie_word_embeddings") or text_config(config).get("tie_word_embeddings"))


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the language model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose rotary settings readers older than transformers 5 find too.

    transformers 5 writes `rope_parameters` alone. mlx-lm 0.32 and transformers 4 look for `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`, and take defaults where they are missing, without an error: the model then computes with other
    angles. transformers 5 reads both spellings as one. Settings by kind of layer have no older name and stay as they are.
    """
    new = config.get("rope_parameters")
    if not isinstance(new, dict) or "rope_theta" not in new:
        return config
    older = {key: new[key] for key in ("rope_theta", "partial_rotary_factor") if key in new}
    if new.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in new.items() if key not in older}
    return older | config
