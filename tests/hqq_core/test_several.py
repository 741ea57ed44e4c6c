"""One read of a source for several recipes, one solve for each way to solve, and a folder each."""

import json
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import hqq_core.convert._folder as folder_room
import hqq_core.convert._shard as shard_room
import hqq_core.formats.base as writer_room
from hqq_core import (
    Checkpoint,
    Recipe,
    build_plans,
    finish_checkpoint,
    output_folders,
    quantize_checkpoint,
    quantize_shard,
)
from hqq_core.checkpoint import MANIFEST, REPORT
from hqq_core.convert import finished
from hqq_core.errors import FormatError, SpecError, StorageFullError, VerificationError
from hqq_core.formats import FORMATS, settled
from hqq_core.plan import Plan
from tests.checkpoints import VOCABULARY, folder_bytes, llama_config, llama_tensors, save_checkpoint, save_llama
from tests.onefile import RESULT, OneFileWriter, read_one_file
from tests.oracles import stored_tensors
from tests.vocabularies import save_tokenizer

MLX, METAL, PACKED = Recipe(format="mlx"), Recipe(format="metal"), Recipe(format="compressed-tensors")
EVERY = [Recipe(format=name) for name, writer in FORMATS.items() if not writer.capabilities.lossless]
MIXED = [
    Recipe(format="mlx", preset="best", max_shard_nbytes=200_000),
    Recipe(format="mlx", include_modules=("lm_head", "embed_tokens"), fold=False, max_shard_nbytes=60_000),
    Recipe(format="hqq", axis=0),
    Recipe(format="hqq", nbits=3, skip_modules=("q_proj", "down_proj")),
]


@pytest.fixture
def one_file(monkeypatch):
    monkeypatch.setitem(FORMATS, "one-file", OneFileWriter())
    return Recipe(format="one-file", max_shard_nbytes=100_000)


