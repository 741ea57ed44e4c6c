"""What was trained ternary is kept to the last bit: transformers' weights are the source's own."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hqq_core import Checkpoint, Recipe, build_plan, quantize_checkpoint
from hqq_core.errors import FormatError, TensorError
from hqq_core.formats import check_recipe
from hqq_core.formats.bitnet import BitnetWriter
from tests.checkpoints import folder_bytes, llama_config, llama_tensors, save_checkpoint, save_llama
from tests.families import build
from tests.hqq_core.formats.contract import WriterContract
from tests.oracles import stored_tensors

TERNARY = Recipe(format="bitnet", nbits=1.58, group_size=None)


def ternary(W: torch.Tensor) -> torch.Tensor:
    """What absmean training leaves: -s, 0 or s."""
    s = W.float().abs().mean()
    return ((W.float() / s).round().clamp(-1, 1) * s).to(W.dtype)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.fixture(autouse=True)
def without_a_compiler():
    """transformers compiles these layers, which is nothing to a tiny model, and wants what not every machine has."""
    with torch.compiler.set_stance("force_eager"):
        yield


def loaded(folder, dtype="auto"):
    """transformers' model; all that it looks for must be there, and nothing else."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(told.values())
    return model


class Int8Linear(torch.nn.Module):
    """A linear layer on activations rounded to 8 bit for each token, as the format's training has it."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.codes, self.scale = weight / scale, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        return (x / step).round().clamp(-128, 127) * step @ self.codes.T * self.scale


class TestBitnet(WriterContract):
    name = "bitnet"
    recipe = TERNARY

    def tensors(self, layers, hidden, dtype=torch.bfloat16):
        tensors = llama_tensors(layers, hidden, dtype)
        return {name: ternary(tensor) if is_linear(name) else tensor for name, tensor in tensors.items()}

    def read(self, folder, dtype):
        model = loaded(folder, dtype)
        packed = [name.removesuffix(".weight_scale") for name in stored_tensors(folder) if "weight_scale" in name]
        layers = {module: model.get_submodule(module) for module in packed}
        assert all(type(layer).__name__ == "AutoBitLinear" for layer in layers.values())
        return {module: layer.weight * layer.weight_scale for module, layer in layers.items()}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_nothing_is_lost(self, tmp_path, dtype):
        source = self.save(tmp_path / "m", dtype=dtype)
        (manifest,) = quantize_checkpoint(source, tmp_path / "out", TERNARY)
        assert manifest.metrics["relative_error"] == 0
        read = self.read(tmp_path / "out", dtype)
        original = self.tensors(2, 128, dtype)
        assert read.keys() == {name.removesuffix(".weight") for name in original if is_linear(name)}
        assert all(torch.equal(weight, original[f"{module}.weight"]) for module, weight in read.items())
        others = {name: tensor for name, tensor in original.items() if not is_linear(name)}
        stored = stored_tensors(tmp_path / "out")
        assert all(torch.equal(stored[name], tensor) for name, tensor in others.items())

    @pytest.mark.parametrize("family", ["llama", "bitnet"])
    def test_logits_are_those_of_the_source_on_rounded_activations(self, tmp_path, family):
        model = build(family, head_dim=16)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_linear(name):
                    parameter.copy_(ternary(parameter))
        model.save_pretrained(tmp_path / "m")
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", TERNARY)
        ids = torch.arange(1, 25)[None] * 7 % 320
        for name, module in list(model.named_modules()):
            if name.endswith("_proj"):
                model.set_submodule(name, Int8Linear(module.weight.detach(), module.weight.abs().max().detach()))
        with torch.no_grad():
            wanted, got = model(ids).logits, loaded(tmp_path / "out")(ids).logits
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()

    @pytest.mark.parametrize(("tied", "include"), [(False, ("lm_head",)), (True, ())])
    def test_the_output_head_is_found_where_it_is(self, tmp_path, tied, include):
        model = build("llama", tie_word_embeddings=tied)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_linear(name) or name == "lm_head.weight":
                    parameter.copy_(ternary(parameter))
        model.save_pretrained(tmp_path / "m")
        recipe = Recipe(format="bitnet", nbits=1.58, group_size=None, include_modules=include)
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", recipe)
        head = loaded(tmp_path / "out").lm_head
        weight = head.weight * head.weight_scale if include else head.weight
        assert torch.equal(weight, model.lm_head.weight)

    def test_a_weight_of_zeros_is_ternary(self, tmp_path):
        tensors = self.tensors(1, 64) | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64).bfloat16()}
        quantize_checkpoint(save_checkpoint(tmp_path / "m", tensors, llama_config(1)), tmp_path / "out", TERNARY)
        assert not self.read(tmp_path / "out", torch.bfloat16)["model.layers.0.self_attn.q_proj"].any()

    def test_energy_and_folds_are_nobodys_business(self, tmp_path):
        source = self.save(tmp_path / "m")
        plan = build_plan(Checkpoint.open(source), TERNARY)
        assert (plan.recipe.energy, plan.recipe.fold, plan.recipe.weighted) == ("none", False, False)
        again = Recipe(format="bitnet", nbits=1.58, group_size=None, energy="none", fold=False, preset="fast")
        weights = []
        for i, recipe in enumerate((TERNARY, again)):
            quantize_checkpoint(source, tmp_path / str(i), recipe)
            weights.append(folder_bytes(tmp_path / str(i))["model.safetensors"])
        assert weights[0] == weights[1]

    def test_weights_that_are_not_ternary_are_refused_by_name(self, tmp_path):
        with pytest.raises(TensorError) as caught:
            quantize_checkpoint(save_llama(tmp_path / "m"), tmp_path / "out", TERNARY)
        magnitudes = llama_tensors()[caught.value.tensor].abs().unique().count_nonzero()
        assert str(caught.value) == (
            f"{caught.value.tensor}: {magnitudes} magnitudes beside 0: "
            "format 'bitnet' packs weights trained ternary, with one"
        )
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.5])
    def test_one_wrong_weight_is_enough(self, tmp_path, bad):
        tensors = self.tensors(1, 64)
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = bad
        source = save_checkpoint(tmp_path / "m", tensors, llama_config(1))
        message = "up_proj.weight: (2 magnitudes|has values that are NaN or infinite)"
        with pytest.raises(TensorError, match=message):
            quantize_checkpoint(source, tmp_path / "out", TERNARY)

    def test_a_layer_that_is_not_ternary_can_be_skipped(self, tmp_path):
        tensors = self.tensors(1, 64)
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 0.5
        source = save_checkpoint(tmp_path / "m", tensors, llama_config(1))
        recipe = Recipe(format="bitnet", nbits=1.58, group_size=None, skip_modules=["mlp.up_proj"])
        quantize_checkpoint(source, tmp_path / "out", recipe)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.up_proj"]
        weight = loaded(tmp_path / "out").model.layers[0].mlp.up_proj.weight
        assert torch.equal(weight, tensors["model.layers.0.mlp.up_proj.weight"])

    def test_rows_that_do_not_fill_a_byte_are_copied_with_the_reason(self, tmp_path):
        tensors = self.tensors(1, 64) | {"model.layers.0.self_attn.k_proj.weight": torch.ones(6, 64).bfloat16()}
        source = save_checkpoint(tmp_path / "m", tensors, llama_config(1))
        plan = build_plan(Checkpoint.open(source), TERNARY)
        assert next(t.reason for t in plan.tensors if "k_proj" in t.name) == "6 rows do not fill bytes of 4"

    def test_a_mixture_of_experts_is_refused(self, tmp_path):
        build("mixtral", intermediate_size=64).save_pretrained(tmp_path / "m")
        with pytest.raises(FormatError, match="holds none; format 'hqq' holds it"):
            build_plan(Checkpoint.open(tmp_path / "m"), TERNARY)


def test_nothing_larger_than_the_weight_is_made_of_it():
    """A copy in float64 would be four times a weight of bfloat16."""

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **kwargs or {})
            self.nbytes = max([self.nbytes, *(t.untyped_storage().nbytes() for t in [made] if torch.is_tensor(t))])
            return made

    W = ternary(torch.randn(64, 96).to(torch.bfloat16))
    with Largest() as largest:
        solved = BitnetWriter().solve(W, BitnetWriter().tensor_spec(check_recipe(TERNARY), "w", (64, 96), "BF16"))
    assert largest.nbytes == W.nbytes
    assert solved.squared_norm == pytest.approx(W.double().square().sum().item(), rel=1e-12)
