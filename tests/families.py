"""Tiny random models of many families, built and saved by transformers: layout and arithmetic, never quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import save_checkpoint
from tests.oracles import stored_tensors

_SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
_LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
_ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_WHISPER = {
    "vocab_size": 512, "d_model": 64, "num_mel_bins": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_source_positions": 8,
    "max_target_positions": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "mixtral": {"num_local_experts": 4},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bert": {},
    "whisper": _WHISPER,
    "deepseek_v3": _LATENT,
}

# Settings of other mixtures of experts, which are not profiled here.
MIXTURES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 64},
    "glm4_moe": _ROUTED,
    "dots1": _ROUTED,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
}

OTHERS: dict[str, dict[str, Any]] = {"gemma": {}}  # not profiled here

TRAINED_TERNARY: dict[str, dict[str, Any]] = {"bitnet": {}}


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A seeded random model of a family, in float32: with head, but for encoders and speech."""
    import transformers

    settings = FAMILIES | MIXTURES | OTHERS | TRAINED_TERNARY
    own = settings[family] if family in ("whisper", "gpt2") else _SMALL | settings[family]
    if family == "gpt2":
        own = own | {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(family, **own | changes)
    kind = {"bert": transformers.AutoModel, "whisper": transformers.WhisperForConditionalGeneration}.get(
        family, transformers.AutoModelForCausalLM
    )
    torch.manual_seed(seed)
    model = kind._from_config(config) if family == "whisper" else kind.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or ".ln_" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(family: str, folder: Path, **changes: Any) -> Path:
    """A random model's folder, in several shards."""
    build(family, **changes).save_pretrained(folder, max_shard_size="150KB")
    return folder


def replaced(source: Path, result: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Any:
    """The model of a result, in float32: its dequantized weights by module, and what it copied or folded; saved to `folder`."""
    import transformers

    before, after = stored_tensors(source), stored_tensors(result)
    tensors = {name: after.get(name, tensor) for name, tensor in before.items()}
    tensors |= {f"{module}.weight": weight.contiguous() for module, weight in weights.items()}
    save_checkpoint(folder, tensors, json.loads((source / "config.json").read_text()))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()


def save_fused(model: Any, folder: Path) -> Path:
    """A mixture of experts as transformers 5 holds it in memory: one tensor for all experts of a layer."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "dtype"}
    return save_checkpoint(folder, {name: value.clone() for name, value in model.state_dict().items()}, config)


def save_seeing(folder: Path) -> Path:
    """A tiny Gemma 3 with its vision tower."""
    import transformers

    text = _SMALL | FAMILIES["gemma3_text"] | {"tie_word_embeddings": True}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4, image_token_index=511,
        boi_token_index=510, eoi_token_index=509,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder
