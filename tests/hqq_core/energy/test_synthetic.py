"""The streamed model is the model: what it measures, what it holds in memory, and when it refuses."""

import re
import weakref

import pytest
import torch

from hqq_core import Checkpoint
from hqq_core.checkpoint import ShardReader
from hqq_core.energy import _synthetic, profile, synthetic
from hqq_core.energy._disk_weights import DiskWeights
from hqq_core.energy._threads import N_ROWS, row_products
from hqq_core.errors import Cancelled, EnergyError
from tests import families
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint, save_llama
from tests.families import FAMILIES

N_TOKENS = 128


def inputs_of_linears(model, inputs) -> dict[str, torch.Tensor]:
    """What enters each linear layer of a whole model in memory: Tensor [shape=(n, in_features)], float64."""
    found = {}

    def hook(name):
        def keep(module, args, output):
            found[name] = args[0].reshape(-1, args[0].shape[-1]).double()

        return keep

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        model(**inputs)
    return found


def whole_model(folder):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(model):
    return _synthetic._inputs(model, 1 << 20, N_TOKENS, 1.0, torch.Generator().manual_seed(_synthetic.SEED))


def by_module(model, names) -> dict[str, str]:
    """Stored names by the names of the base model's modules."""
    return {re.sub(rf"^{model.base_model_prefix}\.", "", name.removesuffix(".weight")): name for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_energies_equal_those_of_the_whole_model(family, tmp_path):
    folder = families.save(family, tmp_path / family)
    streamed = synthetic(Checkpoint.open(folder), n_tokens=N_TOKENS).vectors
    model = whole_model(folder)
    names = by_module(model, streamed)
    wanted = inputs_of_linears(model, inputs_of(model))
    assert wanted.keys() <= names.keys()
    for module, x in wanted.items():
        torch.testing.assert_close(streamed[names[module]].double(), x.square().mean(0), rtol=2e-6, atol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_each_expert_is_measured_on_the_tokens_that_reach_it(family, tmp_path, monkeypatch):
    monkeypatch.setattr(_synthetic, "MIN_EXPERT_TOKENS", 0)
    folder = families.save(family, tmp_path / family)
    checkpoint = Checkpoint.open(folder)
    streamed = synthetic(checkpoint, n_tokens=N_TOKENS).vectors
    model = whole_model(folder)
    checked = 0
    for name, module in model.named_modules():
        if not hasattr(module, "gate_up_proj") or module.gate_up_proj.ndim != 3:
            continue
        _, _, layer, *_ = f"model.{name}".split(".")

        def check(module, args, layer=layer):
            nonlocal checked
            hidden, chosen = args[0], args[1]
            for expert in range(len(module.gate_up_proj)):
                own = hidden[(chosen == expert).any(-1)]
                gate, up = (own @ module.gate_up_proj[expert].T).chunk(2, -1)
                inner = torch.nn.functional.silu(gate) * up
                names = [n for n in streamed if re.search(rf"layers\.{layer}\..*experts\.{expert}\.", n)]
                for n in names if len(own) else []:
                    x = inner if re.search(r"down_proj|w2", n) else own
                    torch.testing.assert_close(streamed[n], x.square().mean(0), rtol=1e-5, atol=1e-12)
                    checked += 1

        module.register_forward_pre_hook(check)
    with torch.no_grad():
        model(**inputs_of(model))
    assert checked >= 6


def test_experts_that_no_token_reaches_are_shown_others_of_their_layer(tmp_path):
    model = families.build("qwen3_moe", num_experts=16, num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[1:] = 0  # ties are broken the same way for every token
    model.save_pretrained(tmp_path / "m")
    found = synthetic(Checkpoint.open(tmp_path / "m"), n_tokens=N_TOKENS).vectors
    experts = [name for name in found if ".experts." in name]
    assert len(experts) == 2 * 16 * 3
    assert all((found[name] > 0).all() for name in experts)


def test_experts_stored_as_one_tensor_get_a_row_each(tmp_path):
    model = families.build("qwen3_moe")
    model.save_pretrained(tmp_path / "alone")
    alone = synthetic(Checkpoint.open(tmp_path / "alone"), n_tokens=N_TOKENS).vectors
    fused = synthetic(Checkpoint.open(families.save_fused(model, tmp_path / "fused")), n_tokens=N_TOKENS).vectors
    for layer in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
        for whole, part in (("gate_up_proj", "up_proj"), ("down_proj", "down_proj")):
            rows = torch.stack([alone[f"{layer}.{expert}.{part}.weight"] for expert in range(4)])
            assert torch.equal(fused[f"{layer}.{whole}"], rows)


def test_the_same_tokens_give_the_same_energies(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))

    def same(**settings):
        one, two = (synthetic(checkpoint, **({"n_tokens": 64} | s)).vectors for s in ({}, settings))
        return all(torch.equal(one[name], two[name]) for name in one)

    assert same()
    assert not same(seed=1)
    assert not same(exponent=0.5)
    assert not same(n_tokens=256)


# --- any number of threads -----------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_products_are_cut_alike_and_multiplied_by_one_thread_each(two_threads):
    x = torch.arange(3.0 * (N_ROWS + 7)).view(3, N_ROWS + 7, 1).expand(-1, -1, 5)
    seen: dict[int, list[tuple[float, int]]] = {}
    for n_threads in (1, 2, 5):
        pieces = seen.setdefault(n_threads, [])

        def multiply(rows, pieces=pieces, alone=n_threads > 1):
            pieces.append((float(rows[0, 0]), len(rows)))
            assert torch.get_num_threads() == 1 or not alone
            return rows[:, :2] * 2

        with row_products(n_threads) as product:
            assert torch.equal(product(multiply, x), x[..., :2] * 2)
    assert sorted(seen[1]) == sorted(seen[2]) == sorted(seen[5])
    assert {size for _, size in seen[1][:-1]} == {N_ROWS}


@pytest.mark.parametrize("mode", ["synthetic", "analytic"])
def test_any_number_of_threads_gives_the_same_bytes(mode, tmp_path, two_threads, monkeypatch):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m", hidden=512))
    read, during = ShardReader.read, set()

    def watched(self, tensor):
        during.add(torch.get_num_threads())
        return read(self, tensor)

    monkeypatch.setattr(ShardReader, "read", watched)
    two = profile(checkpoint, mode).vectors
    assert (during, torch.get_num_threads()) == ({1}, 2)
    torch.set_num_threads(1)
    one = profile(checkpoint, mode).vectors
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- memory, and stopping ------------------------------------------------------------------------------------------------


def test_memory_holds_one_weight_at_a_time(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "m", layers=24, hidden=128)
    alive, most, in_all = weakref.WeakSet(), 0, 0

    def watch(owner, method):
        original = getattr(owner, method)

        def watched(self, *args):
            nonlocal most, in_all
            value = original(self, *args)
            alive.add(value)
            most = max(most, sum({part.data_ptr(): part.nbytes for part in alive}.values()))
            in_all += value.nbytes
            return value

        monkeypatch.setattr(owner, method, watched)

    for owner, method in ((ShardReader, "read"), (ShardReader, "rows"), (DiskWeights, "_load")):
        watch(owner, method)
    synthetic(Checkpoint.open(folder), n_tokens=64)
    largest = 3 * 128 * 128
    assert most <= (2 + 4) * largest  # as stored, and in float32
    assert in_all > 100 * most


def test_of_fused_experts_one_is_read_at_a_time(tmp_path, monkeypatch):
    folder = families.save_fused(families.build("qwen3_moe"), tmp_path / "m")
    original, whole = ShardReader.read, set()

    def watched(self, tensor):
        whole.add(tensor)
        return original(self, tensor)

    monkeypatch.setattr(ShardReader, "read", watched)
    for mode in ("synthetic", "analytic"):
        found = profile(Checkpoint.open(folder), mode)
        assert found.vectors["model.layers.1.mlp.experts.down_proj"].shape == (4, 48)
    assert not any("experts" in name for name in whole)


def test_what_progress_raises_stops_the_work(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    for error in (Cancelled("enough"), RuntimeError("gone"), KeyboardInterrupt()):

        def stop(nbytes, error=error):
            raise error

        for mode in ("auto", "synthetic", "analytic"):
            with pytest.raises(type(error)) as caught:
                profile(checkpoint, mode, progress=stop)
            assert caught.value is error


# --- models that are not as they should be -------------------------------------------------------------------------------


def test_code_and_kernels_named_in_the_config_are_not_fetched(tmp_path):
    fetching = {
        "auto_map": {"AutoModel": "modeling_x.Evil"}, "_attn_implementation": "kernels-community/evil",
        "attn_implementation": "kernels-community/evil", "experts_implementation": "evil/experts",
    }  # fmt: skip
    folder = save_checkpoint(tmp_path / "m", llama_tensors(), llama_config() | fetching)
    (folder / "modeling_x.py").write_text("raise SystemExit")
    plain = synthetic(Checkpoint.open(save_llama(tmp_path / "plain")), n_tokens=64)
    found = synthetic(Checkpoint.open(folder), n_tokens=64)
    assert all(torch.equal(found.vectors[name], vector) for name, vector in plain.vectors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "starling"}, "model_type 'starling': transformers has no such family"),
        ({"num_hidden_layers": 3}, r"layers.2.*: not in the checkpoint"),
        ({"num_attention_heads": "many"}, "'llama': "),
        ({"intermediate_size": 200}, r"\(192, 64\) in the checkpoint: config wants \(200, 64\)"),
        ({"vocab_size": 4096}, "vocab_size 4096: no tensor of the checkpoint has as many rows"),
    ],
)
def test_a_model_that_cannot_run_is_an_energy_error(tmp_path, change, message):
    folder = save_checkpoint(tmp_path / "m", llama_tensors(), llama_config() | change)
    with pytest.raises(EnergyError, match=message):
        synthetic(Checkpoint.open(folder), n_tokens=256)


