"""What feeds what in the model families we know: which norm, and which products, stand before each linear weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hqq_core.architectures import text_config

_ACTIVATIONS = {
    "gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh", "gpt2": "gelu_new",
    "gpt_neox": "gelu", "opt": "relu", "bert": "gelu", "whisper": "gelu",
}  # fmt: skip

ACTIVATION_NAMES = ("hidden_activation", "hidden_act", "activation_function")

Pick = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm whose output is taken for white noise times gain, plus bias.

    Parameters
    ----------
    module : str
        Relative to the layer; with a leading "/", relative to what holds the stack of layers; with a leading "<", to the layer
        before, or for the first layer to `first`.
    offset : float
        Added to the stored gain: Gemma stores g - 1.
    first : str
        As `module`, for the first layer.
    adds : bool
        Its output also joins the residual stream.
    """

    module: str
    offset: float = 0.0
    first: str = ""
    adds: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a weight [shape=(..., out, in)]: all of them, or the part that `pick` cuts from a fused one."""

    module: str
    pick: Pick | None = None


@dataclass(frozen=True, slots=True)
class Feed:
    """What the inputs of `targets` are made of.

    `norm` alone: its output. With `value`: a mixture over positions of value @ norm, heads repeated to fit. With `up`:
    act(up @ norm), or act(gate @ norm) * (up @ norm). A `*` in a name is the number of an expert.
    """

    targets: tuple[str, ...]
    norm: Norm
    value: Rows | None = None
    up: Rows | None = None
    gate: Rows | None = None

    @property
    def modules(self) -> list[str]:
        """The weights that must be read."""
        return [rows.module for rows in (self.value, self.up, self.gate) if rows]


def feeds(config: dict[str, Any]) -> tuple[Feed, ...]:
    """What is known of the family that config.json names; nothing for a stranger."""
    family = str(config.get("model_type", ""))
    if family == "opt" and not config.get("do_layer_norm_before", True):
        return ()
    return _FEEDS.get(family, ())


def activation(config: dict[str, Any]) -> str:
    """Name of the activation between the two halves of a feed-forward block; the family's own where config.json has none."""
    text = text_config(config)
    return next(
        (text[name] for name in ACTIVATION_NAMES if text.get(name)),
        _ACTIVATIONS.get(str(config.get("model_type", "")), "silu"),
    )


