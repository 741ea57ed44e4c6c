"""What holds for each format by its data alone: a new one is found here by itself, and wants its layout in tests/layouts.py."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqq_core import QuantizedTensor, QuantSpec, Recipe
from hqq_core.architectures import Role
from hqq_core.errors import FormatError
from hqq_core.formats import FORMATS, check_recipe
from hqq_core.safetensors_file import DTYPES, NAMES
from hqq_core.solver import resolve_group_size
from hqq_core.spec import NBITS, ZERO_MODES
from hqq_core.tensors import TORCH_DTYPES
from tests.hqq_core.formats.contract import recipes
from tests.layouts import LAYOUTS

every_format = pytest.mark.parametrize("name", FORMATS)
# All settings of the others follow from a type, and names from a model: tests of their own.
every_format_by_settings = pytest.mark.parametrize(
    "name", [name for name, writer in FORMATS.items() if "group_size" not in writer.capabilities.typed_settings]
)
ROWS = st.one_of(st.sampled_from([1, 7, 8, 31, 32, 33, 64, 65]), st.integers(1, 100))


def random_tensor(
    shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype, seed: int, one_scale: bool
) -> QuantizedTensor:
    """Codes, scales and zeros of no weight at all, each as the spec has it."""
    generator = np.random.default_rng(seed)
    group_size = resolve_group_size(shape, spec)
    n_groups = math.prod(shape) // group_size
    stored = TORCH_DTYPES[spec.scale_dtype]
    n_scales = 1 if one_scale else n_groups
    zeros = {
        "float": lambda: torch.from_numpy(generator.uniform(-1, spec.max_code + 1, n_groups)).to(stored),
        "offset": lambda: torch.from_numpy(generator.uniform(-1, spec.max_code + 1, n_groups)).float(),
        "int": lambda: torch.from_numpy(generator.integers(0, spec.levels, n_groups)).to(stored),
        "none": lambda: torch.full((n_groups,), spec.middle, dtype=stored),
    }
    side = (n_groups, 1) if spec.axis == 1 else (1, n_groups)
    grouped = (n_groups, group_size) if spec.axis == 1 else (group_size, n_groups)
    return QuantizedTensor(
        W_q=torch.from_numpy(generator.integers(0, spec.levels, grouped, dtype=np.uint8)),
        scale=torch.from_numpy(generator.uniform(0.01, 1, n_scales)).to(stored).expand(n_groups).view(side),
        zero=zeros[spec.zero]().view(side),
        shape=shape,
        dtype=dtype,
        spec=spec,
        squared_error=0.0,
        squared_norm=0.0,
    )


@every_format_by_settings
@given(data=st.data())
def test_all_that_is_stored_comes_back_bit_for_bit(name, data):
    """Also where rows fill no word: then it comes back, or the tensor is refused with a reason."""
    writer = FORMATS[name]
    recipe = data.draw(st.sampled_from(recipes(name)))
    dtype = data.draw(st.sampled_from(sorted(writer.scale_dtypes)))
    spec = writer.tensor_spec(check_recipe(recipe), "m.weight", (64, 128), dtype)
    rows, groups = data.draw(ROWS), data.draw(st.integers(1, 3))
    along = groups * (recipe.group_size or data.draw(st.sampled_from([8, 40, 65])))
    shape = (rows, along) if spec.axis == 1 else (along, rows)
    if reason := writer.refusal(Role.LINEAR, shape, spec):
        assert re.search(r"\d+ (rows|outputs|inputs)", reason)
        return
    tensor = random_tensor(shape, spec, DTYPES[dtype], data.draw(st.integers(0, 99)), writer.capabilities.lossless)
    encoded = writer.encode("a.b", tensor)
    told = writer.layout("a.b", shape, dtype, spec)
    assert [(key, NAMES[value.dtype], tuple(value.shape)) for key, value in encoded.items()] == told
    assert all(value.is_contiguous() for value in encoded.values())
    decoded = LAYOUTS[name]({key.removeprefix("a.b."): value for key, value in encoded.items()}, spec, shape)
    np.testing.assert_array_equal(decoded.codes.reshape(-1), tensor.W_q.numpy().reshape(-1))
    assert torch.equal(decoded.scale.reshape(-1), tensor.scale.reshape(-1))
    zero = tensor.offset if spec.zero == "offset" else tensor.zero
    assert torch.equal(torch.as_tensor(decoded.zero).reshape(-1).to(zero.dtype), zero.reshape(-1))


@every_format_by_settings
def test_refusals_are_drawn_from_the_data(name):
    held, good = FORMATS[name].capabilities, recipes(name)[0]
    sizes = {*held.group_sizes, *([None] if held.whole_channel else [])}
    bad = {
        "nbits": set(NBITS) - set(held.nbits),
        "group_size": {1, 4, 12, 48 + 1, 1 << 20, None} - sizes if not held.group_multiple else {1, 4, 12},
        "axis": {0, 1} - set(held.axes),
        "zero": set(ZERO_MODES) - set(held.zeros[good.nbits]),
    }
    assert any(bad.values())
    for field, values in bad.items():
        for value in values:
            with pytest.raises(FormatError, match=f"^{field} .*: format '{name}' holds .*; ") as caught:
                check_recipe(dataclasses.replace(good, **{field: value}))
            assert caught.value.field == field


@every_format_by_settings
def test_every_setting_that_the_data_names_passes(name):
    for recipe in recipes(name):
        spec = check_recipe(recipe)
        assert (spec.nbits, spec.group_size, spec.axis) == (recipe.nbits, recipe.group_size, recipe.axis)
        assert spec.zero == (recipe.zero or FORMATS[name].capabilities.zeros[recipe.nbits][0])


@every_format_by_settings
def test_formats_that_a_refusal_names_hold_the_recipe(name):
    for nbits in NBITS:
        recipe = dataclasses.replace(recipes(name)[0], nbits=nbits, zero=None)
        try:
            check_recipe(recipe)
        except FormatError as error:
            others = re.findall(r"'([a-z-]+)'", str(error).rpartition("; ")[2])
            assert all(check_recipe(dataclasses.replace(recipe, format=other)) for other in others)
            holders = {other for other in FORMATS if nbits in FORMATS[other].capabilities.nbits}
            assert set(others) <= holders


@every_format_by_settings
def test_its_config_is_json_and_names_the_method(name):
    writer = FORMATS[name]
    spec = check_recipe(recipes(name)[0])
    config = writer.config(spec, ["a.b"], ["c.d"])
    assert json.loads(json.dumps(config)) == config
    assert config["quantization_config"]


@every_format
def test_runtimes_have_versions(name):
    held = FORMATS[name].capabilities
    assert held.runtimes
    assert all(re.match(r"\d", runtime.version) for runtime in held.runtimes)


def test_a_refusal_computes_who_else_holds_it():
    with pytest.raises(FormatError) as caught:
        check_recipe(Recipe(format="awq", nbits=3))
    assert str(caught.value) == (
        "nbits 3: format 'awq' holds 4; formats 'compressed-tensors', 'hqq', 'mlx', 'gguf' hold it"
    )
    with pytest.raises(FormatError, match="; no other format holds all that is asked"):
        check_recipe(Recipe(format="hqq", zero="offset", group_size=16))


@every_format
def test_the_docs_have_its_row_and_its_section(name):
    docs = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    cells = FORMATS[name].capabilities.words()
    assert f"| format | {' | '.join(cells)} |" in docs
    label = f"`{name}` (default)" if name == Recipe().format else f"`{name}`"
    assert f"| {label} | {' | '.join(cells.values())} |" in docs
    assert f"\n## {name}\n" in docs


def test_the_docs_have_no_other_row():
    docs = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    table = docs.partition("| format |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([^`]+)`", table, re.M) == list(FORMATS)
