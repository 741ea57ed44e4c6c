"""A GGUF file read again by ggml's own library: sound where it is, and each fault found in the tensor that has it."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hqq_core import Checkpoint, Recipe, quantize_checkpoint
from hqq_core.checkpoint import MANIFEST
from hqq_core.errors import VerificationError
from hqq_core.results import Manifest
from hqq_core.safetensors_file import sha256_file
from hqq_core.verify import verify_folder
from tests.families import build
from tests.vocabularies import save_tokenizer

FILE = "model.gguf"
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "Q6_K", "TQ2_0")
FAMILIES = {
    "llama": "llama-bpe", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen2", "gemma2": "gemma", "gemma3_text": "gemma",
    "phi3": "llama",
}  # fmt: skip
CHANGES = {"gemma2": {"tie_word_embeddings": True}, "gemma3_text": {"tie_word_embeddings": True}}


def make(folder, recipe, family="llama", dtype=torch.bfloat16, **changes):
    """A source and its result."""
    model = build(family, **CHANGES.get(family, {}), **changes)
    model.to(dtype).save_pretrained(folder / "m")
    source = save_tokenizer(folder / "m", FAMILIES[family], model.config.vocab_size)
    (manifest,) = quantize_checkpoint(source, folder / "out", recipe)
    return Checkpoint.open(source), folder / "out", manifest


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return make(tmp_path_factory.mktemp("r"), Recipe(format="gguf", type="Q4_1"))


@pytest.mark.parametrize("file_type", TYPES)
def test_every_type_is_sound(tmp_path, file_type):
    source, folder, manifest = make(tmp_path, Recipe(format="gguf", type=file_type), hidden_size=256)
    found = verify_folder(folder, source)
    assert found.tensors_quantized == manifest.metrics["tensors_quantized"] >= 14
    assert found.error_deviation < 1e-6
    assert verify_folder(folder) == dataclasses.replace(found, against_source=False, error_deviation=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sound(tmp_path, family, dtype):
    recipe = Recipe(format="gguf", type="Q5_1", skip_modules=() if family == "phi3" else ("layers.0.self_attn.k_proj",))
    source, folder, _ = make(tmp_path, recipe, family, dtype)
    assert verify_folder(folder, source).error_deviation < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_copies_of_doubles_are_sound_as_the_floats_that_they_become(tmp_path, family):
    source, _, _ = make(tmp_path, Recipe(format="gguf", type="Q4_1"), family)
    (path,) = source.folder.glob("*.safetensors")
    wide = ("norm.weight", "k_proj.weight", "embed_tokens.weight")
    tensors = {name: t.double() / 3 if name.endswith(wide) else t for name, t in load_file(path).items()}
    save_file(tensors, path)
    quantize_checkpoint(source.folder, tmp_path / "wide", Recipe(format="gguf", type="Q4_1", energy="none"))
    assert verify_folder(tmp_path / "wide", Checkpoint.open(source.folder)).tensors_copied > 7
    tensors["model.norm.weight"] += 1e-6
    save_file(tensors, path)
    with pytest.raises(VerificationError, match=r"model.norm.weight: its numbers are not what the source's become"):
        verify_folder(tmp_path / "wide", Checkpoint.open(source.folder))


@given(data=st.data())
@settings(max_examples=settings().max_examples // 3)
def test_any_flipped_bits_are_found_and_their_tensor_is_named(result, data):
    """Also where the manifest agrees, as after a mistake of the writer; but for bits that mean nothing beside a scale of 0."""
    source, folder, manifest = result
    name, offset = data.draw(st.sampled_from(places(folder)))
    offset += data.draw(st.integers(0, 19))
    mask, agrees = data.draw(st.integers(1, 255)), data.draw(st.booleans())
    before = values(folder, name)
    flip(folder / FILE, offset, mask)
    try:
        manifest = rehashed(folder, manifest) if agrees else manifest
        same = np.array_equal(before, values(folder, name))
        named = verify_names(folder, manifest)
        assert (named is not None) or (same and agrees)
        assert same or layer_of(name) in named
    finally:
        flip(folder / FILE, offset, mask)
    event("no value changed" if same else "values changed")
    verify_folder(folder, source)


def places(folder):
    """Names, and where in the file a block begins that belongs to them."""
    tensors = GGUFReader(folder / FILE).tensors
    return [(t.name, t.data_offset + i) for t in tensors for i in range(0, t.n_bytes - 20, max(t.n_bytes // 50, 20))]


def values(folder, name):
    (tensor,) = (tensor for tensor in GGUFReader(folder / FILE).tensors if tensor.name == name)
    return dequantize(tensor.data, tensor.tensor_type).copy()


def verify_names(folder, manifest):
    try:
        verify_folder(folder, manifest=manifest)
    except VerificationError as error:
        return error.name
    return None


def layer_of(name):
    """Part of the name that the tensor has in the source."""
    outside = {"token_embd": "embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = name.split(".")
    return f"layers.{parts[1]}." if parts[0] == "blk" else outside[parts[0]]


def test_rows_in_another_order_are_found(result, tmp_path):
    _, folder, manifest = result
    copy = shutil.copytree(folder, tmp_path / "copy")
    stored = next(tensor for tensor in GGUFReader(copy / FILE).tensors if tensor.name == "blk.0.attn_q.weight")
    raw, begin = bytearray((copy / FILE).read_bytes()), stored.data_offset
    half = stored.n_bytes // 2
    raw[begin : begin + 2 * half] = raw[begin + half : begin + 2 * half] + raw[begin : begin + half]
    (copy / FILE).write_bytes(raw)
    with pytest.raises(VerificationError, match="of what was solved") as caught:
        verify_folder(copy, manifest=rehashed(copy, manifest))
    assert caught.value.name == "model.layers.0.self_attn.q_proj.weight"


def test_another_source_and_a_second_file_are_found(result, tmp_path):
    source, folder, _ = result
    changed = shutil.copytree(source.folder, tmp_path / "changed")
    path = next(changed.glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(VerificationError, match="source"):
        verify_folder(folder, Checkpoint.open(changed))
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(copy / FILE, copy / "other.gguf")
    with pytest.raises(VerificationError, match=f"beside {FILE}"):
        verify_folder(copy)


@pytest.mark.parametrize("cut", [0, 3, 100, 5000])
def test_what_is_no_gguf_file_is_refused_by_name(result, tmp_path, cut):
    _, folder, manifest = result
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:cut])
    with pytest.raises(VerificationError) as caught:
        verify_folder(copy, manifest=rehashed(copy, manifest))
    assert caught.value.name == FILE


def flip(path, offset, mask):
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def rehashed(folder, manifest: Manifest) -> Manifest:
    """The manifest as it would be had these bytes been written."""
    assert (folder / MANIFEST).exists()
    path = folder / FILE
    files = (
        dataclasses.replace(file, nbytes=path.stat().st_size, sha256=sha256_file(path)) if file.name == FILE else file
        for file in manifest.files
    )
    return dataclasses.replace(manifest, files=tuple(files))
