"""What a reader in numpy reads equals what was solved, to the last stored bit."""

import pytest

from hqq_core import Checkpoint, Recipe, build_plan
from hqq_core.errors import FormatError
from tests.families import build
from tests.hqq_core.formats.contract import WriterContract
from tests.oracles import (
    gptq_weights,
)


class TestGptq(WriterContract):
    name = "gptq"

    def read(self, folder, dtype):
        return gptq_weights(folder, dtype)

    @pytest.mark.parametrize(
        ("family", "recipe", "field", "message"),
        [
            ("opt", {}, "format", "models of gemma2, .* hold"),
            ("llama", {"include_modules": ["lm_head"]}, "include_modules", "lm_head: cannot be quantized"),
            ("llama", {"skip_modules": ["layers.0.mlp.up_proj"]}, "format", "unquantized linear layers"),
        ],
    )
    def test_what_readers_would_not_find_is_refused(self, tmp_path, family, recipe, field, message):
        build(family, intermediate_size=64).save_pretrained(tmp_path / "m")
        with pytest.raises(FormatError, match=message) as caught:
            build_plan(Checkpoint.open(tmp_path / "m"), Recipe(format="gptq", group_size=32, **recipe))
        assert caught.value.field == field
