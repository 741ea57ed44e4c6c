"""verify_folder: a sound result is sound in every format, and nothing that is wrong with one passes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hqq_core import Checkpoint, Recipe, quantize_checkpoint, verify_folder
from hqq_core.checkpoint import CONFIG, FOLDING, INDEX, MANIFEST, REPORT, SINGLE
from hqq_core.errors import CheckpointError, VerificationError
from hqq_core.formats import FORMATS, compressed_tensors, hqq
from hqq_core.packing import STRIDED_PER_WORD, pack_dense, pack_strided
from hqq_core.safetensors_file import read_header, sha256_file
from hqq_core.verify._bits import unpack_stream
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint

RECIPES = {
    "compressed-tensors": Recipe(),
    "compressed-tensors 3": Recipe(nbits=3),
    "compressed-tensors 8, symmetric": Recipe(nbits=8),
    "hqq": Recipe(format="hqq"),
    "hqq 1.58": Recipe(format="hqq", nbits=1.58),
    "hqq 3, axis 0": Recipe(format="hqq", nbits=3, axis=0),
    "hqq 5": Recipe(format="hqq", nbits=5),
    "mlx 6": Recipe(format="mlx", nbits=6),
    "metal 2": Recipe(format="metal", nbits=2),
    "awq": Recipe(format="awq"),
    "gptq": Recipe(format="gptq"),
    "humming 7": Recipe(format="humming", nbits=7),
    "bitnet": Recipe(format="bitnet", nbits=1.58, group_size=None),
}
Q, K = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")


class Result:
    """A result in a folder of its own, with its source; what is done to it can be hidden from its manifest."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder

    def verify(self, *, alone: bool = False):
        return verify_folder(self.folder, None if alone else Checkpoint.open(self.source), threads=1)

    def copy(self, folder: Path) -> "Result":
        shutil.copytree(self.source, folder / "source")
        shutil.copytree(self.folder, folder / "result")
        return Result(folder / "source", folder / "result")

    @property
    def manifest(self) -> dict:
        return json.loads((self.folder / MANIFEST).read_text())

    @property
    def entries(self):
        """By tensor name, its file and place."""
        found = {}
        for path in self.folder.glob("*.safetensors"):
            with path.open("rb") as file:
                found |= {name: (path, entry) for name, entry in read_header(file.fileno(), path.name).items()}
        return found

    def rehash(self) -> None:
        """The manifest of what is there now."""
        manifest = self.manifest
        for file in manifest["files"]:
            path = self.folder / file["name"]
            file |= {"nbytes": path.stat().st_size, "sha256": sha256_file(path)}
        (self.folder / MANIFEST).write_text(json.dumps(manifest))

    def edit(self, name: str, change) -> None:
        """Rewrite a JSON file with `change` done to it."""
        fields = json.loads((self.folder / name).read_text())
        change(fields)
        (self.folder / name).write_text(json.dumps(fields))
        self.rehash()

    def fails(self, name: str, message: str, **how) -> None:
        with pytest.raises(VerificationError, match=message) as caught:
            self.verify(**how)
        assert name in caught.value.name


def make(folder: Path, recipe: Recipe, n_shards: int = 1) -> Result:
    tensors = llama_tensors(1)
    if recipe.format == "bitnet":  # which holds what was trained ternary alone
        tensors |= {name: tensor.sign() * 0.02 for name, tensor in tensors.items() if "_proj" in name}
    source = save_checkpoint(folder / "source", tensors, llama_config(1), n_shards)
    quantize_checkpoint(source, folder / "result", recipe)
    return Result(source, folder / "result")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Result]:
    """A result of each layout, not to be changed."""
    return {name: make(tmp_path_factory.mktemp("r"), recipe) for name, recipe in RECIPES.items()}


@pytest.fixture
def result(results, tmp_path) -> Result:
    """One that may be changed, of the default recipe, with folds."""
    return results["compressed-tensors"].copy(tmp_path)


