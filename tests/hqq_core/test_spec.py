import json

import pytest

from hqq_core import QuantSpec, Recipe
from hqq_core.errors import FormatError, SpecError
from hqq_core.formats import FORMATS, check_recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nbits", 9), ("nbits", 0), ("nbits", 4.0), ("nbits", True), ("nbits", "4"), ("nbits", 1.5),
        ("starts", 0), ("starts", 2.0),
        ("group_size", 0), ("group_size", 64.0), ("axis", 2), ("axis", True), ("zero", "real"),
        ("scale_dtype", "float64"), ("iters", -1), ("lp_norm", 0), ("lp_norm", 2.5),
        ("beta", 0), ("kappa", 0.5), ("version", 2),
    ],
)  # fmt: skip
def test_spec_rejects_what_cannot_exist_and_names_the_field(field, value):
    with pytest.raises(SpecError, match=field) as caught:
        QuantSpec(**{field: value})
    assert caught.value.field == field
    assert caught.value.code == "invalid_setting"


@pytest.mark.parametrize("digits", [400, 5000])
def test_numbers_beyond_reason_are_refused_in_a_short_message(digits):
    with pytest.raises(SpecError, match="group_size") as caught:
        QuantSpec(group_size=10**digits)
    assert len(str(caught.value)) < 200


def test_spec_survives_json():
    spec = QuantSpec(nbits=3, group_size=None, zero="int", lp_norm=0.7)
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("cls", [QuantSpec, Recipe])
def test_from_dict_rejects_unknown_fields(cls):
    with pytest.raises(SpecError, match="nbit 4: wanted no such setting") as caught:
        cls.from_dict({"nbit": 4})
    assert caught.value.field == "nbit"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nbits", 9), ("zero", "x"), ("include_modules", "lm_head"), ("skip_modules", [""]), ("max_shard_nbytes", 1),
    ],
)  # fmt: skip
def test_recipe_rejects_what_cannot_exist(field, value):
    with pytest.raises(SpecError, match=field):
        Recipe(**{field: value})


def test_three_levels_are_stored_in_two_bits():
    spec = QuantSpec(nbits=1.58)
    assert (spec.levels, spec.max_code, spec.middle, spec.code_bits) == (3, 2, 1.0, 2)
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_recipe_survives_json():
    recipe = Recipe(format="hqq", nbits=2, include_modules=["lm_head"])
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_an_unknown_format_is_refused_with_those_there_are():
    with pytest.raises(FormatError, match="format 'gguf-typo': wanted one of compressed-tensors, hqq") as caught:
        check_recipe(Recipe(format="gguf-typo"))
    assert caught.value.field == "format"


def test_each_format_has_its_own_zero():
    formats = [name for name, writer in FORMATS.items() if not writer.capabilities.lossless]
    assert {name: check_recipe(Recipe(format=name)).zero for name in formats} == {
        "compressed-tensors": "int",
        "hqq": "float",
        "mlx": "offset",
        "awq": "int",
        "gptq": "none",
        "metal": "offset",
        "humming": "float",
        "gguf": "offset",
    }