def test_buffers_that_old_checkpoints_keep_change_nothing(tmp_path):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "model.rotary_emb.inv_freq": torch.zeros(8)}
    folder = save_checkpoint(tmp_path / "old", llama_tensors() | old, llama_config())
    plain = synthetic(Checkpoint.open(save_llama(tmp_path / "plain")), n_tokens=64).vectors
    found = synthetic(Checkpoint.open(folder), n_tokens=64).vectors
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], vector) for name, vector in plain.items())


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_with_more_rows_than_tokens_is_padding(tmp_path, tied):
    model = families.build("gemma2", tie_word_embeddings=tied)
    state = {name: value.clone() for name, value in model.state_dict().items() if not (tied and "lm_head" in name)}
    config = {key: value for key, value in model.config.to_dict().items() if key != "dtype"}
    plain = synthetic(Checkpoint.open(save_checkpoint(tmp_path / "plain", state, config)), n_tokens=64).vectors
    padded = {
        n: torch.cat([v, torch.full((64, 64), 9.0)]) if "embed" in n or "head" in n else v for n, v in state.items()
    }
    found = synthetic(Checkpoint.open(save_checkpoint(tmp_path / "padded", padded, config)), n_tokens=64).vectors
    assert found.keys() == plain.keys()
    assert ("lm_head.weight" in found) is not tied
    assert all(torch.equal(found[name], vector) for name, vector in plain.items())


def test_the_language_model_of_one_that_sees_is_measured(tmp_path):
    checkpoint = Checkpoint.open(families.save_seeing(tmp_path / "m"))
    found = profile(checkpoint)
    language = [n for n in checkpoint.headers()["model.safetensors"] if re.search(r"language_model.*_proj\.weight", n)]
    assert len(language) == 2 * 7
    assert {found.source(name) for name in language} == {"synthetic"}
    assert all(found.source(name) == "none" for name in checkpoint.headers()["model.safetensors"] if "vision" in name)


@pytest.mark.parametrize(("family", "needs"), [("vit", "pixel_values"), ("wav2vec2", "input_values")])
def test_a_model_that_takes_neither_tokens_nor_spectrograms_does_without(family, needs, tmp_path):
    import transformers

    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    convolutions = {"conv_dim": (32,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}
    config = transformers.AutoConfig.for_model(family, **small, **convolutions, image_size=8, patch_size=4)
    model = transformers.AutoModel.from_config(config)
    model.save_pretrained(tmp_path / "m")
    found = profile(Checkpoint.open(tmp_path / "m"))
    assert found.vectors == {}
    assert f"no synthetic energies: input '{needs}'" in found.note
    assert f"model_type '{family}' is not known" in found.note


def test_correlations_are_those_of_the_whole_model(tmp_path):
    folder = families.save("llama", tmp_path / "m", num_hidden_layers=1)
    checkpoint = Checkpoint.open(folder)
    found = synthetic(checkpoint, correlations=tmp_path / "correlations").correlations
    inputs = {}

    def see(fed, x):
        for name in fed[0]:
            inputs[name] = x.double()

    _synthetic.run(checkpoint, see)
    assert found.places.keys() == inputs.keys()
    assert found.places.keys() >= {f"model.layers.0.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert len(set(found.places.values())) == 5, (
        "query, key and value share an input, and so do gate and up; and the head has one"
    )
    for name, x in inputs.items():
        moments = x.T @ x
        size = moments.diagonal().sqrt()
        wanted = 127 * moments / size / size[:, None]
        assert (found.read(name) - wanted).abs().max() < 0.51
        assert torch.equal(found.read(name), found.read(name).T)


def test_what_fails_leaves_no_file_of_correlations(tmp_path):
    folder = families.save("llama", tmp_path / "m")

    def stop(nbytes):
        if (tmp_path / "correlations").exists() and (tmp_path / "correlations").stat().st_size:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        synthetic(Checkpoint.open(folder), correlations=tmp_path / "correlations", progress=stop)
    assert not (tmp_path / "correlations").exists()
