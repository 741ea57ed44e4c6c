"""What a reader in numpy reads, written from the schema's description, equals what was solved; vLLM itself wants a GPU."""

import json

import pytest

from hqq_core import Checkpoint, Recipe, build_plan, quantize_checkpoint
from hqq_core.errors import FormatError
from hqq_core.formats import FORMATS, check_recipe
from tests.checkpoints import save_llama
from tests.families import build
from tests.hqq_core.formats.contract import WriterContract
from tests.oracles import humming_weights


class TestHumming(WriterContract):
    name = "humming"

    def read(self, folder, dtype):
        return humming_weights(folder, dtype)

    def test_no_key_of_the_config_is_taken_for_one_of_activations(self, tmp_path):
        """humming reads settings of activations from the same object, by these names among others."""
        quantize_checkpoint(save_llama(tmp_path / "m"), tmp_path / "out", Recipe(format="humming", energy="none"))
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        taken = {"a_dtype", "input_dtype", "dtype", "input_scale_group_size", "group_size", "input_scale_dtype"}
        assert not config.keys() & taken

    @pytest.mark.parametrize(
        ("family", "recipe", "field", "message"),
        [
            ("mixtral", {}, "format", "'mixture of experts': format 'humming' holds none; .*'hqq'"),
            ("llama", {"skip_modules": ["layers.0.mlp.up_proj"]}, "format", "unquantized linear layers"),
            ("llama", {"include_modules": ["lm_head"]}, "include_modules", "lm_head: cannot be quantized"),
        ],
    )
    def test_what_readers_would_not_find_is_refused(self, tmp_path, family, recipe, field, message):
        build(family, intermediate_size=64).save_pretrained(tmp_path / "m")
        with pytest.raises(FormatError, match=message) as caught:
            build_plan(Checkpoint.open(tmp_path / "m"), Recipe(format="humming", **recipe))
        assert caught.value.field == field

    def test_it_is_marked_and_never_proposed(self):
        assert FORMATS["humming"].capabilities.experimental
        with pytest.raises(FormatError, match="; format 'hqq' holds it$"):
            check_recipe(Recipe(format="awq", zero="float"))