def test_every_format_has_a_reader_here():
    elsewhere = {"gguf"}  # each type and family in formats/test_gguf.py
    assert {recipe.format for recipe in RECIPES.values()} == set(FORMATS) - elsewhere


class TestSound:
    @pytest.mark.parametrize("name", RECIPES)
    def test_errors_against_the_source_are_the_reported_ones(self, results, name):
        found = results[name].verify()
        assert found.tensors_quantized == 7
        assert found.tensors_copied == 5
        assert found.error_deviation < 1e-6
        alone = results[name].verify(alone=True)
        assert alone == replace(found, against_source=False, error_deviation=None)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(
        "recipe",
        [
            Recipe(format="hqq", nbits=3, group_size=8),
            Recipe(format="hqq", nbits=6, group_size=None),
            Recipe(format="hqq", nbits=8, group_size=8, zero="int", axis=0),
            Recipe(nbits=5, group_size=32),
            Recipe(nbits=7, group_size=32),
            Recipe(nbits=3, group_size=32, zero="none"),
            Recipe(format="mlx", nbits=5, group_size=32),
            Recipe(format="mlx", nbits=1, group_size=32),
            Recipe(format="awq"),
            Recipe(format="gptq", nbits=8, group_size=32),
        ],
        ids=lambda recipe: f"{recipe.format} {recipe.nbits} {recipe.axis}",
    )
    def test_odd_shapes(self, tmp_path, recipe, dtype):
        """Rows that fill no word, one row, more rows than a block has, and not a whole number of blocks."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, 64), (7, 192), (24, 128), (65, 64), (2056, 128), (64, 1600)]
        tensors = {
            f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(*shape, generator=generator).to(dtype)
            for i, shape in enumerate(shapes)
            if recipe.format != "gptq" or shape[0] % 8 == 0  # it holds no others
        }
        source = save_checkpoint(tmp_path / "source", tensors, llama_config(6))
        quantize_checkpoint(source, tmp_path / "result", replace(recipe, energy="none"))
        assert verify_folder(tmp_path / "result", Checkpoint.open(source)).weights_quantized > 2056 * 128

    @pytest.mark.parametrize("preset", ["fast", "best"])
    def test_other_presets_and_norms(self, tmp_path, preset):
        assert make(tmp_path, Recipe(preset=preset)).verify().error_deviation < 1e-6

    def test_several_files(self, tmp_path):
        result = make(tmp_path, Recipe(max_shard_nbytes=30_000), n_shards=2)
        assert (result.folder / INDEX).is_file()
        assert result.verify().files > 4

    def test_result_without_folds_has_no_factors(self, tmp_path):
        result = make(tmp_path, Recipe(fold=False))
        assert not (result.folder / FOLDING).exists()
        result.verify()

    def test_other_files_may_lie_beside_it(self, result):
        (result.folder / "NOTES.md").write_text("# A model\n")
        result.verify()

    def test_progress_ends_at_its_total_and_is_told_in_the_callers_thread(self, result):
        import threading

        seen = []
        verify_folder(
            result.folder,
            Checkpoint.open(result.source),
            progress=lambda done, total: seen.append((done, total, threading.current_thread())),
        )
        assert seen[-1][0] == seen[-1][1] > 0
        assert {thread for *_, thread in seen} == {threading.current_thread()}

    def test_what_progress_raises_stops_the_work(self, result):
        def progress(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            verify_folder(result.folder, progress=progress)

    def test_order_of_threads_makes_no_difference(self, result):
        assert len({verify_folder(result.folder, Checkpoint.open(result.source), threads=n) for n in (1, 2, 5)}) == 1


class TestFlips:
    @settings(max_examples=settings().max_examples // 3)
    @given(st.data())
    @pytest.mark.parametrize("name", RECIPES)
    def test_any_flipped_bits_are_found_and_their_tensor_is_named(self, results, name, data):
        """Also where the manifest agrees, as it would after a writer's mistake."""
        result = results[name]
        path, entry = data.draw(st.sampled_from(sorted(result.entries.values(), key=lambda place: place[1].begin)))
        offset = data.draw(st.integers(entry.begin, entry.end - 1))
        mask = data.draw(st.sampled_from([1 << bit for bit in range(8)]) | st.integers(1, 255))
        manifest = (result.folder / MANIFEST).read_bytes()
        _flip(path, offset, mask)
        try:
            if data.draw(st.booleans()):
                result.rehash()
            with pytest.raises(VerificationError) as caught:
                result.verify(alone=data.draw(st.booleans()))
        finally:
            _flip(path, offset, mask)
            (result.folder / MANIFEST).write_bytes(manifest)
        assert caught.value.name.rpartition(".")[0] == entry.name.rpartition(".")[0]

    @given(st.data())
    def test_any_flipped_bits_of_other_files_are_found(self, results, data):
        result = results["compressed-tensors"]
        path = result.folder / data.draw(st.sampled_from([file["name"] for file in result.manifest["files"]]))
        offset = data.draw(st.integers(0, path.stat().st_size - 1))
        mask = data.draw(st.integers(1, 255))
        _flip(path, offset, mask)
        try:
            with pytest.raises((VerificationError, CheckpointError)):
                result.verify()
        finally:
            _flip(path, offset, mask)


def _flip(path: Path, offset: int, mask: int) -> None:
    with path.open("r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ mask]), offset)


class TestWriterBugs:
    """The files are those of the manifest, and wrong."""

    def test_swapped_tensors(self, result):
        path = result.folder / SINGLE
        tensors = load_file(path)
        for part in ("weight_packed", "weight_scale", "weight_zero_point"):
            q, k = (name.replace("weight", part) for name in (Q, K))
            tensors[q], tensors[k] = tensors[k], tensors[q]
        save_file(tensors, path, metadata={"format": "pt"})
        result.rehash()
        result.fails("self_attn", "[qk]_proj.weight: digest .*, of what was solved", alone=True)

    def test_blocks_of_codes_in_another_order(self, tmp_path, monkeypatch):
        def reversed_blocks(codes, nbits):
            blocks = codes.view(STRIDED_PER_WORD[nbits], -1, codes.shape[1]).flip(0)
            return pack_strided(blocks.reshape(codes.shape), nbits)

        monkeypatch.setattr(hqq, "pack_strided", reversed_blocks)
        make(tmp_path, Recipe(format="hqq", energy="none")).fails("_proj.weight", "digest")

    def test_zero_points_along_the_wrong_axis(self, tmp_path, monkeypatch):
        def as_codes(codes, nbits):
            groups_first = codes.shape[1] == 64 and codes.shape[0] < 64
            return pack_dense(codes.flip(1) if groups_first else codes, nbits)

        monkeypatch.setattr(compressed_tensors, "pack_dense", as_codes)
        make(tmp_path, Recipe(energy="none", group_size=32)).fails("_proj.weight", "digest")

    def test_settings_that_readers_would_go_by(self, result):
        result.edit(
            CONFIG,
            lambda fields: fields["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=32),
        )
        result.fails("_proj.weight_scale", r"shape \(64, 3\): wanted \(64, 6\)")

    @pytest.mark.parametrize("name", [Q.removesuffix(".weight"), "q_proj"])
    def test_config_that_tells_readers_to_leave_a_quantized_layer_alone(self, result, name):
        result.edit(CONFIG, lambda fields: fields["quantization_config"]["ignore"].append(name))
        result.fails(Q, "leave it alone")

    @pytest.mark.parametrize("value", [0, -1, 7, 10**9, None, "4", 4.5, [4]])
    @pytest.mark.parametrize("setting", ["num_bits", "group_size"])
    def test_settings_that_no_layout_has(self, result, setting, value):
        def change(fields):
            fields["quantization_config"]["config_groups"]["group_0"]["weights"][setting] = value

        result.edit(CONFIG, change)
        result.fails("_proj.weight", "wanted|cannot be read as config.json has it")

    def test_config_without_settings(self, result):
        result.edit(CONFIG, lambda fields: fields.pop("quantization_config"))
        result.fails(CONFIG, "no quantization_config that is understood")

    def test_index_that_leads_elsewhere(self, tmp_path):
        result = make(tmp_path, Recipe(max_shard_nbytes=30_000))
        result.edit(
            INDEX, lambda fields: fields["weight_map"].update({"model.norm.weight": "model-00001-of-00001.safetensors"})
        )
        result.fails("model.norm.weight", "readers look for it in model-00001-of-00001")

    def test_tensor_that_nobody_expects(self, result):
        path = result.folder / SINGLE
        save_file(load_file(path) | {"stranger": torch.ones(2)}, path, metadata={"format": "pt"})
        result.rehash()
        result.fails("stranger", "no tensor of the source becomes it")

    @pytest.mark.parametrize("name", ["model.norm.weight", f"{Q.removesuffix('weight')}weight_scale"])
    def test_tensor_that_is_missing(self, result, name):
        path = result.folder / SINGLE
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
        result.rehash()
        result.fails(name, "not in the weight files")

    @pytest.mark.parametrize("value", [b"torch.float8", b"__import__('os').system('x')"])
    def test_strings_that_the_hqq_library_would_run(self, tmp_path, value):
        result = make(tmp_path, RECIPES["hqq"])
        path, name = result.folder / SINGLE, f"{Q.removesuffix('weight')}compute_dtype"
        save_file(load_file(path) | {name: torch.tensor(list(value), dtype=torch.uint8)}, path)
        result.rehash()
        result.fails(name, "wanted .*torch.float16")


class TestSource:
    def change(self, result: Result, name: str, change) -> None:
        tensors = load_file(result.source / SINGLE)
        change(tensors[name])
        save_file(tensors, result.source / SINGLE, metadata={"format": "pt"})

    def test_weight_that_changed(self, result):
        self.change(result, Q, lambda W: W[3, :8].neg_())
        result.fails(Q, "error .* against the source: wanted .*, as reported")
        result.verify(alone=True)

    def test_weight_of_another_size(self, result):
        self.change(result, Q, lambda W: W.mul_(1.25))
        result.fails(Q, "norm .* in the source")

    def test_copy_that_changed(self, result):
        self.change(result, "lm_head.weight", lambda W: W[5, :3].neg_())
        result.fails("lm_head.weight", "its bytes are not the source's")

    def test_tensor_that_is_gone(self, result):
        tensors = load_file(result.source / SINGLE)
        del tensors["model.norm.weight"]
        save_file(tensors, result.source / SINGLE)
        result.fails("model.norm.weight", "no such tensor in the source")

    def test_source_that_is_none(self, result):
        (result.source / CONFIG).unlink()
        with pytest.raises(CheckpointError, match=CONFIG):
            result.verify()

    def test_errors_that_were_not_those(self, result):
        def better(report):
            next(tensor for tensor in report["tensors"] if tensor["name"] == Q)["squared_error"] *= 0.99

        result.edit(REPORT, better)
        result.fails(Q, "as reported")

    @pytest.mark.parametrize("factor", [1.01, float("nan")])
    def test_factors_that_are_not_those_of_the_fold(self, result, factor):
        factors = load_file(result.folder / FOLDING)
        with (result.folder / FOLDING).open("rb") as file:
            metadata = json.loads(file.read(8 + int.from_bytes(file.read(8), "little"))[:-8])["__metadata__"]
        places = json.loads(metadata["places"])
        factors[places[f"columns {Q}"]].mul_(factor)
        save_file(factors, result.folder / FOLDING, metadata=metadata)
        result.rehash()
        result.fails("_proj.weight", "the source")
        result.verify(alone=True)

    def test_factors_that_are_missing(self, result):
        (result.folder / FOLDING).unlink()
        manifest = result.manifest
        manifest["files"] = [file for file in manifest["files"] if file["name"] != FOLDING]
        (result.folder / MANIFEST).write_text(json.dumps(manifest))
        result.fails("_proj.weight", "its columns are folded: wanted 192 factors")


class TestFiles:
    @pytest.mark.parametrize("name", [SINGLE, CONFIG, REPORT, FOLDING, "generation_config.json"])
    def test_file_that_is_missing(self, result, name):
        (result.folder / name).unlink()
        result.fails(name, "no such file")

    @pytest.mark.parametrize("name", [SINGLE, "generation_config.json"])
    def test_file_that_was_cut(self, result, name):
        os.truncate(result.folder / name, (result.folder / name).stat().st_size - 1)
        result.fails(name, "bytes: wanted")

    def test_file_that_was_cut_before_the_manifest(self, result):
        os.truncate(result.folder / SINGLE, (result.folder / SINGLE).stat().st_size - 1)
        result.rehash()
        result.fails(SINGLE, "as its header says")

    def test_weights_that_the_manifest_does_not_have(self, result):
        save_file({"a": torch.ones(1)}, result.folder / "consolidated.safetensors")
        result.fails("consolidated.safetensors", "readers may load them")

    @pytest.mark.parametrize("name", ["../source/config.json", "/etc/hostname"])
    def test_manifest_that_leads_out_of_the_folder(self, result, name):
        manifest = result.manifest
        manifest["files"].append({"name": name, "nbytes": 1, "sha256": ""})
        (result.folder / MANIFEST).write_text(json.dumps(manifest))
        result.fails(name, "no such file in the folder")

    @pytest.mark.parametrize(
        "header", [b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}']
    )
    def test_header_that_is_none(self, result, header):
        (result.folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
        result.rehash()
        with pytest.raises(VerificationError, match=SINGLE):
            result.verify()

    def test_folder_that_is_no_result(self, result):
        with pytest.raises(CheckpointError, match=f"no {MANIFEST} in the folder"):
            verify_folder(result.source)
        with pytest.raises(CheckpointError, match="no such folder"):
            verify_folder(result.source / "nowhere")

    def test_report_of_a_type_that_there_is_not(self, result):
        result.edit(REPORT, lambda report: report["tensors"][-1].update(dtype="F4"))
        with pytest.raises(CheckpointError, match=f"{REPORT}: no report: .* dtype 'F4': wanted one of F64"):
            verify_folder(result.folder)

    def test_manifest_of_a_file_without_a_name(self, result):
        manifest = result.manifest
        manifest["files"][0]["name"] = 7
        (result.folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=f"{MANIFEST}: no manifest: .* name"):
            verify_folder(result.folder)

    def test_report_of_an_earlier_version(self, result):
        result.edit(REPORT, lambda report: report["tensors"][0].pop("digest"))
        with pytest.raises(CheckpointError, match="wanted one with digests"):
            result.verify()


@given(st.data())
@pytest.mark.parametrize("nbits", range(1, 9))
def test_unpacking_inverts_packing(nbits, data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
    codes = np.array(
        data.draw(st.lists(st.integers(0, (1 << nbits) - 1), min_size=rows * columns, max_size=rows * columns))
    )
    codes = codes.astype(np.uint8).reshape(rows, columns)
    unpacked = unpack_stream(pack_dense(torch.from_numpy(codes), nbits).numpy(), nbits)
    assert np.array_equal(unpacked[:, :columns], codes)
    assert not unpacked[:, columns:].any()


def test_a_damaged_report_is_named_itself(result):
    path = result.folder / REPORT
    path.write_bytes(path.read_bytes().replace(b'"shape"', b'"shap3"', 1))
    with pytest.raises(VerificationError, match="sha256") as caught:
        result.verify()
    assert caught.value.name == REPORT
