"""What format `gguf` refuses, before any work, and what it says."""

import json
import tracemalloc

import pytest
import torch

from hqq_core import Checkpoint, Recipe, build_plan, quantize_checkpoint
from hqq_core.checkpoint import MAX_CARRIED_NBYTES
from hqq_core.errors import CheckpointError, FormatError
from hqq_core.formats import check_recipe
from tests.checkpoints import save_checkpoint
from tests.hqq_core.formats.test_gguf import config_of, save_model
from tests.oracles import stored_tensors
from tests.vocabularies import save_tokenizer


class TestRefusals:
    @pytest.mark.parametrize(
        ("family", "changes", "message"),
        [
            ("mixtral", {"num_local_experts": 4}, "model_type 'mixtral'"),
            ("gpt_neox", {}, "model_type 'gpt_neox'"),
            ("gemma2", {}, "tie_word_embeddings False"),
            ("llama", {"num_hidden_layers": 513, "hidden_size": 4, "intermediate_size": 4}, "num_hidden_layers 513"),
            ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
            ("gemma2", {"tie_word_embeddings": True, "query_pre_attn_scalar": 32}, "query_pre_attn_scalar 32"),
            ("qwen3", {"attention_bias": True}, "attention_bias True"),
            ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}, "max_window_layers 1"),
            (
                "llama",
                {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
                "rope_type 'dynamic'",
            ),
        ],
    )
    def test_models_that_llama_cpp_has_no_graph_for(self, tmp_path, family, changes, message):
        source = save_model(tmp_path / "m", family, "llama", **changes)
        with pytest.raises(FormatError, match=message) as caught:
            build_plan(Checkpoint.open(source), Recipe(format="gguf"))
        assert caught.value.field == "format"

    def test_a_tensor_without_a_name(self, tmp_path):
        source = save_model(tmp_path / "m", "llama", shard_size="1GB")
        save_checkpoint(source, stored_tensors(source) | {"model.extra.weight": torch.zeros(4)}, config_of(source))
        with pytest.raises(FormatError, match="model.extra.weight: llama.cpp's llama has no such tensor"):
            build_plan(Checkpoint.open(source), Recipe(format="gguf"))

    @pytest.mark.parametrize("name", ["extra", "model.extra", "model.norm.weight"])
    def test_a_single_number(self, tmp_path, name):
        source = save_model(tmp_path / "m", "llama", shard_size="1GB")
        save_checkpoint(source, stored_tensors(source) | {name: torch.tensor(1.0)}, config_of(source))
        with pytest.raises(
            (CheckpointError, FormatError), match=f"^{name}: (a single number|llama.cpp's llama has no)"
        ):
            build_plan(Checkpoint.open(source), Recipe(format="gguf"))

    def test_no_embedding(self, tmp_path):
        """Whose rows say how long the list of tokens is, whatever vocab_size."""
        source = save_model(tmp_path / "m", "llama", shard_size="1GB", tie_word_embeddings=True)
        tensors = {name: tensor for name, tensor in stored_tensors(source).items() if "embed_tokens" not in name}
        save_checkpoint(source, tensors, config_of(source))
        with pytest.raises(FormatError, match="no token embedding"):
            build_plan(Checkpoint.open(source), Recipe(format="gguf"))

    def test_a_config_that_makes_no_sense_here_is_no_reason_to_refuse_another_format(self, tmp_path):
        source = save_model(tmp_path / "m", "llama")
        config = config_of(source) | {"rope_parameters": {"rope_type": "llama3"}}
        (source / "config.json").write_text(json.dumps(config))
        recipe = Recipe(format="humming", skip_modules=["q_proj"])
        with pytest.raises(FormatError, match="unquantized linear layers.*'mlx'") as caught:
            build_plan(Checkpoint.open(source), recipe)
        assert "gguf" not in str(caught.value)

    def test_no_tokenizer(self, tmp_path):
        source = save_model(tmp_path / "m", "llama")
        (source / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match="no tokenizer.json in the folder"):
            build_plan(Checkpoint.open(source), Recipe(format="gguf"))

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
    def test_a_file_that_is_too_large_is_not_read(self, tmp_path, name):
        source = save_model(tmp_path / "m", "llama")
        with (source / name).open("ab") as file:
            file.truncate(MAX_CARRIED_NBYTES + 1)
        with pytest.raises(CheckpointError, match=f"{name}: {MAX_CARRIED_NBYTES + 1} bytes: wanted at most"):
            build_plan(Checkpoint.open(source), Recipe(format="gguf"))

    def test_of_a_model_card_no_more_is_read_than_its_front_matter_takes(self, tmp_path):
        source = save_model(tmp_path / "m", "llama")
        with (source / "README.md").open("wb") as file:
            file.write(b"---\nlicense: mit\n---\n")
            file.truncate(MAX_CARRIED_NBYTES + 1)
        tracemalloc.start()
        build_plan(Checkpoint.open(source), Recipe(format="gguf"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MAX_CARRIED_NBYTES / 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab_size": 500}, "500"),
            ({"num_attention_heads": 8}, "q_proj.weight: 64 rows: wanted 128"),
            ({"num_attention_heads": 0}, "num_attention_heads 0: wanted a whole number"),
            ({"num_hidden_layers": "2"}, "num_hidden_layers '2'"),
            ({"rope_parameters": ["x"]}, "describes no LLAMA model"),
            ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "cannot be told in keys"),
            ({"rms_norm_eps": "small"}, "cannot be told in keys"),
            ({"max_position_embeddings": 1 << 40}, "cannot be told in keys"),
        ],
    )
    def test_a_config_that_describes_another_model(self, tmp_path, changes, message):
        source = save_model(tmp_path / "m", "llama")
        (source / "config.json").write_text(json.dumps(config_of(source) | changes))
        with pytest.raises(CheckpointError, match=message):
            build_plan(Checkpoint.open(source), Recipe(format="gguf", type="Q4_1"))

    @pytest.mark.parametrize(
        ("recipe", "field"),
        [
            ({"type": "Q7_K"}, "type"),
            ({"type": "Q4_K_M", "nbits": 3}, "nbits"),
            ({"type": "Q4_1", "group_size": 128}, "group_size"),
            ({"type": "Q8_0", "zero": "float"}, "zero"),
            ({"axis": 0}, "axis"),
            ({"nbits": 1}, "nbits"),
        ],
    )
    def test_settings_that_contradict_the_type(self, recipe, field):
        with pytest.raises(FormatError, match="format 'gguf' holds") as caught:
            check_recipe(Recipe(format="gguf", **recipe))
        assert caught.value.field == field

    @pytest.mark.parametrize(
        "recipe", [{"type": "Q4_K", "nbits": 4, "group_size": 32, "zero": "offset"}, {"nbits": 6}, {}]
    )
    def test_what_says_the_same_is_no_contradiction(self, recipe):
        assert check_recipe(Recipe(format="gguf", **recipe)).scale_bits is not None

    def test_a_type_is_gguf_s_alone(self):
        with pytest.raises(FormatError, match="type 'Q4_1'") as caught:
            check_recipe(Recipe(format="mlx", type="Q4_1"))
        assert caught.value.field == "type"


def test_a_source_that_lacks_a_tensor_of_a_layer_is_refused(tmp_path):
    source = save_model(tmp_path / "m", "llama")
    tensors = {
        name: value for name, value in stored_tensors(source).items() if name != "model.layers.1.mlp.up_proj.weight"
    }
    save_tokenizer(save_checkpoint(tmp_path / "less", tensors, config_of(source)), "llama-bpe", 320)
    with pytest.raises(CheckpointError, match=r"layer 1 has no ffn_up\.weight, which others have"):
        quantize_checkpoint(tmp_path / "less", tmp_path / "out", Recipe(format="gguf"))
    assert not (tmp_path / "out").exists()
