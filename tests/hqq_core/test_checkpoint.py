import json
import os

import pytest
import torch
from safetensors.torch import save_file

from hqq_core import Checkpoint, Recipe, quantize_checkpoint
from hqq_core.errors import CheckpointError
from tests.checkpoints import llama_tensors, save_llama

INDEX = "model.safetensors.index.json"


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("n_shards", [1, 3])
def test_reads_every_tensor_as_it_was_written(tmp_path, n_shards):
    checkpoint = Checkpoint.open(save_llama(tmp_path / "m", n_shards=n_shards))
    seen = {}
    for file in checkpoint.headers():
        with checkpoint.shard(file) as reader:
            for name in reader.entries:
                seen[name] = reader.read(name)
                assert b"".join(map(bytes, reader.pieces(name))) == seen[name].view(torch.uint8).numpy().tobytes()
    expected = llama_tensors()
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "wanted a plain"),
        ({"a": "/etc/passwd"}, "wanted a plain"),
        ({"a": "sub/model.safetensors"}, "wanted a plain"),
        ({"a": 5}, "wanted a plain"),
        ({}, "wanted an object with entries"),
        (None, "wanted an object with entries"),
        ({"a": "model-00009-of-00009.safetensors"}, "no such weight file in the folder"),
    ],
)
def test_index_may_only_name_files_beside_it(tmp_path, weight_map, message):
    folder = save_llama(tmp_path / "m", n_shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder).headers()


def test_index_and_headers_must_agree(tmp_path):
    folder = save_llama(tmp_path / "m", n_shards=2)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {"ghost": weight_map["lm_head.weight"]})
    with pytest.raises(CheckpointError, match="'ghost' is said to be in model-00002-of-00002.safetensors"):
        Checkpoint.open(folder).headers()


def test_a_tensor_may_stand_in_one_file_only(tmp_path):
    folder = save_llama(tmp_path / "m", n_shards=2)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="'lm_head.weight' is in model-00001-of-00002.safetensors already"):
        Checkpoint.open(folder).headers()


def test_a_folder_of_pickles_is_refused_unopened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: pickled weights are never opened"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json in the folder"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json: a JSON list"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: no JSON text"),
        (lambda folder: edit_json(folder / "config.json", quantization_config={"quant_method": "awq"}), "says 'awq'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "a b.safetensors"),
            "1 safetensors files and no",
        ),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors: .*truncated"),
        (
            lambda folder: ((folder / "model.safetensors").unlink(), os.mkfifo(folder / "model.safetensors")),
            "no regular file",
        ),
    ],
)
def test_broken_folders_are_refused_by_name(tmp_path, break_it, message):
    folder = save_llama(tmp_path / "m")
    break_it(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder).headers()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_every_file_passes_through_the_opener(tmp_path):
    opened = []

    def opener(path):
        opened.append(path.name)
        return os.open(path, os.O_RDONLY)

    checkpoint = Checkpoint.open(save_llama(tmp_path / "m", n_shards=2), opener)
    checkpoint.headers()
    b"".join(checkpoint.file_pieces("generation_config.json"))
    assert sorted(opened) == [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "vocab.txt", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
        "source.spm", "qwen.tiktoken",
        "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja",
        "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
        "LICENSE", "LICENSE.txt", "LICENSE-MODEL", "License.pdf", "MODEL_LICENSE", "LICENCE.md", "NOTICE", "Notice",
        "COPYING", "USE_POLICY.md", "docs/README.md", "legal/LICENSE", "1_Pooling/config.json", "a/b/c/tokenizer.model",
    ],
)  # fmt: skip
def test_tokenizer_templates_settings_and_licence_come_along_unchanged(tmp_path, name):
    folder = save_llama(tmp_path / "m")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    content = b'{"a": [1, 2],\r\n "b": "\xc3\xa9"}'
    (folder / name).write_bytes(content)
    carried, left_out = Checkpoint.open(folder).carried_files()
    assert (set(carried), left_out) == ({name, "generation_config.json"}, [])
    quantize_checkpoint(folder, tmp_path / "out", Recipe(energy="none"))
    assert (tmp_path / "out" / name).read_bytes() == content


def test_the_sources_card_makes_room_for_ours_and_comes_along_unchanged(tmp_path):
    folder = save_llama(tmp_path / "m")
    (folder / "README.md").write_bytes(b"# A model\r\n")
    (folder / "SOURCE_README.md").write_text("of a source that was made like this itself")
    quantize_checkpoint(folder, tmp_path / "out", Recipe(energy="none"))
    assert (tmp_path / "out" / "SOURCE_README.md").read_bytes() == b"# A model\r\n"
    assert b"Halfquad" in (tmp_path / "out" / "README.md").read_bytes()


@pytest.mark.parametrize("name", ["license_check.py", "NOTICE.safetensors", "LICENSE/modeling_x.py", "x.bin", "x.gguf"])
def test_code_and_weights_do_not_whatever_they_are_called(tmp_path, name):
    folder = save_llama(tmp_path / "m")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    assert Checkpoint.open(folder).carried_files() == (["generation_config.json"], [name])


def test_code_and_other_weights_are_left_out_of_what_is_carried(tmp_path):
    folder = save_llama(tmp_path / "m")
    for name in (
        "tokenizer.json",
        "LICENSE",
        "modeling_x.py",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        ".hidden.json",
    ):
        (folder / name).write_text("x")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    assert Checkpoint.open(folder).carried_files() == (
        ["1_Pooling/config.json", "LICENSE", "generation_config.json", "tokenizer.json"],
        ["modeling_x.py", "pytorch_model.bin", "pytorch_model.bin.index.json"],
    )


def test_files_that_would_pass_for_ours_are_not_carried(tmp_path):
    folder = save_llama(tmp_path / "m")
    (folder / "halfquad_manifest.json").write_text("{}")
    (folder / "halfquad_report.json").mkdir()
    (folder / "halfquad_report.json" / "x.json").write_text("{}")
    assert Checkpoint.open(folder).carried_files() == (["generation_config.json"], [])


def test_files_that_cannot_be_carried_are_told_before_the_work(tmp_path):
    folder = save_llama(tmp_path / "m")
    with (folder / "train.txt").open("wb") as file:
        file.truncate(256_000_001)
    (folder / os.fsdecode(b"\xff.json")).write_text("{}")
    assert Checkpoint.open(folder).carried_files()[1] == ["\\udcff.json", "train.txt"]
    (folder / "y.txt").symlink_to("y.txt")
    with pytest.raises(CheckpointError, match=r"y.txt: cannot be opened: Too many levels of symbolic links"):
        Checkpoint.open(folder).carried_files()


def test_numbers_of_thousands_of_digits_are_refused(tmp_path):
    folder = save_llama(tmp_path / "m")
    (folder / "config.json").write_text('{"x": ' + "1" * 5000 + "}")
    with pytest.raises(CheckpointError, match=r"config.json: no JSON text"):
        Checkpoint.open(folder)
