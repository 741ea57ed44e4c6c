"""What mlx and mlx-lm read equals what was solved, to the last stored bit."""

import dataclasses
import json

import pytest
import torch

from hqq_core import Checkpoint, Recipe, build_plan, quantize, quantize_checkpoint, verify_folder
from hqq_core.errors import FormatError, VerificationError
from hqq_core.formats import FORMATS, check_recipe
from hqq_core.formats.mlx.mixes import WIDTHS, Mix, mixable
from hqq_core.outputs import output_folders
from hqq_core.results import ArtifactFile
from hqq_core.safetensors_file import write_json
from hqq_core.verify import read_manifest
from tests.families import build, replaced
from tests.hqq_core.formats.contract import WriterContract
from tests.oracles import (
    from_mlx,
    mlx_weights,
)


class TestMlx(WriterContract):
    name = "mlx"
    more = (
        Recipe(format="mlx", include_modules=("embed_tokens", "lm_head")),
        *(Recipe(format="mlx", type=type, include_modules=("lm_head",)) for type in WIDTHS),
    )

    def read(self, folder, dtype):
        return mlx_weights(folder)

    @pytest.mark.parametrize("nbits", FORMATS["mlx"].capabilities.nbits)
    def test_mlx_lm_computes_with_the_dequantized_weights(self, tmp_path, nbits):
        build("llama", num_hidden_layers=3).save_pretrained(tmp_path / "m", max_shard_size="150KB")
        recipe = Recipe(format="mlx", nbits=nbits, group_size=32, include_modules=["embed_tokens", "lm_head"])
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", recipe)
        self.compare(tmp_path)

    def test_a_tied_output_head_is_the_quantized_embedding(self, tmp_path):
        build("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "m")
        recipe = Recipe(format="mlx", group_size=32, include_modules=["embed_tokens"])
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", recipe)
        assert "model.embed_tokens" in mlx_weights(tmp_path / "out")
        self.compare(tmp_path)

    @pytest.mark.parametrize("family", ["mistral", "qwen3", "phi3", "mixtral", "olmoe", "qwen2_moe"])
    def test_mlx_lm_loads_other_families(self, tmp_path, family):
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} if family == "qwen2_moe" else {}
        build(family, intermediate_size=64, moe_intermediate_size=64, **rope).save_pretrained(tmp_path / "m")
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", Recipe(format="mlx", group_size=32, energy="none"))
        self.compare(tmp_path)

    @pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
    @pytest.mark.parametrize("type", WIDTHS)
    def test_a_mix_is_what_mlx_lm_makes_by_its_name(self, tmp_path, type, family):
        """The same width for every module, as mlx-lm's own converter has it in its config.json; and it loads."""
        build(family, num_hidden_layers=9, intermediate_size=64).save_pretrained(tmp_path / "m")
        include = ["lm_head", "embed_tokens"]
        recipe = Recipe(format="mlx", type=type, group_size=32, include_modules=include, energy="none")
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", recipe)
        assert widths(tmp_path / "out") == mlx_lm_widths(tmp_path / "m", type, 32)
        self.compare(tmp_path)

    def test_a_mix_is_verified_by_the_width_that_config_json_gives_a_module(self, tmp_path):
        source = self.save(tmp_path / "m", layers=9)
        quantize_checkpoint(source, tmp_path / "out", Recipe(format="mlx", type="mixed_3_6"))
        manifest = read_manifest(tmp_path / "out")
        verify_folder(tmp_path / "out", Checkpoint.open(source))
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        del config["quantization"]["model.layers.0.mlp.down_proj"]
        written = ArtifactFile("config.json", *write_json(tmp_path / "out" / "config.json", config | same(config)))
        files = tuple(written if file.name == "config.json" else file for file in manifest.files)
        with pytest.raises(VerificationError, match=r"layers\.0\.mlp\.down_proj\.weight"):
            verify_folder(tmp_path / "out", manifest=dataclasses.replace(manifest, files=files))

    @pytest.mark.parametrize(
        ("field", "recipe"),
        [
            ("type", Recipe(format="mlx", type="mixed_5_6")),
            ("type", Recipe(format="metal", type="mixed_4_6")),
            ("type", Recipe(format="gguf", type="mixed_4_6")),
            ("nbits", Recipe(format="mlx", type="mixed_3_6", nbits=6)),
            ("group_size", Recipe(format="mlx", type="mixed_3_6", group_size=16)),
        ],
    )
    def test_what_contradicts_a_mix_is_refused(self, field, recipe):
        with pytest.raises(FormatError) as caught:
            check_recipe(recipe)
        assert caught.value.field == field

    def test_a_model_without_what_a_mix_tells_apart_is_refused(self, tmp_path):
        build("gpt_neox").save_pretrained(tmp_path / "m")
        with pytest.raises(FormatError, match="type 'mixed_4_6': .* down_proj"):
            build_plan(Checkpoint.open(tmp_path / "m"), Recipe(format="mlx", type="mixed_4_6", group_size=32))

    def test_w2_is_a_down_projection_of_experts_alone(self):
        """Other families have it, too, and mlx-lm's rule does not know it there."""
        mix = Mix(3, 6, 8)
        names = ("experts.1.w2", "feed_forward.w2", "mlp.down_proj")
        assert [mix.nbits(f"model.layers.0.{name}") for name in names] == [6, 3, 6]
        assert not mixable(["model.layers.0.feed_forward.w2.weight"])

    def test_a_folder_is_named_after_its_mix(self):
        recipes = [Recipe(format="mlx"), Recipe(format="mlx", type="mixed_4_6", group_size=32)]
        assert output_folders(recipes) == ("mlx-4bit-g64", "mlx-mixed_4_6-g32")

    def compare(self, folder):
        """Logits of mlx-lm beside those of transformers with the weights that mlx dequantizes."""
        import mlx.core as mx
        from mlx_lm.utils import load_model

        ids = torch.arange(1, 25)[None] * 7 % 320
        with torch.no_grad():
            wanted = replaced(folder / "m", folder / "out", folder / "dequantized", mlx_weights(folder / "out"))(
                ids
            ).logits
        got = from_mlx(load_model(folder / "out")[0](mx.array(ids.numpy())))
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()

    def test_other_mixtures_of_experts_are_refused(self, tmp_path):
        build("qwen3_moe", moe_intermediate_size=64).save_pretrained(tmp_path / "m")
        with pytest.raises(FormatError, match="experts of mixtral, olmoe, qwen2_moe alone; format"):
            build_plan(Checkpoint.open(tmp_path / "m"), Recipe(format="mlx", group_size=32))

    def test_offsets_are_solved_as_they_are_stored(self):
        """At 8 bit, bfloat16 holds an offset to a step or so: rounded afterwards it costs a third of the accuracy."""
        writer = FORMATS[self.name]
        spec = writer.tensor_spec(check_recipe(Recipe(format="mlx", nbits=8)), "m.weight", (64, 128), "BF16")
        W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        solved = quantize(W, spec)
        real = quantize(W, dataclasses.replace(spec, zero="float"))
        rounded = real.W_q * real.scale.float() + (-real.zero.float() * real.scale.float()).bfloat16().float()
        assert solved.squared_error < 0.75 * (rounded.view(W.shape) - W.float()).square().sum()


def widths(folder):
    """Bits of each module that mlx-lm would load as quantized."""
    from mlx_lm.utils import load_model

    return {name: module.bits for name, module in load_model(folder)[0].named_modules() if hasattr(module, "bits")}


def mlx_lm_widths(folder, type, group_size):
    """What mlx-lm's own converter gives the modules of a source."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model

    model = load_model(folder)[0]
    predicate = mixed_quant_predicate_builder(type, model, group_size)
    routers = ("block_sparse_moe.gate",)  # which stay as they are
    return {
        name: predicate(name, module)["bits"]
        for name, module in model.named_modules()
        if hasattr(module, "to_quantized") and not name.endswith(routers)
    }


def same(config):
    """mlx-lm's settings stand in config.json twice."""
    return {"quantization_config": config["quantization"]}
