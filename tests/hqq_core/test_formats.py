"""Each format against its own library: what that reads equals what we solved, to the last stored bit."""

import dataclasses

import pytest
import torch

from hqq_core import Checkpoint, QuantSpec, Recipe, build_plan, quantize, quantize_checkpoint
from hqq_core.energy import profile
from hqq_core.errors import FormatError
from hqq_core.evaluate import load_model
from hqq_core.formats import FORMATS
from hqq_core.formats.compressed_tensors import EXPERT_FAMILIES
from hqq_core.safetensors_file import DTYPES, NAMES
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint, save_llama
from tests.families import build, replaced
from tests.oracles import (
    awq_weights,
    compressed_tensors_weights,
    from_mlx,
    gptq_weights,
    hqq_layers,
    mlx_weights,
    stored_tensors,
)
from tests.solved import dequantized

HQQ = Recipe(format="hqq")


class WriterContract:
    """What every format must keep; a subclass names it and the settings it holds."""

    name: str
    recipes: tuple[Recipe, ...]
    hidden = 64
    arithmetic: torch.dtype | None = None  # the reader's, where it is not the model's type

    def read(self, folder, dtype) -> dict[str, torch.Tensor]:
        """Dequantized weights by module, as the format's own reader has them."""
        raise NotImplementedError

    @pytest.fixture
    def writer(self):
        return FORMATS[self.name]

    def test_layout_tells_what_encode_returns(self, writer):
        for recipe in self.recipes:
            for shape in ((64, 128), (128, 256)):
                spec = writer.tensor_spec(writer.check(recipe), "BF16")
                quantized = quantize(torch.randn(shape).bfloat16(), spec)
                encoded = writer.encode("m", quantized)
                told = {name: (dtype, shape) for name, dtype, shape in writer.layout("m", shape, "BF16", spec)}
                assert {name: (NAMES[value.dtype], tuple(value.shape)) for name, value in encoded.items()} == told

    @pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
    def test_the_reader_sees_what_was_solved(self, tmp_path, dtype):
        torch_dtype = DTYPES[dtype]
        tensors = llama_tensors(1, self.hidden, torch_dtype)
        source = save_checkpoint(tmp_path / "m", tensors, llama_config(1, self.hidden))
        energies = profile(Checkpoint.open(source))
        for i, recipe in enumerate(self.recipes):
            quantize_checkpoint(source, tmp_path / str(i), recipe)
            read = self.read(tmp_path / str(i), torch_dtype)
            solved = dequantized(source, recipe, energies, self.arithmetic)
            assert read.keys() == solved.keys()
            for module, weight in solved.items():
                assert torch.equal(read[module], weight.to(torch_dtype)), (module, recipe)

    def test_codes_scales_and_zeros_follow_the_spec(self, writer):
        for recipe in self.recipes:
            spec = writer.check(recipe)
            assert isinstance(spec, QuantSpec)
            assert (spec.nbits, spec.axis) == (recipe.nbits, recipe.axis)


class TestHqq(WriterContract):
    name = "hqq"
    recipes = (
        *(Recipe(format="hqq", nbits=nbits) for nbits in (1, 1.58, 2, 3, 4, 5, 6, 8)),
        *(Recipe(format="hqq", nbits=nbits, axis=0, group_size=64) for nbits in (2, 3, 4)),
        Recipe(format="hqq", nbits=4, group_size=None),
        Recipe(format="hqq", nbits=3, group_size=8),
        Recipe(format="hqq", nbits=4, zero="int"),
        Recipe(format="hqq", nbits=4, zero="none"),
    )

    def read(self, folder, dtype):
        return {module: layer.dequantize() for module, layer in hqq_layers(folder, dtype).items()}

    def test_rows_that_do_not_fill_a_byte_are_copied_with_the_reason(self, tmp_path):
        tensors = llama_tensors(1) | {"model.layers.0.self_attn.k_proj.weight": torch.ones(3, 64, dtype=torch.bfloat16)}
        plan = build_plan(
            Checkpoint.open(save_checkpoint(tmp_path / "m", tensors, llama_config(1))), Recipe(format="hqq")
        )
        odd = next(tensor for tensor in plan.tensors if "k_proj" in tensor.name)
        assert odd.reason == "3 rows of groups do not fill bytes of 2 codes"


class TestMlx(WriterContract):
    name = "mlx"
    recipes = (
        *(Recipe(format="mlx", nbits=nbits, group_size=g) for nbits in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)),
        Recipe(format="mlx", include_modules=("embed_tokens", "lm_head")),
    )
    hidden = 128

    def read(self, folder, dtype):
        return mlx_weights(folder)

    @pytest.mark.parametrize("nbits", [2, 3, 4, 5, 6, 8])
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
        with pytest.raises(FormatError, match="experts of mixtral, olmoe, qwen2_moe alone; format 'hqq' holds all"):
            build_plan(Checkpoint.open(tmp_path / "m"), Recipe(format="mlx", group_size=32))

    def test_offsets_are_solved_as_they_are_stored(self):
        """At 8 bit, bfloat16 holds an offset to a step or so: rounded afterwards it costs a third of the accuracy."""
        writer = FORMATS[self.name]
        spec = writer.tensor_spec(writer.check(Recipe(format="mlx", nbits=8)), "BF16")
        W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        solved = quantize(W, spec)
        real = quantize(W, dataclasses.replace(spec, zero="float"))
        rounded = real.W_q * real.scale.float() + (-real.zero.float() * real.scale.float()).bfloat16().float()
        assert solved.squared_error < 0.75 * (rounded.view(W.shape) - W.float()).square().sum()