@pytest.mark.parametrize("recipes", [EVERY, MIXED, MIXED[::-1]], ids=["every format", "mixed", "mixed, backwards"])
def test_each_folder_is_what_its_recipe_alone_gives(tmp_path, recipes):
    source = save_llama(tmp_path / "m", hidden=128, n_shards=2)
    save_tokenizer(source, "gpt-2", VOCABULARY)
    manifests = quantize_checkpoint(source, tmp_path / "out", *recipes)
    folders = output_folders(recipes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(folders)
    for i, (recipe, folder, manifest) in enumerate(zip(recipes, folders, manifests, strict=True)):
        assert quantize_checkpoint(source, tmp_path / str(i), recipe) == (manifest,)
        assert folder_bytes(tmp_path / "out" / folder) == folder_bytes(tmp_path / str(i))


@pytest.mark.parametrize("recipes", [EVERY, [MLX], [Recipe(format="mlx", include_modules=("lm_head",)), PACKED]])
def test_each_byte_of_the_source_is_read_once(tmp_path, monkeypatch, recipes):
    source = save_tokenizer(save_llama(tmp_path / "m", n_shards=2), "gpt-2", VOCABULARY)
    checkpoint = Checkpoint.open(source)
    plans = build_plans(checkpoint, recipes)
    reads = []
    real = shard_room.ShardReader.read.__globals__["read_exactly"]

    def read_exactly(file, buffer, offset, name):
        reads.append((name, offset, offset + len(buffer)))
        real(file, buffer, offset, name)

    monkeypatch.setattr("hqq_core.checkpoint.read_exactly", read_exactly)
    (tmp_path / "out").mkdir()
    for index in range(2):
        quantize_shard(checkpoint, plans, index, tmp_path / "out")
    monkeypatch.undo()
    for name, entries in checkpoint.headers().items():
        ranges = sorted((begin, end) for file, begin, end in reads if file == name)
        data = [entry for entry in entries.values() if entry.nbytes]
        assert ranges == sorted((entry.begin, entry.end) for entry in data)


@pytest.fixture
def solved(monkeypatch):
    """Names of the tensors that the solver was called for."""
    names, real = [], writer_room.quantize

    def quantize(W, spec, *, name, **settings):
        names.append(name)
        return real(W, spec, name=name, **settings)

    monkeypatch.setattr(writer_room, "quantize", quantize)
    return names


@pytest.mark.parametrize(
    ("recipes", "solves"),
    [([MLX], 1), ([MLX, METAL], 1), ([MLX, PACKED], 2), ([MLX, PACKED, METAL], 2)],
    ids=["mlx", "mlx metal", "mlx compressed-tensors", "three formats"],
)
def test_what_is_solved_alike_is_solved_once(tmp_path, solved, recipes, solves):
    quantize_checkpoint(save_llama(tmp_path / "m"), tmp_path / "out", *recipes)
    assert len(solved) == 14 * solves
    assert set(Counter(solved).values()) == {solves}


def test_formats_that_solve_otherwise_share_nothing_though_all_settings_agree(tmp_path):
    def ternary(name, W):
        return ((W.float() / 0.02).round().clamp(-1, 1) * 0.02).to(W.dtype) if name.endswith("_proj.weight") else W

    tensors = {name: ternary(name, W) for name, W in llama_tensors().items()}
    source = save_checkpoint(tmp_path / "m", tensors, llama_config())
    kept = Recipe(format="bitnet", nbits=1.58, group_size=None, preset="best")  # which has no energy and no folds
    solved = Recipe(format="hqq", nbits=1.58, group_size=None, zero="none", preset="best", energy="none", fold=False)
    for i, recipes in enumerate([(kept, solved), (solved, kept), (MLX, kept), (kept, MLX)]):
        out = tmp_path / str(i)
        quantize_checkpoint(source, out, *recipes)
        again = build_plans(Checkpoint.open(source), [settled(recipe) for recipe in recipes])
        for recipe, folder in zip(recipes, output_folders(recipes), strict=True):
            quantize_checkpoint(source, out / f"{folder}-alone", recipe)
            assert folder_bytes(out / folder) == folder_bytes(out / f"{folder}-alone")
        assert tuple(plan.folder for plan in again) == output_folders(recipes)


def test_what_only_one_recipe_folds_is_solved_twice(tmp_path, solved):
    source = save_llama(tmp_path / "m")
    quantize_checkpoint(source, tmp_path / "out", MLX, Recipe(format="mlx", fold=False))
    report = json.loads((tmp_path / "out" / "mlx-4bit-g64" / REPORT).read_text())
    wanted = {tensor["name"]: 2 if tensor["folded"] else 1 for tensor in report["tensors"] if tensor["spec"]}
    assert dict(Counter(solved)) == wanted
    assert 2 in wanted.values()


@pytest.mark.parametrize("recipes", [[MLX, METAL, PACKED], MIXED])
def test_progress_counts_the_source_once(tmp_path, recipes):
    source = save_llama(tmp_path / "m", n_shards=2)
    seen = []
    quantize_checkpoint(source, tmp_path / "out", *recipes, progress=lambda done, total: seen.append((done, total)))
    nbytes = build_plans(Checkpoint.open(source), recipes)[0].nbytes_in
    assert {total for _, total in seen} == {2 * nbytes}
    assert seen == sorted(seen)
    assert seen[-1][0] == 2 * nbytes


def test_plans_of_one_job_survive_json(tmp_path):
    plans = build_plans(Checkpoint.open(save_llama(tmp_path / "m")), MIXED)
    assert tuple(Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) for plan in plans) == plans
    assert [plan.folder for plan in plans] == list(output_folders(MIXED))


def test_one_file_type_is_one_folder_whatever_it_is_called():
    assert output_folders([Recipe(format="gguf"), Recipe(format="gguf", type="Q4_1")]) == ("gguf-Q4_K_M", "gguf-Q4_1")
    with pytest.raises(SpecError, match="folder gguf-Q4_K_M is another recipe's"):
        output_folders([Recipe(format="gguf", type="Q4_K"), Recipe(format="gguf", nbits=4)])


def test_folders_are_named_after_recipes():
    assert output_folders([Recipe(format="hqq")]) == ("",)
    assert output_folders(MIXED) == (
        "mlx-4bit-g64-best",
        "mlx-4bit-g64-unfolded",
        "hqq-4bit-g64-axis0",
        "hqq-3bit-g64",
    )
    recipes = [
        Recipe(format="hqq", nbits=1.58, group_size=None),
        Recipe(zero="none"),
        Recipe(format="hqq", preset="fast"),
    ]
    assert output_folders(recipes) == (
        "hqq-1.58bit-channel",
        "compressed-tensors-4bit-g64-none",
        "hqq-4bit-g64-fast",
    )


