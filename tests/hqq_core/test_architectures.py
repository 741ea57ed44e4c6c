import pytest

from hqq_core.architectures import Role, role, text_config, ties_head


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), Role.LINEAR),
        ("model.layers.0.self_attn.q_proj.bias", (64,), Role.VECTOR),
        ("model.embed_tokens.weight", (320, 64), Role.EMBEDDING),
        ("transformer.wte.weight", (320, 64), Role.EMBEDDING),
        ("embeddings.position_embeddings.weight", (512, 64), Role.EMBEDDING),
        ("shared.weight", (320, 64), Role.EMBEDDING),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), Role.EMBEDDING),
        ("lm_head.weight", (320, 64), Role.HEAD),
        ("embed_out.weight", (320, 64), Role.HEAD),
        ("cls.predictions.decoder.weight", (320, 64), Role.HEAD),
        ("model.layers.1.mlp.gate.weight", (8, 64), Role.ROUTER),
        ("model.layers.1.block_sparse_moe.gate.weight", (8, 64), Role.ROUTER),
        ("model.layers.1.mlp.gate_proj.weight", (64, 64), Role.LINEAR),
        ("model.layers.1.mlp.shared_expert_gate.weight", (1, 64), Role.ROUTER),
        ("model.layers.1.mlp.experts.3.up_proj.weight", (64, 64), Role.EXPERT),
        ("model.layers.1.mlp.experts.gate_up_proj", (8, 64, 64), Role.FUSED),
        ("model.layers.0.input_layernorm.weight", (64,), Role.VECTOR),
        ("layers.0.norm.weight", (2, 64), Role.NORM),
        ("model.layers.0.mamba.A_log", (64, 16), Role.OTHER),
        ("encoder.layer.0.attention.self.query.weight", (64, 64), Role.LINEAR),
        ("h.0.attn.c_attn.weight", (64, 192), Role.LINEAR),
        ("output.weight", (320, 64), Role.HEAD),
        ("transformer.output_layer.weight", (320, 64), Role.HEAD),
        ("vocab_projector.weight", (320, 64), Role.HEAD),
        ("lm_head.decoder.weight", (320, 64), Role.HEAD),
        ("classifier.out_proj.weight", (2, 64), Role.HEAD),
        ("v_head.summary.weight", (1, 64), Role.HEAD),
        ("layers.3.ffn.up.weight", (320, 64), Role.LINEAR),
        ("layers.3.mlp.gate.linear.weight", (8, 64), Role.ROUTER),
        ("layers.3.mlp.router.classifier.weight", (8, 64), Role.ROUTER),
        ("emb.weight", (320, 64), Role.EMBEDDING),
        ("weight", (64, 64), Role.OTHER),
    ],
)
def test_role_is_told_from_name_and_shape(name, shape, expected):
    assert role(name, shape, {"model_type": ["llama"], "vocab_size": 320}) is expected


def test_conv1d_of_gpt2_is_known():
    assert role("h.0.attn.c_attn.weight", (64, 192), {"model_type": "gpt2"}) is Role.CONV1D


def test_a_vocabulary_is_told_from_the_language_models_part_of_the_config():
    config = {
        "model_type": "gemma3",
        "vocab_size": None,
        "text_config": {"vocab_size": 320, "tie_word_embeddings": True},
    }
    assert role("language_model.output.weight", (320, 64), config) is Role.HEAD
    assert text_config(config)["vocab_size"] == 320
    assert ties_head(config)
    assert not ties_head({"text_config": "none"})