class TestCompressedTensors(WriterContract):
    name = "compressed-tensors"
    recipes = (
        *(Recipe(nbits=nbits, group_size=g, zero="int") for nbits in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)),
        *(Recipe(nbits=nbits, group_size=g, zero="none") for nbits in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)),
        Recipe(include_modules=("lm_head",)),
    )
    hidden = 128

    def read(self, folder, dtype):
        return compressed_tensors_weights(folder)

    @pytest.mark.parametrize("zero", ["int", "none"])
    @pytest.mark.parametrize("nbits", [2, 3, 4, 5, 6, 8])
    def test_transformers_loads_it(self, tmp_path, nbits, zero):
        from transformers import AutoModelForCausalLM

        source = save_llama(tmp_path / "m")
        recipe = Recipe(nbits=nbits, zero=zero, skip_modules=["model.layers.0.mlp.up_proj"])
        quantize_checkpoint(source, tmp_path / "out", recipe)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        read = compressed_tensors_weights(tmp_path / "out")
        state = model.state_dict()
        assert all(torch.equal(state[f"{module}.weight"], weight) for module, weight in read.items())
        original = llama_tensors()["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], original)

    @pytest.mark.parametrize("family", EXPERT_FAMILIES)
    def test_transformers_loads_symmetric_experts(self, tmp_path, family):
        from transformers import AutoModelForCausalLM

        latent = {"q_lora_rank": 32, "v_head_dim": 16} if family == "deepseek_v3" else {}
        build(family, intermediate_size=64, moe_intermediate_size=64, **latent).save_pretrained(tmp_path / "m")
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", Recipe(group_size=32, zero="none", energy="none"))
        read = compressed_tensors_weights(tmp_path / "out")
        assert any(".experts." in module for module in read)
        expected = replaced(tmp_path / "m", tmp_path / "out", tmp_path / "dequantized", read).state_dict()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())

    @pytest.mark.parametrize(
        ("recipe", "field", "message"),
        [
            ({}, "zero", "experts with 'none'"),
            ({"zero": "none", "skip_modules": ["experts.1.up_proj"]}, "format", "all experts or no model"),
            ({"zero": "none"}, "format", "experts of deepseek_v3.* alone; format 'hqq' holds all"),
        ],
        ids=["zero points", "some left", "family"],
    )
    def test_experts_that_transformers_would_not_find_are_refused(self, tmp_path, recipe, field, message):
        experts = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": torch.zeros(64, 64) for i in range(2)}
        source = save_checkpoint(tmp_path / "m", llama_tensors(1) | experts, llama_config(1))
        with pytest.raises(FormatError, match=message) as caught:
            build_plan(Checkpoint.open(source), Recipe(**recipe))
        assert caught.value.field == field
        assert any(
            "experts" in tensor.name and tensor.spec for tensor in build_plan(Checkpoint.open(source), HQQ).tensors
        )

    @pytest.mark.parametrize("zero", ["int", "none"])
    def test_fewer_rows_than_a_word_holds(self, tmp_path, zero):
        """Zero points are packed along the rows, which are padded."""
        tensors = llama_tensors(1) | {"model.layers.0.self_attn.k_proj.weight": torch.randn(7, 64).bfloat16()}
        source = save_checkpoint(tmp_path / "m", tensors, llama_config(1))
        quantize_checkpoint(source, tmp_path / "out", Recipe(nbits=3, zero=zero, energy="none"))
        plan = build_plan(Checkpoint.open(source), Recipe(nbits=3, zero=zero))
        spec = next(tensor.spec for tensor in plan.tensors if tensor.spec)
        solved = quantize(tensors["model.layers.0.self_attn.k_proj.weight"], spec).dequantize()
        assert torch.equal(compressed_tensors_weights(tmp_path / "out")["model.layers.0.self_attn.k_proj"], solved)

    def test_zero_points_are_solved_as_integers(self):
        writer = FORMATS[self.name]
        spec = writer.tensor_spec(writer.check(Recipe()), "BF16")
        W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        solved = quantize(W, spec)
        real = quantize(W, dataclasses.replace(spec, zero="float"))
        rounded = (real.W_q - real.zero.float().round().clamp(0, 15)) * real.scale.float()
        assert solved.squared_error < (rounded.view(W.shape) - W.float()).square().sum()


class TestAwq(WriterContract):
    name = "awq"
    recipes = (Recipe(format="awq"), Recipe(format="awq", group_size=128))
    hidden = 128

    def read(self, folder, dtype):
        return awq_weights(folder, dtype)

    def test_mlx_lm_loads_it(self, tmp_path):
        """It computes in the scales' half precision, and rounds -zero * scale to it."""
        import mlx.core as mx
        from mlx_lm.utils import load_model

        build("llama", num_hidden_layers=3, intermediate_size=64).save_pretrained(tmp_path / "m")
        quantize_checkpoint(
            tmp_path / "m", tmp_path / "out", Recipe(format="awq", skip_modules=["layers.1.mlp.up_proj"])
        )
        ids = torch.arange(1, 25)[None] * 7 % 320
        read = awq_weights(tmp_path / "out", torch.float32)
        with torch.no_grad():
            wanted = replaced(tmp_path / "m", tmp_path / "out", tmp_path / "dequantized", read)(ids).logits
        got = from_mlx(load_model(tmp_path / "out")[0](mx.array(ids.numpy())))
        assert (got - wanted).abs().max() < 5e-3 * wanted.abs().max()

    @pytest.mark.parametrize(
        ("family", "recipe", "field", "message"),
        [
            ("mixtral", {}, "format", "formats 'hqq' and 'compressed-tensors' hold some"),
            ("gpt_neox", {}, "format", "no family that scales activations"),
            ("llama", {"include_modules": ["lm_head"]}, "include_modules", "lm_head: cannot be quantized"),
        ],
    )
    def test_what_readers_would_not_find_is_refused(self, tmp_path, family, recipe, field, message):
        build(family, intermediate_size=64).save_pretrained(tmp_path / "m")
        with pytest.raises(FormatError, match=message) as caught:
            build_plan(Checkpoint.open(tmp_path / "m"), Recipe(format="awq", **recipe))
        assert caught.value.field == field

    def test_outputs_that_do_not_fill_a_word_are_copied(self, tmp_path):
        tensors = llama_tensors(1) | {"model.layers.0.self_attn.k_proj.weight": torch.ones(12, 64).bfloat16()}
        source = save_checkpoint(tmp_path / "m", tensors, llama_config(1))
        plan = build_plan(Checkpoint.open(source), Recipe(format="awq"))
        assert next(t.reason for t in plan.tensors if "k_proj" in t.name) == "12 outputs do not fill words of 8"


class TestGptq(WriterContract):
    name = "gptq"
    recipes = tuple(Recipe(format="gptq", nbits=nbits, group_size=g) for nbits in (4, 8) for g in (32, 64, 128))
    hidden = 128

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


class TestMetal(WriterContract):
    name = "metal"
    recipes = (
        *(Recipe(format="metal", nbits=nbits, group_size=g) for nbits in (2, 4, 8) for g in (32, 64, 128)),
        Recipe(format="metal", include_modules=("lm_head",), skip_modules=("layers.0.mlp.up_proj",)),
    )
    hidden = 128
    arithmetic = torch.float32

    def read(self, folder, dtype):
        """Transformers itself, which dequantizes where there is no Mac; all that it loads must be there."""
        from transformers import AutoModelForCausalLM

        model, told = AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", dtype=dtype, output_loading_info=True
        )
        assert not any(told.values())
        packed = {name.removesuffix(".qbiases") for name in stored_tensors(folder) if name.endswith(".qbiases")}
        return {module: model.get_submodule(module).weight.detach() for module in packed}

    def test_it_can_be_evaluated(self, tmp_path):
        quantize_checkpoint(save_llama(tmp_path / "m"), tmp_path / "out", Recipe(format="metal"))
        ids = torch.arange(1, 25)[None] * 7 % 320
        with torch.no_grad():
            got = load_model(tmp_path / "out")(ids).logits
            weights = self.read(tmp_path / "out", torch.bfloat16)
            assert torch.equal(
                got, replaced(tmp_path / "m", tmp_path / "out", tmp_path / "dequantized", weights)(ids).logits
            )

    def test_a_layer_left_alone_is_left_alone(self, tmp_path):
        """Also where another's name begins with its name."""
        from transformers import AutoModelForCausalLM

        tensors = llama_tensors(11)
        source = save_checkpoint(tmp_path / "m", tensors, llama_config(11))
        recipe = Recipe(format="metal", energy="none", skip_modules=["layers.1.mlp.up_proj"])
        quantize_checkpoint(source, tmp_path / "out", recipe)
        layers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu").model.layers
        alike = [
            torch.equal(layers[i].mlp.up_proj.weight, tensors[f"model.layers.{i}.mlp.up_proj.weight"])
            for i in range(11)
        ]
        assert alike == [i == 1 for i in range(11)]

    def test_a_mixture_of_experts_is_refused(self, tmp_path):
        build("mixtral", intermediate_size=64).save_pretrained(tmp_path / "m")
        with pytest.raises(FormatError, match="formats 'mlx' and 'compressed-tensors' hold some"):
            build_plan(Checkpoint.open(tmp_path / "m"), Recipe(format="metal"))
