"""Hostile headers, with the safetensors library as a second opinion; and files that it can read."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from hqq_core.errors import CheckpointError, StorageFullError
from hqq_core.safetensors_file import DTYPES, SafetensorsWriter, read_header


def header_of(raw: bytes, tmp_path) -> dict:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with path.open("rb") as file:
        return read_header(file.fileno(), path.name)


def file_with(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_the_library_wrote(tmp_path):
    tensors = {
        "b": torch.ones(3, 5, dtype=torch.bfloat16),
        "a": torch.arange(7),
        "empty": torch.zeros(0, 4),
        "c": torch.tensor(1.0),
    }
    entries = header_of(save(tensors), tmp_path)
    assert {name: (found.shape, DTYPES[found.dtype]) for name, found in entries.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes are too few"),
        (struct.pack("<Q", 100_000_000) + b"{}" * 10, "header of 100000000 bytes in a file of 28"),
        (struct.pack("<Q", 1 << 63) + b"{}", "header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 0) + b"{}", "header of 0 bytes"),
        (file_with(b"\xff\xfe"), "no JSON text"),
        (file_with(b"[" * 100_000), "no JSON text"),
        (file_with(b"[]"), "JSON list: wanted an object"),
        (file_with(b'{"a":1,"a":2}'), "key 'a' twice"),
        (file_with({"__metadata__": {"a": 1}}), "__metadata__ must map strings to strings"),
        (file_with({"a": entry() | {"x": 1}}, bytes(8)), "'a': wanted exactly the keys"),
        (file_with({"a": entry(dtype="F33")}, bytes(8)), "'a': dtype 'F33'"),
        (file_with({"a": entry(dtype=["F32"])}, bytes(8)), "'a': dtype"),
        (file_with({"a": entry(shape=(-2, -1))}, bytes(8)), "'a': shape"),
        (file_with({"a": entry(shape=(2.0,))}, bytes(8)), "'a': shape"),
        (file_with({"a": entry(shape=(1 << 61, 1 << 61))}, bytes(8)), "'a': 8 bytes of data"),
        (file_with({"a": entry(shape=(1,) * 17)}, bytes(8)), "'a': shape"),
        (file_with({"a": entry(shape=(1 << 61,) * 80_000)}, bytes(8)), "'a': shape"),
        (file_with(b'{"a": ' + b"1" * 5000 + b"}"), "no JSON text"),
        (file_with({"\ud800": entry()}, bytes(8)), "wanted 1 to 1024 printable ones"),
        (file_with({"a\0b": entry()}, bytes(8)), "wanted 1 to 1024 printable ones"),
        (file_with({"a": entry(end=True)}, bytes(8)), "'a': data_offsets"),
        (file_with({"a": entry(begin=8, end=0)}, bytes(8)), "'a': -8 bytes of data"),
        (file_with({"a": entry()}, bytes(7)), "truncated or padded"),
        (file_with({"a": entry()}, bytes(9)), "truncated or padded"),
        (file_with({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), "'b' overlaps"),
        (file_with({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)), "'b' leaves a gap"),
    ],
)
def test_refuses_hostile_headers(raw, message, tmp_path):
    with pytest.raises(CheckpointError, match="x.safetensors.*") as caught:
        header_of(raw, tmp_path)
    assert message in str(caught.value)


@given(position=st.integers(0, 300), byte=st.integers(0, 255), cut=st.integers(0, 5))
def test_accepts_nothing_that_the_library_refuses(position, byte, cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(save({"a": torch.zeros(4, 4), "b": torch.zeros(3, dtype=torch.int64)}))
    raw[position % len(raw)] = byte
    raw = bytes(raw[: len(raw) - cut])
    try:
        header_of(raw, folder)
    except CheckpointError:
        return
    try:
        with safe_open(folder / "x.safetensors", "pt") as file:
            assert set(file.keys())
    except SafetensorError as error:
        pytest.fail(f"we took what the library refuses: {error}")


LAYOUT = [
    ("codes", "U8", (3, 5)),
    ("scale", "BF16", (7,)),
    ("shape", "I64", (2,)),
    ("scalar", "I32", ()),
    ("none", "F32", (0, 2)),
]


def write_all(writer: SafetensorsWriter) -> dict[str, torch.Tensor]:
    tensors = {name: torch.ones(shape, dtype=DTYPES[dtype]) for name, dtype, shape in reversed(LAYOUT)}
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return tensors


def test_writes_what_the_library_reads_in_any_order(tmp_path):
    writer = SafetensorsWriter(tmp_path / "out.safetensors", LAYOUT)
    tensors = write_all(writer)
    assert not (tmp_path / "out.safetensors").exists()
    writer.close()
    loaded = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_a_single_number_may_have_any_stride(tmp_path):
    writer = SafetensorsWriter(tmp_path / "out.safetensors", [("a", "I32", (1, 1))])
    writer.write("a", torch.tensor([[7, 8, 9]], dtype=torch.int32).T[:1].reshape(1, 1).as_strided((1, 1), (1, 3)))
    writer.close()
    assert load_file(tmp_path / "out.safetensors")["a"].tolist() == [[7]]


def test_every_tensor_is_aligned_to_its_type():
    from hqq_core.safetensors_file import build_header

    _, entries = build_header(LAYOUT)
    assert all(found.begin % DTYPES[found.dtype].itemsize == 0 for found in entries.values())


def test_a_full_disk_is_told_before_the_work_and_leaves_nothing(tmp_path, full_disk):
    with full_disk(10_000), pytest.raises(StorageFullError, match="big.safetensors: no room left"):
        SafetensorsWriter(tmp_path / "big.safetensors", [("a", "U8", (20_000,))])
    assert os.listdir(tmp_path) == []


def test_discard_leaves_nothing(tmp_path):
    writer = SafetensorsWriter(tmp_path / "out.safetensors", LAYOUT)
    writer.discard()
    assert os.listdir(tmp_path) == []