def _first_half(W: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    return W.chunk(2, dim=-2)[0]


def _second_half(W: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    return W.chunk(2, dim=-2)[1]


def _last_third(W: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    return W.chunk(3, dim=-2)[2]


def _after_query_and_key(W: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Phi-3: rows are all queries, all keys, all values."""
    text = text_config(config)
    n_query = text["num_attention_heads"]
    n_value = text.get("num_key_value_heads") or n_query
    return W[..., W.shape[-2] * (n_query + n_value) // (n_query + 2 * n_value) :, :]


def _third_of_each_head(W: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """GPT-NeoX: rows are query, key and value of the first head, and so on."""
    heads: torch.Tensor = W.unflatten(0, (config["num_attention_heads"], 3, -1))
    return heads[:, 2].flatten(0, 1)


def _latent_values(W: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Multi-head latent attention: rows are key (without rotary part) and value of the first head, and so on."""
    heads: torch.Tensor = W.unflatten(0, (config["num_attention_heads"], -1))
    return heads[:, config["qk_nope_head_dim"] :].flatten(0, 1)


def _attention(norm: Norm, where: str, inputs: str, output: str, value: str = "v_proj") -> tuple[Feed, ...]:
    return (
        Feed(tuple(f"{where}.{name}" for name in inputs.split()), norm),
        Feed((f"{where}.{output}",), norm, value=Rows(f"{where}.{value}")),
    )


def _gated(
    norm: Norm, where: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Feed, ...]:
    gate, up, down = (f"{where}.{name}" for name in (gate, up, down))
    return Feed((gate, up), norm), Feed((down,), norm, up=Rows(up), gate=Rows(gate))


def _fused_gated(norm: Norm, where: str) -> tuple[Feed, ...]:
    fused = f"{where}.gate_up_proj"
    gate, up = Rows(fused, _first_half), Rows(fused, _second_half)
    return Feed((fused,), norm), Feed((f"{where}.down_proj",), norm, up=up, gate=gate)


def _plain(norm: Norm, up: str, down: str) -> tuple[Feed, ...]:
    return Feed((up,), norm), Feed((down,), norm, up=Rows(up))


_PRE, _POST = Norm("input_layernorm"), Norm("post_attention_layernorm")
_HEAD = (Feed(("lm_head",), Norm("model.norm")),)
_LLAMA_ATTENTION = _attention(_PRE, "self_attn", "q_proj k_proj v_proj", "o_proj")
_EXPERTS = (
    *_gated(_POST, "mlp.experts.*"),
    *_fused_gated(_POST, "mlp.experts"),
    Feed(("mlp.gate",), _POST),
)
_LLAMA = (*_LLAMA_ATTENTION, *_gated(_POST, "mlp"), *_HEAD)
_GEMMA_PRE = Norm("input_layernorm", offset=1.0)
_GEMMA = (
    *_attention(_GEMMA_PRE, "self_attn", "q_proj k_proj v_proj", "o_proj"),
    *_gated(Norm("pre_feedforward_layernorm", offset=1.0), "mlp"),
    Feed(("lm_head",), Norm("model.norm", offset=1.0)),
)
_LATENT = Norm("self_attn.kv_a_layernorm")
_OPT = (
    *_attention(Norm("self_attn_layer_norm"), "self_attn", "q_proj k_proj v_proj", "out_proj"),
    *_plain(Norm("final_layer_norm"), "fc1", "fc2"),
)
_BERT_INPUT = Norm("<output.LayerNorm", first="/embeddings.LayerNorm", adds=True)
_ENCODED = Norm("/encoder.layer_norm")

_FEEDS: dict[str, tuple[Feed, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": (*_LLAMA, *_EXPERTS),
    "mixtral": (
        *_LLAMA_ATTENTION,
        *_gated(_POST, "block_sparse_moe.experts.*", "w1", "w3", "w2"),
        Feed(("block_sparse_moe.gate",), _POST),
        *_EXPERTS,
        *_HEAD,
    ),
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": (
        Feed(("self_attn.qkv_proj",), _PRE),
        Feed(("self_attn.o_proj",), _PRE, value=Rows("self_attn.qkv_proj", _after_query_and_key)),
        *_fused_gated(_POST, "mlp"),
        *_HEAD,
    ),
    "gpt2": (
        Feed(("attn.c_attn",), Norm("ln_1")),
        Feed(("attn.c_proj",), Norm("ln_1"), value=Rows("attn.c_attn", _last_third)),
        *_plain(Norm("ln_2"), "mlp.c_fc", "mlp.c_proj"),
        Feed(("lm_head",), Norm("transformer.ln_f")),
    ),
    "gpt_neox": (
        Feed(("attention.query_key_value",), _PRE),
        Feed(("attention.dense",), _PRE, value=Rows("attention.query_key_value", _third_of_each_head)),
        *_plain(_POST, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        Feed(("embed_out",), Norm("gpt_neox.final_layer_norm")),
    ),
    "opt": (*_OPT, Feed(("lm_head",), Norm("model.decoder.final_layer_norm"))),
    "bert": (
        Feed(tuple(f"attention.self.{name}" for name in ("query", "key", "value")), _BERT_INPUT),
        Feed(("attention.output.dense",), _BERT_INPUT, value=Rows("attention.self.value")),
        *_plain(Norm("attention.output.LayerNorm", adds=True), "intermediate.dense", "output.dense"),
    ),
    "whisper": (
        *_OPT,
        Feed(("encoder_attn.q_proj",), Norm("encoder_attn_layer_norm")),
        *_attention(_ENCODED, "encoder_attn", "k_proj v_proj", "out_proj"),
    ),
    "deepseek_v3": (
        Feed(tuple(f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")), _PRE),
        Feed(("self_attn.q_b_proj",), Norm("self_attn.q_a_layernorm")),
        Feed(("self_attn.kv_b_proj",), _LATENT),
        Feed(("self_attn.o_proj",), _LATENT, value=Rows("self_attn.kv_b_proj", _latent_values)),
        *_gated(_POST, "mlp"),
        *_gated(_POST, "mlp.shared_experts"),
        *_EXPERTS,
        *_HEAD,
    ),
}  # fmt: skip
