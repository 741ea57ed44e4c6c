"""The chart of a card."""

import io
import subprocess
import sys

import pytest
from PIL import Image

from hqq_core.card._chart import chart_png
from hqq_core.card._groups import Measured, group_of, layer_of


def tensors(layers: int, squared_error: float = 0.01, groups=("q", "k", "down")) -> list[Measured]:
    return [
        Measured(group, ("model.layers", layer), True, 64, 128, 40, squared_error * (1 + layer), 1.0)
        for layer in range(layers)
        for group in groups
    ]


def test_it_is_an_image_of_its_size_that_tells_no_time_and_no_version():
    raw = chart_png(tensors(5))
    with Image.open(io.BytesIO(raw)) as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (1200, 600))
        assert set(image.info) <= {"dpi"}
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10, "something is drawn"
    assert len(raw) < 200_000


def test_other_errors_give_another_image():
    assert chart_png(tensors(5)) != chart_png(tensors(5, 0.02))


def test_a_user_of_other_settings_gets_the_same_bytes(tmp_path):
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 20\nsavefig.dpi: 30\nbackend: pdf\n")
    code = (
        "import sys; from tests.hqq_core.card.test_chart import tensors; from hqq_core.card._chart import chart_png\n"
        "sys.stdout.buffer.write(chart_png(tensors(5)))"
    )
    environment = {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout == chart_png(tensors(5))


def test_where_nothing_was_lost_there_is_none():
    assert chart_png(tensors(2, 0.0)) is None
    assert chart_png([]) is None


def test_a_layer_without_signal_is_a_gap():
    broken = [Measured("q", ("l", layer), True, 1, 2, 1, 1.0, 1.0 if layer else 0.0) for layer in range(3)]
    assert chart_png(broken)


def test_many_layers_and_stacks_fit():
    other = [Measured("q", ("decoder.layers", layer), True, 64, 128, 40, 0.1, 1.0) for layer in range(3)]
    assert chart_png(tensors(300, 0.0001) + other)


@pytest.mark.parametrize(
    ("name", "group", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "q", ("model.layers", 3)),
        ("gpt_neox.layers.1.attention.query_key_value.weight", "q, k, v", ("gpt_neox.layers", 1)),
        ("gpt_neox.layers.1.attention.dense.weight", "o", ("gpt_neox.layers", 1)),
        ("encoder.layer.0.attention.output.dense.weight", "o", ("encoder.layer", 0)),
        ("encoder.layer.0.output.dense.weight", "down", ("encoder.layer", 0)),
        ("encoder.layer.0.intermediate.dense.weight", "up", ("encoder.layer", 0)),
        ("model.layers.2.mlp.experts.7.gate_proj.weight", "experts", ("model.layers", 2)),
        ("model.layers.2.mlp.gate.weight", "routers", ("model.layers", 2)),
        ("model.embed_tokens.weight", "embeddings", None),
        ("lm_head.weight", "output head", None),
        ("x.strange.weight", "other linear layers", None),
        (f"model.{'9' * 5000}.q_proj.weight", "q", None),
        ("model.²³.q_proj.weight", "q", None),
    ],
)
def test_tensors_are_told_by_their_names(name, group, layer):
    assert group_of(name, (8, 8), {"vocab_size": 100}) == group
    assert layer_of(name) == layer


def test_norms_are_told_from_biases():
    assert group_of("model.layers.0.input_layernorm.weight", (8,), {}) == "norms"
    assert group_of("model.layers.0.self_attn.q_proj.bias", (8,), {}) == "biases and others"
