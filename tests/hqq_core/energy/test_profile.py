"""Where energies come from, the file they are kept in, and what they do to a plan and its result."""

import json
import re
import resource
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hqq_core import Checkpoint, Recipe, build_plan, quantize_checkpoint, quantize_shard
from hqq_core.checkpoint import ShardReader
from hqq_core.energy import Energies, analytic, fingerprint, profile, synthetic
from hqq_core.errors import Cancelled, EnergyError
from tests.checkpoints import folder_bytes, llama_config, llama_tensors, save_checkpoint, save_llama


def test_a_file_holds_what_was_saved_and_equal_vectors_once(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    found = synthetic(checkpoint, n_tokens=64)
    path, key = tmp_path / "energies.safetensors", "0123456789abcdef"
    found.save(path, key)
    loaded = Energies.load(path, fingerprint=key)
    assert loaded.sources == found.sources
    assert all(torch.equal(loaded.vectors[name], vector) for name, vector in found.vectors.items())
    alike = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    with safe_open(path, "pt") as file:
        assert len(set(file.keys()) & {f"energy {name}" for name in alike}) == 1
    name = "model.layers.1.mlp.up_proj.weight"
    assert Energies.load(path, [name]).vectors.keys() == {name}
    with pytest.raises(EnergyError, match=r"energies.safetensors: energies of 0123456789ab: wanted fedcba987654"):
        Energies.load(path, fingerprint="fedcba9876543210")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EnergyError, match=r"energies.safetensors: no file of energies: SafetensorError"):
        Energies.load(path)


@pytest.mark.parametrize("entries", ["[]", '{"w": ["w", "a guess"]}', '{"w": ["v", "synthetic"]}', "{", "3"])
def test_a_file_of_other_things_is_refused(tmp_path, entries):
    metadata = {"fingerprint": "", "note": "", "energies": entries}
    save_file({"w": torch.ones(4)}, tmp_path / "e", metadata)
    with pytest.raises(EnergyError, match="e: no file of energies: "):
        Energies.load(tmp_path / "e")


def test_fingerprints_are_of_the_whole_content(tmp_path):
    folder = save_llama(tmp_path / "m")
    before = fingerprint(Checkpoint.open(folder))
    assert before == fingerprint(Checkpoint.open(save_llama(tmp_path / "again"))), "the same wherever it lies"
    assert before == fingerprint(Checkpoint.open(save_llama(tmp_path / "cut", n_shards=3))), "and however it is cut"
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert before != fingerprint(Checkpoint.open(folder)), "one bit, at the very end"
    changed = Checkpoint.open(
        save_checkpoint(tmp_path / "config", llama_tensors(), llama_config() | {"rms_norm_eps": 1})
    )
    assert before != fingerprint(changed)


def test_a_revision_stands_for_the_content(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    monkeypatch.delattr(ShardReader, "pieces")
    one, same, other = (fingerprint(checkpoint, revision) for revision in ("abc", "abc", "abd"))
    assert one == same != other


def test_progress_of_a_fingerprint_ends_at_the_size_of_the_source_and_may_stop_it(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m", n_shards=2))
    seen = []
    fingerprint(checkpoint, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == build_plan(checkpoint, Recipe()).nbytes_in

    def stop(nbytes):
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        fingerprint(checkpoint, progress=stop)


@pytest.mark.parametrize("mode", ["auto", "synthetic", "analytic"])
def test_progress_of_a_profile_never_goes_back_nor_beyond_the_source(tmp_path, mode):
    tensors = llama_tensors(layers=3)
    if mode == "auto":  # fails at the end of its first pass
        tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(64, 128)
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path / "m", tensors, llama_config(layers=3)))
    seen = []
    profile(checkpoint, mode, progress=seen.append)
    assert len(seen) > 20
    assert seen == sorted(seen)
    assert seen[-1] <= build_plan(checkpoint, Recipe()).nbytes_in


def test_auto_takes_the_best_that_can_be_had_and_says_why_not_better(tmp_path):
    known = Checkpoint.open(save_llama(tmp_path / "known"))
    best = profile(known)
    assert (set(best.sources.values()), best.note) == ({"synthetic"}, "")
    assert set(profile(known, "analytic").sources.values()) == {"analytic"}
    assert profile(known, "none").sources == {}
    broken = Checkpoint.open(
        save_checkpoint(tmp_path / "broken", llama_tensors(), llama_config() | {"num_hidden_layers": 3})
    )
    found = profile(broken)
    assert set(found.sources.values()) == {"analytic"}
    assert re.search(r"^no synthetic energies: .*layers.2.*not in the checkpoint$", found.note)
    with pytest.raises(EnergyError):
        profile(broken, "synthetic")
    stranger = save_checkpoint(tmp_path / "stranger", llama_tensors(), llama_config() | {"model_type": "starling"})
    found = profile(Checkpoint.open(stranger))
    assert found.source("model.layers.0.mlp.up_proj.weight") == "none"
    assert re.search(
        "no synthetic energies: .*'starling'.*; no analytic energies: .*'starling' is not known", found.note
    )


def test_auto_fills_in_what_the_forward_pass_does_not_reach(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    whole, missing = synthetic(checkpoint), "model.layers.1.mlp.down_proj.weight"
    part = Energies(*({n: v for n, v in own.items() if n != missing} for own in (whole.vectors, whole.sources)))
    monkeypatch.setattr("hqq_core.energy.synthetic", lambda checkpoint, **options: part)
    found = profile(checkpoint)
    assert {name for name, source in found.sources.items() if source == "analytic"} == {missing}
    assert torch.equal(found.vectors[missing], analytic(checkpoint).vectors[missing])


def test_without_transformers_auto_is_analytic_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = profile(Checkpoint.open(save_llama(tmp_path / "m")))
    assert set(found.sources.values()) == {"analytic"}
    assert found.note == "no synthetic energies: transformers is not installed (extra: evaluate)"


def test_plan_report_and_manifest_say_where_energies_come_from_and_why(tmp_path):
    source = save_checkpoint(tmp_path / "m", llama_tensors(), llama_config() | {"num_hidden_layers": 3})
    (manifest,) = quantize_checkpoint(source, tmp_path / "out", Recipe(format="hqq", preset="fast"))
    report = json.loads((tmp_path / "out" / "halfquad_report.json").read_text())
    assert manifest.metrics["energy_sources"] == report["metrics"]["energy_sources"] == {"analytic": 14}
    assert manifest.metrics["energy_note"].startswith("no synthetic energies: layers.2")
    rows = {row["name"]: row for row in report["tensors"]}
    row = rows["model.layers.0.mlp.up_proj.weight"]
    words = ("solver", "preset", "zero", "energy")
    assert [row[key] for key in words] == ["least squares", "fast", "float", "analytic"]
    assert (row["spec"]["iters"], row["spec"]["starts"]) == (2, 3)
    assert [rows["lm_head.weight"][key] for key in (*words, "spec")] == [None] * 5


def test_a_shard_task_weights_as_the_whole_run_does(tmp_path):
    source = save_llama(tmp_path / "m", n_shards=2)
    recipe = Recipe(format="hqq")
    quantize_checkpoint(source, tmp_path / "whole", recipe)
    checkpoint = Checkpoint.open(source)
    energies = profile(checkpoint)
    energies.save(tmp_path / "energies.safetensors")
    plan = type(build_plan(checkpoint, recipe)).from_dict(
        build_plan(checkpoint, recipe).with_energies(energies).to_dict()
    )
    (tmp_path / "parts").mkdir()
    for shard in plan.shards:
        quantize_shard(
            checkpoint, [plan], shard.index, tmp_path / "parts", Energies.load(tmp_path / "energies.safetensors")
        )
    whole, parts = folder_bytes(tmp_path / "whole"), folder_bytes(tmp_path / "parts")
    assert all(parts[name] == whole[name] for name in parts)
    with pytest.raises(EnergyError, match="planned with synthetic input energy: got none"):
        quantize_shard(checkpoint, [plan], 0, tmp_path / "parts")


def test_weighting_changes_the_codes_and_none_does_not(tmp_path):
    source = save_llama(tmp_path / "m")
    for mode in ("auto", "none"):
        quantize_checkpoint(source, tmp_path / mode, Recipe(format="hqq", energy=mode))
    one, two = (folder_bytes(tmp_path / mode)["model.safetensors"] for mode in ("auto", "none"))
    assert one != two


def test_along_axis_0_nothing_is_weighted(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    plan = build_plan(checkpoint, Recipe(format="hqq", axis=0)).with_energies(analytic(checkpoint))
    assert {tensor.energy for tensor in plan.tensors if tensor.spec} == {"none"}


HOSTILE = {
    "layers": {"num_hidden_layers": 10_000_000},
    "vocabulary": {"vocab_size": 10_000_000_000},
    "heads": {"head_dim": 10_000_000_000},
    "another repo": {"model_type": "zoedepth", "backbone": "someone/else"},
    "a long word": {"hidden_size": "x" * 100_000},
    "a list for a name": {"model_type": []},
    "a class that wants more": {"model_type": "encoder-decoder"},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_config_that_lies_costs_nothing_but_a_note(tmp_path, case):
    """No time, memory or network (the tests' sockets are shut) that the checkpoint itself does not ask for."""
    folder = save_checkpoint(tmp_path / "m", llama_tensors(1), llama_config(1) | HOSTILE[case])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    energies = profile(Checkpoint.open(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # KB; transformers' own code is some
    assert energies.note.startswith("no synthetic energies: ")
    assert len(energies.note) < 1000
    assert "synthetic" not in energies.sources.values()


def test_tensors_without_the_shape_of_a_weight_do_without(tmp_path):
    odd = {"model.layers.0.mlp.up_proj.weight": torch.tensor(1.0), "model.nothing.weight": torch.empty(1 << 40, 0)}
    folder = save_checkpoint(tmp_path / "m", llama_tensors(1) | odd, llama_config(1))
    energies = profile(Checkpoint.open(folder))
    assert not odd.keys() & energies.vectors.keys()
    assert energies.note


def test_a_file_holds_correlations_once_for_all_that_share_an_input(tmp_path):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m"))
    found = profile(checkpoint, correlations=tmp_path / "correlations")
    found.save(tmp_path / "e")
    loaded = Energies.load(tmp_path / "e")
    assert loaded.correlations.places.keys() == found.correlations.places.keys()
    for name in found.correlations.places:
        assert torch.equal(loaded.correlations.read(name), found.correlations.read(name))
    one = Energies.load(tmp_path / "e", ["model.layers.0.mlp.up_proj.weight"])
    assert one.correlations.places.keys() == {"model.layers.0.mlp.up_proj.weight"}
    with safe_open(tmp_path / "e", "pt") as file:
        stored = [key for key in set(file.keys()) if key.startswith("correlation ")]
    assert len(stored) == len(set(found.correlations.places.values()))
    assert profile(checkpoint).correlations is None