@pytest.mark.parametrize(
    ("recipes", "error", "field", "index", "message"),
    [
        ([], SpecError, "recipes", 0, "no recipe: wanted one or more"),
        ([MLX, MLX], SpecError, "format", 1, "mlx-4bit-g64 is another recipe's, which is the same"),
        (
            [MLX, PACKED, Recipe(format="mlx", skip_modules=("q_proj",))],
            SpecError, "skip_modules", 2, "mlx-4bit-g64 is another recipe's, which differs in skip_modules alone",
        ),
        ([MLX, Recipe(energy="none")], SpecError, "energy", 1, "energy 'none': wanted 'auto', as a recipe before has it"),
        ([MLX, Recipe(format="mlx", nbits=7)], FormatError, "nbits", 1, "nbits 7: format 'mlx' holds"),
        ([MLX, Recipe(format="../mlx")], FormatError, "format", 1, "format '../mlx': wanted one of"),
    ],
    ids=["none", "twice", "one folder", "energy", "format cannot", "no format"],
)  # fmt: skip
def test_recipes_that_are_no_job_are_refused_by_name(tmp_path, recipes, error, field, index, message):
    with pytest.raises(error, match=message) as caught:
        quantize_checkpoint(save_llama(tmp_path / "m"), tmp_path / "out", *recipes)
    assert (caught.value.field, caught.value.recipe) == (field, index)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_of_any(tmp_path, full_disk):
    source = save_llama(tmp_path / "m", n_shards=2)
    recipes = Recipe(format="hqq", nbits=2), Recipe(format="hqq", nbits=8)
    small, large = (max(s.nbytes_out for s in p.shards) for p in build_plans(Checkpoint.open(source), recipes))
    with full_disk((small + large) // 2), pytest.raises(StorageFullError):  # the first recipe's files fit
        quantize_checkpoint(source, tmp_path / "out", *recipes)
    assert not (tmp_path / "out").exists()


def test_a_format_of_one_file_is_joined_from_what_shards_wrote(tmp_path, one_file):
    source = save_llama(tmp_path / "m", n_shards=2)
    one, other = quantize_checkpoint(source, tmp_path / "out", one_file, Recipe(format="hqq"))
    folder = tmp_path / "out" / "one-file-4bit-g64"
    assert {file.name for file in one.files} | {MANIFEST} == {path.name for path in folder.iterdir()}
    found, wanted = read_one_file(folder), stored_tensors(tmp_path / "out" / "hqq-4bit-g64")
    original = llama_tensors()
    copied = {f"llama.{name}": name for name in original if name in wanted}
    assert set(found) == {*copied, *(name for name in wanted if name not in original)}
    for name, tensor in found.items():
        same = tensor if name in wanted else tensor.flip(0).to(torch.bfloat16)
        assert torch.equal(same, wanted[copied.get(name, name)]), name
    assert one.metrics["nbytes_out"] == (folder / RESULT).stat().st_size
    assert other.metrics["relative_error"] == one.metrics["relative_error"]


def test_a_finish_that_was_cut_off_gives_the_same_bytes_when_it_runs_again(tmp_path, one_file, monkeypatch):
    source = save_llama(tmp_path / "m", n_shards=2)
    whole = quantize_checkpoint(source, tmp_path / "whole", Recipe(format="one-file", energy="none"))
    checkpoint, output = Checkpoint.open(source), tmp_path / "out"
    (plan,) = build_plans(checkpoint, [Recipe(format="one-file", energy="none")])
    output.mkdir()
    results = [result for index in (1, 0) for result in quantize_shard(checkpoint, [plan], index, output)]
    parts = {path.name: path.read_bytes() for path in output.iterdir()}
    assert finished(plan, output) is None

    with cut_off(monkeypatch, "_config"):  # joined, but no manifest
        finish_checkpoint(checkpoint, plan, results, output)
    assert (output / RESULT).is_file()
    assert finished(plan, output) is None
    with cut_off(monkeypatch, "_remove_parts"):  # a manifest, but parts beside it
        finish_checkpoint(checkpoint, plan, results, output)
    assert parts.keys() < {path.name for path in output.iterdir()}
    next(output.glob(f"{RESULT}.part*")).unlink()
    assert (finished(plan, output),) == whole == (finished(plan, output),)
    assert folder_bytes(output) == folder_bytes(tmp_path / "whole")

    raw = bytearray((output / RESULT).read_bytes())
    raw[-1] ^= 1
    (output / RESULT).write_bytes(raw)
    with pytest.raises(VerificationError, match="model.one: sha256 .*: wanted .*, as when it was written"):
        finished(plan, output)


@contextmanager
def cut_off(monkeypatch, step):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder_room, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield
