import json

import pytest
import torch

from hqq_core import Checkpoint, Recipe, build_plan, finish_checkpoint, quantize_checkpoint, quantize_shard
from hqq_core.checkpoint import MANIFEST
from hqq_core.errors import Cancelled, CheckpointError, StorageFullError, TensorError, VerificationError
from hqq_core.results import Manifest, ShardResult
from hqq_core.safetensors_file import sha256_file
from tests.checkpoints import llama_config, llama_tensors, save_checkpoint, save_llama
from tests.oracles import stored_tensors


def test_copied_tensors_are_the_same_bytes(tmp_path):
    source = save_llama(tmp_path / "m")
    quantize_checkpoint(source, tmp_path / "out", Recipe(fold=False))
    stored, original = stored_tensors(tmp_path / "out"), llama_tensors()
    copied = [name for name in original if name in stored]
    assert "model.embed_tokens.weight" in copied
    assert all(torch.equal(stored[name], original[name]) for name in copied)


def test_the_manifest_names_every_file_with_its_hash(tmp_path):
    source = save_llama(tmp_path / "m", n_shards=2)
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (manifest,) = quantize_checkpoint(source, tmp_path / "out", Recipe())
    on_disk = {path.name for path in (tmp_path / "out").iterdir()}
    assert {file.name for file in manifest.files} | {MANIFEST} == on_disk
    assert "tokenizer.json" in on_disk
    for file in manifest.files:
        path = tmp_path / "out" / file.name
        assert (path.stat().st_size, sha256_file(path)) == (file.nbytes, file.sha256)
    assert Manifest.from_dict(json.loads((tmp_path / "out" / MANIFEST).read_text())) == manifest


def test_the_report_gives_reason_and_error_of_each_tensor(tmp_path):
    quantize_checkpoint(save_llama(tmp_path / "m"), tmp_path / "out", Recipe(format="hqq", nbits=3))
    report = json.loads((tmp_path / "out" / "halfquad_report.json").read_text())
    by_name = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert 0.1 < by_name["model.layers.0.mlp.up_proj.weight"]["relative_error"] < 0.25
    assert by_name["model.layers.0.mlp.up_proj.weight"]["spec"]["nbits"] == 3
    assert "relative_error" not in by_name["lm_head.weight"]
    assert report["metrics"]["worst_tensors"][0]["relative_error"] == max(
        tensor.get("relative_error", 0) for tensor in report["tensors"]
    )


def test_pointers_to_code_do_not_come_along(tmp_path):
    config = llama_config() | {"auto_map": {"AutoModelForCausalLM": "modeling_x.Evil"}}
    source = save_checkpoint(tmp_path / "m", llama_tensors(), config)
    (source / "modeling_x.py").write_text("raise SystemExit")
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "x.Evil"}, "pad": 1}))
    quantize_checkpoint(source, tmp_path / "out", Recipe())
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "modeling_x.py").exists()
    report = json.loads((tmp_path / "out" / "halfquad_report.json").read_text())
    assert report["files_left_out"] == ["modeling_x.py"]
    assert report["auto_map_removed"] is True
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"pad": 1}


def test_copied_linear_layers_are_on_the_ignore_list(tmp_path):
    quantize_checkpoint(
        save_llama(tmp_path / "m"), tmp_path / "out", Recipe(skip_modules=["model.layers.0.self_attn.q_proj"])
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", "model.layers.0.self_attn.q_proj"]


def nan_checkpoint(folder):
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    return save_checkpoint(folder, tensors, llama_config(), n_shards=2)


def test_a_result_in_its_own_source_is_refused(tmp_path):
    source = save_llama(tmp_path / "m")
    with pytest.raises(CheckpointError, match="out: lies in the source"):
        quantize_checkpoint(source, source / "out", Recipe())


def test_what_killed_runs_left_is_gone_in_the_end(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    plan = build_plan(checkpoint, Recipe())
    (tmp_path / "out" / "original").mkdir(parents=True)
    (tmp_path / "out" / ".partial-0123abcd-model.safetensors").write_bytes(b"x")
    (tmp_path / "out" / "original" / ".partial-0123abcd-params.json").write_bytes(b"x")
    (result,) = quantize_shard(checkpoint, [plan], 0, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".partial-*"))
    finish_checkpoint(checkpoint, plan, [result], tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".partial-*"))


def test_an_error_without_measure_is_null_in_json(tmp_path):
    tensors = llama_tensors(1) | {"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 64, dtype=torch.float16)}
    source = save_checkpoint(tmp_path / "m", tensors, llama_config(1))
    quantize_checkpoint(source, tmp_path / "out", Recipe(format="hqq", nbits=1, zero="none"))
    report = json.loads((tmp_path / "out" / "halfquad_report.json").read_text())
    errors = {tensor["name"]: tensor.get("relative_error") for tensor in report["tensors"]}
    assert errors["model.layers.0.mlp.up_proj.weight"] is None


def test_nan_weights_fail_by_name_and_leave_nothing(tmp_path):
    source = nan_checkpoint(tmp_path / "m")
    with pytest.raises(
        TensorError, match=r"model.layers.1.mlp.up_proj.weight: 1 NaN and 0 infinite among 12288 weights"
    ):
        quantize_checkpoint(source, tmp_path / "out", Recipe())
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path, full_disk):
    source = save_llama(tmp_path / "m")
    (tmp_path / "out").mkdir()
    with full_disk(30_000), pytest.raises(StorageFullError, match=r"model.safetensors: no room left"):
        quantize_checkpoint(source, tmp_path / "out", Recipe())
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="out: exists and is not empty"):
        quantize_checkpoint(save_llama(tmp_path / "m"), tmp_path / "out", Recipe())
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_source_that_changed_since_it_was_planned_is_noticed(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    plan = build_plan(checkpoint, Recipe())
    save_llama(tmp_path / "m", hidden=128)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors: holds other tensors than when it was planned"):
        quantize_shard(checkpoint, [plan], 0, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_stopping_leaves_nothing_half_written(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    plan = build_plan(checkpoint, Recipe())
    seen = []

    def progress(nbytes: int) -> None:
        seen.append(nbytes)
        if nbytes > plan.nbytes_in // 2:
            raise Cancelled("enough")

    (tmp_path / "out").mkdir()
    with pytest.raises(Cancelled):
        quantize_shard(checkpoint, [plan], 0, tmp_path / "out", progress=progress)
    assert list((tmp_path / "out").iterdir()) == []
    assert seen == sorted(seen)


@pytest.mark.parametrize(("energy", "passes"), [("none", 1), ("analytic", 2), ("synthetic", 2)])
def test_progress_counts_the_source_once_more_where_it_is_profiled(tmp_path, energy, passes):
    seen = []
    source = save_llama(tmp_path / "m", n_shards=2)
    recipe = Recipe(energy=energy)
    quantize_checkpoint(source, tmp_path / "out", recipe, progress=lambda done, total: seen.append((done, total)))
    nbytes = build_plan(Checkpoint.open(source), recipe).nbytes_in
    assert {total for _, total in seen} == {passes * nbytes}
    assert seen == sorted(seen)
    assert seen[-1][0] == passes * nbytes
    assert sum(done < nbytes for done, _ in seen) > 10, "moves while it profiles"


def test_results_survive_json_and_files_that_are_gone_are_missed(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    plan = build_plan(checkpoint, Recipe())
    (tmp_path / "out").mkdir()
    (solved,) = quantize_shard(checkpoint, [plan], 0, tmp_path / "out")
    assert ShardResult.from_dict(json.loads(json.dumps(solved.to_dict()))) == solved
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(VerificationError, match=r"model.safetensors: written before, but gone"):
        finish_checkpoint(checkpoint, plan, [solved], tmp_path / "out")


def test_where_a_check_fails_there_is_no_manifest(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    plan = build_plan(checkpoint, Recipe())
    (tmp_path / "out").mkdir()
    results = quantize_shard(checkpoint, [plan], 0, tmp_path / "out")

    def check(folder, manifest):
        assert {file.name for file in manifest.files} == {path.name for path in folder.iterdir()}
        raise VerificationError("model.norm.weight", "not what it was")

    with pytest.raises(VerificationError, match="not what it was"):
        finish_checkpoint(checkpoint, plan, results, tmp_path / "out", check=check)
    assert not (tmp_path / "out" / MANIFEST).exists()
    finish_checkpoint(checkpoint, plan, results, tmp_path / "out")


def test_importing_the_library_loads_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, hqq_core; from hqq_core import QuantSpec; "
        "print([name for name in ('torch','numba','transformers','fastapi','celery','sqlalchemy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
