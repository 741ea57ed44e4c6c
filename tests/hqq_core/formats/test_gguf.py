"""Format `gguf`: the file, held against transformers' and the gguf library's readers."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from gguf import GGUFReader

from hqq_core import Checkpoint, Recipe, build_plan, quantize_checkpoint, quantize_shard
from hqq_core.errors import VerificationError
from hqq_core.formats.gguf.file_types import main_type
from hqq_core.formats.gguf.mixes import Mix
from hqq_core.safetensors_file import DTYPES
from hqq_core.verify import verify_folder
from tests.checkpoints import VOCABULARY, folder_bytes, save_checkpoint
from tests.families import build
from tests.hqq_core.formats.contract import WriterContract
from tests.oracles import gguf_keys, gguf_model, gguf_tensors, gguf_types, stored_tensors
from tests.solved import stored_as
from tests.vocabularies import save_tokenizer

# transformers' reader of GGUF files knows not all keys: heads and queries must be of the size that it takes them for.
READ = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3_text": {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256},
    "phi3": {},
}
TOKENIZERS = {"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2", "gemma2": "gemma", "gemma3_text": "gemma"}


def save_model(folder, family, kind=None, shard_size="150KB", **changes):
    model = build(family, **changes)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)
    return save_tokenizer(folder, kind or TOKENIZERS.get(family, "llama"), model.config.vocab_size)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 27)[None] * 7 % 320).logits


class TestGguf(WriterContract):
    """Where the contract speaks of settings and of safetensors files, types and parts of a file stand for them."""

    name = "gguf"

    def save(self, folder, layers=2, hidden=128, n_shards=1, dtype=torch.bfloat16):
        return save_tokenizer(super().save(folder, layers, hidden, n_shards, dtype), "gpt-2", VOCABULARY)

    @pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
    def test_the_reader_sees_what_was_solved(self, tmp_path, dtype):
        source = self.save(tmp_path / "m", 1, 256, dtype=DTYPES[dtype])
        for file_type in ("Q4_1", "Q4_K_M", "Q6_K"):
            recipe = Recipe(format="gguf", type=file_type)
            quantize_checkpoint(source, tmp_path / file_type, recipe)
            state = gguf_model(tmp_path / file_type).state_dict()
            assert all(torch.equal(state[name], value) for name, value in stored_as(source, recipe).items())

    def test_sizes_are_known_before_the_work(self, tmp_path):
        source = self.save(tmp_path / "m", n_shards=2)
        plan = build_plan(Checkpoint.open(source), self.recipe)
        quantize_checkpoint(source, tmp_path / "out", self.recipe)
        stored = GGUFReader(tmp_path / "out" / "model.gguf").tensors
        assert plan.nbytes_out == sum(tensor.n_bytes for tensor in stored)
        header = stored[0].data_offset
        assert plan.finish_nbytes > header + plan.nbytes_out, "parts and file lie on the disk at once"

    def test_no_file_is_larger_than_the_limit(self, tmp_path):
        limit = 60_000
        source = self.save(tmp_path / "m", layers=12, hidden=64, n_shards=2)
        recipe = Recipe(format="gguf", type="Q4_1", energy="none", max_shard_nbytes=limit)
        checkpoint = Checkpoint.open(source)
        plan = build_plan(checkpoint, recipe)
        files = [file for i in (0, 1) for file in quantize_shard(checkpoint, [plan], i, tmp_path)[0].files]
        assert len(files) > 4
        assert max((tmp_path / file.name).stat().st_size for file in files) <= limit


@pytest.mark.parametrize("file_type", ["Q4_1", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("name", READ)
def test_transformers_reads_what_was_solved(tmp_path, name, file_type):
    """Bit for bit, folded norms too; and the same logits from the settings in the file's keys."""
    source = save_model(tmp_path / "m", name.split()[0], **READ[name])
    recipe = Recipe(format="gguf", type=file_type)
    quantize_checkpoint(source, tmp_path / "out", recipe)
    expected = stored_as(source, recipe)
    verify_folder(tmp_path / "out", Checkpoint.open(source))
    loaded = gguf_model(tmp_path / "out")
    state = loaded.state_dict()
    if "gemma" in name:  # the file has w + 1
        expected |= {key: (value + 1) - 1 for key, value in expected.items() if key.endswith("norm.weight")}
    assert {key: state[key] for key in expected}.keys() == expected.keys()
    differing = [key for key, value in expected.items() if not torch.equal(state[key], value)]
    assert not differing
    copy = save_checkpoint(tmp_path / "r", expected, config_of(source))
    reference = type(loaded).from_pretrained(copy, dtype=torch.float32).eval()
    assert torch.allclose(logits(loaded), logits(reference), rtol=1e-4, atol=1e-5)


def config_of(source):
    return json.loads((source / "config.json").read_text())


@pytest.mark.parametrize(
    "file_type", ["Q4_0", "Q5_0", "TQ2_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K"]
)
def test_every_type_is_read_as_it_was_solved(tmp_path, file_type):
    """By transformers and, with other names, by the gguf library: super-blocks, and what takes their place."""
    changes = {"hidden_size": 256, "intermediate_size": 288, "head_dim": 64, "num_hidden_layers": 3}
    source = save_model(tmp_path / "m", "llama", **changes)
    recipe = Recipe(format="gguf", type=file_type, energy="none")
    quantize_checkpoint(source, tmp_path / "out", recipe)
    verify_folder(tmp_path / "out", Checkpoint.open(source))
    expected = stored_as(source, recipe)
    state, read = gguf_model(tmp_path / "out").state_dict(), gguf_tensors(tmp_path / "out")
    assert not [name for name, value in expected.items() if not torch.equal(state[name], value)]
    assert torch.equal(read["blk.1.ffn_down.weight"], expected["model.layers.1.mlp.down_proj.weight"])
    types = gguf_types(tmp_path / "out")
    assert types["blk.0.ffn_up.weight"] == main_type(file_type)
    assert types["blk.0.ffn_down.weight"].endswith(("_0", "_1")), "288 columns fill no super-block"
    assert types["output.weight"] == "Q6_K"


def test_a_first_gemma_is_told_by_names(tmp_path):
    """transformers reads none: names of the gguf library, norms with one added."""
    source = save_model(tmp_path / "m", "gemma", "gemma", tie_word_embeddings=True)
    recipe = Recipe(format="gguf", type="Q4_1", energy="none")
    quantize_checkpoint(source, tmp_path / "out", recipe)
    verify_folder(tmp_path / "out", Checkpoint.open(source))
    expected, read = stored_as(source, recipe), gguf_tensors(tmp_path / "out")
    assert torch.equal(read["token_embd.weight"], expected["model.embed_tokens.weight"])
    assert torch.equal(read["blk.1.attn_q.weight"], expected["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(read["output_norm.weight"], expected["model.norm.weight"] + 1)
    assert len(read) == len(expected)
    assert gguf_keys(tmp_path / "out")["general.architecture"] == "gemma"


def test_shards_of_the_source_do_not_show(tmp_path):
    results = []
    for size in ("50KB", "150KB", "1GB"):
        source = save_model(tmp_path / size, "llama", shard_size=size)
        recipe = Recipe(format="gguf", type="Q4_1", energy="none", max_shard_nbytes=30_000)
        quantize_checkpoint(source, tmp_path / f"out-{size}", recipe)
        results.append((tmp_path / f"out-{size}" / "model.gguf").read_bytes())
        names = {path.name for path in (tmp_path / f"out-{size}").iterdir()}
        assert not [name for name in names if "part" in name or name.endswith(".safetensors")]
    assert len(list((tmp_path / "50KB").glob("*.safetensors"))) > 4
    assert len(set(results)) == 1


def test_skipped_modules_keep_the_source_s_type(tmp_path):
    source = save_model(tmp_path / "m", "llama")
    recipe = Recipe(
        format="gguf", type="Q4_1", energy="none", skip_modules=["layers.0.self_attn.q_proj", "embed_tokens"]
    )
    quantize_checkpoint(source, tmp_path / "out", recipe)
    verify_folder(tmp_path / "out", Checkpoint.open(source))
    types = gguf_types(tmp_path / "out")
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "BF16"
    assert types["blk.1.attn_q.weight"] == "Q4_1"
    assert types["blk.0.attn_norm.weight"] == "F32"
    state, original = gguf_model(tmp_path / "out").state_dict(), stored_tensors(source)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(state[name], original[name].float())


def test_biases_of_a_llama_go_the_way_of_their_rows(tmp_path):
    source = save_model(tmp_path / "m", "llama", attention_bias=True, mlp_bias=True)
    recipe = Recipe(format="gguf", type="Q8_0", energy="none")
    quantize_checkpoint(source, tmp_path / "out", recipe)
    verify_folder(tmp_path / "out", Checkpoint.open(source))
    read, expected = gguf_tensors(tmp_path / "out"), stored_as(source, recipe)
    bias = expected["model.layers.0.self_attn.q_proj.bias"]
    assert torch.equal(read["blk.0.attn_q.bias"], bias.view(4, 2, 8).transpose(1, 2).reshape(-1))
    assert torch.equal(read["blk.0.ffn_down.bias"], expected["model.layers.0.mlp.down_proj.bias"])


@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "blk.0.attn_q.bias", "blk.1.ffn_norm.weight", "output.weight"])
def test_a_byte_that_is_not_what_was_solved_is_found(tmp_path, name):
    source = save_model(tmp_path / "m", "llama", attention_bias=True)
    quantize_checkpoint(source, tmp_path / "out", Recipe(format="gguf", type="Q4_1", energy="none"))
    path = tmp_path / "out" / "model.gguf"
    place = next(tensor.data_offset for tensor in GGUFReader(path).tensors if tensor.name == name)
    raw = bytearray(path.read_bytes())
    raw[place + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(VerificationError, match="digest"):
        verify_folder(tmp_path / "out")


def test_a_head_tied_by_the_config_is_left_out(tmp_path):
    source = save_model(tmp_path / "m", "llama")
    config = config_of(source) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(source, tmp_path / "out", Recipe(format="gguf", type="Q4_1", energy="none"))
    verify_folder(tmp_path / "out", Checkpoint.open(source))
    assert "output.weight" not in gguf_types(tmp_path / "out")
    assert gguf_types(tmp_path / "out")["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("gemma2", "lm_head.weight", (512, 64)),
        ("gemma2", "model.layers.1.self_attn.rotary_emb.inv_freq", (8,)),
        ("qwen2", "model.layers.1.self_attn.rotary_emb.inv_freq", (8,)),
    ],
)
def test_what_has_no_place_is_left_out_also_where_the_family_has_no_name_for_it(tmp_path, family, name, shape):
    source = save_model(tmp_path / "m", family, shard_size="1GB", tie_word_embeddings=True)
    save_checkpoint(source, stored_tensors(source) | {name: torch.ones(shape)}, config_of(source))
    quantize_checkpoint(source, tmp_path / "out", Recipe(format="gguf", type="Q4_1", energy="none"))
    verify_folder(tmp_path / "out", Checkpoint.open(source))


KILLED = """
import resource, signal, sys
from pathlib import Path
from hqq_core import Checkpoint, build_plan, Recipe, quantize_shard, finish_checkpoint

source, output, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
checkpoint = Checkpoint.open(source)
plan = build_plan(checkpoint, Recipe(format="gguf", type="Q4_1", energy="none"))
output.mkdir(exist_ok=True)
results = [quantize_shard(checkpoint, [plan], shard.index, output)[0] for shard in plan.shards]
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills at this byte
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
finish_checkpoint(checkpoint, plan, results, output)
"""


@pytest.mark.parametrize("limit", [1000, 100_000], ids=["in the keys", "late"])
def test_killed_while_the_parts_are_joined(tmp_path, limit):
    """The next attempt gives the bytes of an undisturbed one, and leaves nothing else."""
    source = save_model(tmp_path / "m", "llama", shard_size="50KB")
    quantize_checkpoint(source, tmp_path / "undisturbed", Recipe(format="gguf", type="Q4_1", energy="none"))

    def attempt(limit):
        return subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / "out", str(limit)]).returncode

    assert attempt(limit) == -signal.SIGXFSZ
    assert not (tmp_path / "out" / "model.gguf").exists()
    assert len(list((tmp_path / "out").glob("model.gguf.part-*"))) > 1
    assert attempt(0) == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "undisturbed")


class TestKeys:
    def keys(self, tmp_path, family, kind=None, **changes):
        source = save_model(tmp_path / "m", family, kind, **changes)
        quantize_checkpoint(source, tmp_path / "out", Recipe(format="gguf", type="Q4_1", energy="none"))
        return gguf_keys(tmp_path / "out")

    def test_general(self, tmp_path):
        source = save_model(tmp_path / "m", "llama")
        (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\nlicense: none\n")
        (source / "config.json").write_text(json.dumps(config_of(source) | {"_name_or_path": "someone/Some-Model-1B"}))
        quantize_checkpoint(source, tmp_path / "out", Recipe(format="gguf", type="Q5_1", energy="none"))
        keys = gguf_keys(tmp_path / "out")
        assert keys["general.name"] == "Some-Model-1B"
        assert keys["general.license"] == "apache-2.0"
        assert (keys["general.architecture"], keys["general.file_type"], keys["general.quantization_version"]) == (
            "llama",
            9,
            2,
        )

    def test_rotation_of_llama_3(self, tmp_path):
        """Factors by which transformers' own frequencies are lower than plain ones."""
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }  # fmt: skip
        self.keys(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=256)
        factors = gguf_tensors(tmp_path / "out")["rope_freqs.weight"]
        config = LlamaConfig.from_pretrained(tmp_path / "m")
        wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
        assert torch.allclose(plain / factors, wanted, rtol=1e-5)
        assert len(factors.unique()) > 2

    def test_rotation_of_phi3(self, tmp_path):
        long, short = [float(i) for i in range(1, 9)], [1.0] * 8
        rope = {
            "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": long, "short_factor": short,
            "original_max_position_embeddings": 32,
        }  # fmt: skip
        keys = self.keys(
            tmp_path, "phi3", rope_parameters=rope, max_position_embeddings=64, original_max_position_embeddings=32
        )
        read = gguf_tensors(tmp_path / "out")
        assert read["rope_factors_long.weight"].tolist() == long
        assert read["rope_factors_short.weight"].tolist() == short
        assert keys["phi3.rope.scaling.original_context_length"] == 32
        assert keys["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + 1 / 5) ** 0.5)
        assert keys["phi3.attention.sliding_window"] == 0

    def test_gemma_2(self, tmp_path):
        keys = self.keys(tmp_path, "gemma2", tie_word_embeddings=True, sliding_window=48)
        assert keys["gemma2.attention.sliding_window"] == 48
        assert (keys["gemma2.attn_logit_softcapping"], keys["gemma2.final_logit_softcapping"]) == (50, 30)
        assert keys["gemma2.attention.key_length"] == 16

    def test_gemma_3(self, tmp_path):
        keys = self.keys(tmp_path, "gemma3_text", tie_word_embeddings=True)
        assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)

    @pytest.mark.parametrize("kind", ["linear", "yarn"])
    def test_stretched_rotations(self, tmp_path, kind):
        rope = {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
        keys = self.keys(tmp_path, "qwen2", rope_parameters=rope)
        assert keys["qwen2.rope.scaling.type"] == kind
        assert keys["qwen2.rope.scaling.factor"] == 4
        assert keys["qwen2.rope.freq_base"] == 5000


class TestMix:
    """As llama.cpp's quantizer has it."""

    def test_more_bits_where_most_is_lost(self):
        mix = Mix("Q4_K_M", n_layers=32, grouped=4, tied=False)
        more = [i for i in range(32) if mix.block_type(f"blk.{i}.ffn_down.weight", 14336) == "Q6_K"]
        assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
        assert [i for i in range(32) if mix.block_type(f"blk.{i}.attn_v.weight", 4096) == "Q6_K"] == more
        assert mix.block_type("blk.0.ffn_up.weight", 4096) == "Q4_K"
        assert mix.block_type("output.weight", 4096) == "Q6_K"
        assert mix.block_type("token_embd.weight", 4096) == "Q4_K"

    def test_columns_that_fill_no_super_block(self):
        mix = Mix("Q4_K_M", n_layers=30, grouped=3, tied=True)
        assert mix.block_type("token_embd.weight", 576) == "Q8_0"
        assert mix.block_type("blk.0.attn_q.weight", 576) == "Q5_0"
        assert mix.block_type("blk.0.attn_v.weight", 576) == "Q8_0"
        assert mix.block_type("blk.0.ffn_down.weight", 1536) == "Q6_K"
        assert mix.block_type("blk.0.attn_q.weight", 100) is None


def test_the_library_is_loaded_when_it_is_needed():
    said = subprocess.run(
        [sys.executable, "-c", "import sys, hqq_core, hqq_core.formats; print('gguf' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == "False"


def test_the_report_names_the_file_and_the_type_of_each_tensor(tmp_path):
    source = save_model(tmp_path / "m", "llama")
    quantize_checkpoint(source, tmp_path / "out", Recipe(format="gguf", type="Q4_1"))
    rows = json.loads((tmp_path / "out" / "halfquad_report.json").read_text())["tensors"]
    assert {row["file"] for row in rows} == {"model.gguf"}
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    found = {row["name"]: row["type"] for row in rows}
    assert found["model.layers.0.self_attn.v_proj.weight"] == types["blk.0.attn_v.weight"]
    assert found["model.norm.weight"] == types["output_norm.weight"] == "F32"
    assert found["model.embed_tokens.weight"] == types["token_embd.weight"]
