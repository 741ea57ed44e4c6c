"""Blocks of ggml's types against two readers: the gguf package, and one written here from the layouts' description."""

import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqq_core import QuantSpec, quantize
from hqq_core.errors import TensorError
from hqq_core.formats.gguf.blocks import BLOCK_TYPES, pack
from hqq_core.spec import SUPER_BLOCK
from hqq_core.tensors import QuantizedTensor, SuperBlocks

TYPES = sorted(BLOCK_TYPES)


def read(name: str, packed: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one.astype(np.float32).view(np.uint32), other.astype(np.float32).view(np.uint32))


def anything(name: str, rows: int, n_blocks: int, seed: int) -> QuantizedTensor:
    """Codes, scales and offsets of a type drawn from all that there are."""
    rng, kind = np.random.default_rng(seed), BLOCK_TYPES[name]
    spec, shape = kind.spec(), (rows, n_blocks * kind.block_size)
    n_groups = rows * shape[1] // spec.group_size
    codes = torch.from_numpy(rng.integers(0, spec.levels, (n_groups, spec.group_size), np.uint8))

    def halves(n: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(n).astype(np.float16))

    if spec.scale_bits is None:
        scale, offset = halves(n_groups).view(-1, 1), halves(n_groups).view(-1, 1)
        zero = torch.full_like(scale, spec.middle) if spec.zero == "none" else -offset.float() / scale.float()
        return QuantizedTensor(codes, scale, zero, shape, torch.float32, spec, 0.0, 0.0)
    n_super, levels = rows * shape[1] // SUPER_BLOCK, 1 << spec.scale_bits
    if spec.zero == "none":
        integers = rng.integers(-levels // 2, levels // 2, n_groups).astype(np.int8)
        blocks = SuperBlocks(halves(n_super), torch.from_numpy(integers))
    else:
        scales, mins = (torch.from_numpy(rng.integers(0, levels, n_groups).astype(np.uint8)) for _ in range(2))
        blocks = SuperBlocks(halves(n_super), scales, halves(n_super).abs(), mins)
    zero = torch.full((n_groups, 1), spec.middle)
    return QuantizedTensor(codes, blocks.scale, zero, shape, torch.float32, spec, 0.0, 0.0, blocks)


def described(name: str, packed: np.ndarray) -> np.ndarray:
    """Weight by weight, from ggml-common.h and the comments in it."""
    kind = BLOCK_TYPES[name]
    blocks = packed.reshape(-1, kind.nbytes)
    weights = [[weight(name, block, i) for i in range(kind.block_size)] for block in blocks]
    return np.array(weights, np.float32).reshape(len(packed), -1)


def weight(name: str, block: np.ndarray, i: int) -> np.float32:
    def half(at: int) -> np.float32:
        return np.float32(block[at : at + 2].view("<f2")[0])

    def bits(at: int, nbits: int, width: int) -> int:
        """Field i of `nbits`, where a run of `width` bytes holds 8 // nbits elements in each."""
        run, inside = divmod(i, width * 8 // nbits)
        plane, byte = divmod(inside, width)
        return int(block[at + run * width + byte]) >> plane * nbits & (1 << nbits) - 1

    f32 = np.float32
    match name:
        case "Q4_0":
            return half(0) * f32(bits(2, 4, 16) - 8)
        case "Q4_1":
            return half(0) * f32(bits(4, 4, 16)) + half(2)
        case "Q5_0":
            return half(0) * f32(bits(6, 4, 16) + 16 * (int(block[2 + i // 8]) >> i % 8 & 1) - 16)
        case "Q5_1":
            return half(0) * f32(bits(8, 4, 16) + 16 * (int(block[4 + i // 8]) >> i % 8 & 1)) + half(2)
        case "Q8_0":
            return half(0) * f32(block[2 + i].view(np.int8))
        case "Q2_K":
            scale, low = int(block[i // 16]) & 15, int(block[i // 16]) >> 4
            return half(80) * f32(scale) * f32(bits(16, 2, 32)) - half(82) * f32(low)
        case "Q3_K":
            group = i // 16
            scale = int(block[96 + group % 8]) >> 4 * (group // 8) & 15
            scale += 16 * (int(block[104 + group % 4]) >> 2 * (group // 4) & 3)
            return half(108) * f32(scale - 32) * f32(bits(32, 2, 32) + 4 * bits(0, 1, 32) - 4)
        case "Q4_K" | "Q5_K":
            group = i // 32
            if group < 4:
                scale, low = int(block[4 + group]) & 63, int(block[8 + group]) & 63
            else:
                scale = (int(block[8 + group]) & 15) + 16 * (int(block[group]) >> 6)
                low = (int(block[8 + group]) >> 4) + 16 * (int(block[4 + group]) >> 6)
            q = bits(16, 4, 32) if name == "Q4_K" else bits(48, 4, 32) + 16 * bits(16, 1, 32)
            return half(0) * f32(scale) * f32(q) - half(2) * f32(low)
        case "Q6_K":
            return (
                half(208) * f32(block[192 + i // 16].view(np.int8)) * f32(bits(0, 4, 64) + 16 * bits(128, 2, 32) - 32)
            )
        case "TQ2_0":
            return half(64) * f32(bits(0, 2, 32) - 1)
    raise AssertionError(name)


@pytest.mark.parametrize("name", TYPES)
def test_the_table_says_what_the_gguf_package_says(name):
    kind, number = BLOCK_TYPES[name], gguf.GGMLQuantizationType[name]
    assert kind.type_id == number
    assert (kind.block_size, kind.nbytes) == gguf.GGML_QUANT_SIZES[number]
    assert {field: getattr(kind.spec("best"), field) for field in kind.settings} == kind.settings


@given(name=st.sampled_from(TYPES), rows=st.integers(1, 5), n_blocks=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_any_codes_are_read_back_bit_for_bit(name, rows, n_blocks, seed):
    tensor = anything(name, rows, n_blocks, seed)
    if tensor.spec.zero == "offset" and tensor.super_blocks is None:
        tensor.zero[tensor.scale == 0] = 0.0
    packed = pack(name, tensor)
    assert packed.shape == (rows, BLOCK_TYPES[name].row_nbytes(tensor.shape[1]))
    if tensor.super_blocks is not None:  # all is stored, none derived
        assert same_bits(read(name, packed), tensor.dequantize(torch.float32).numpy())
    assert same_bits(read(name, packed), described(name, packed))


@given(
    name=st.sampled_from(TYPES), rows=st.sampled_from([1, 2, 3, 33]), n_blocks=st.integers(1, 2), seed=st.integers(0, 1000),
    exponent=st.integers(-9, 3), kind=st.sampled_from(["gaussian", "positive", "zero", "constant", "one", "mixed"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_what_was_solved_is_read_back_bit_for_bit(name, rows, n_blocks, seed, exponent, kind, dtype):
    W = weights(rows, n_blocks * BLOCK_TYPES[name].block_size, seed, 10.0**exponent, kind).to(dtype)
    tensor = quantize(W, BLOCK_TYPES[name].spec("fast"))
    packed = pack(name, tensor)
    assert same_bits(read(name, packed), tensor.dequantize(torch.float32).numpy())
    error = (W.double() - torch.from_numpy(read(name, packed)).double()).square().sum().item()
    assert tensor.squared_error == pytest.approx(error, rel=1e-3, abs=1e-9 * tensor.squared_norm)


def weights(rows: int, columns: int, seed: int, scale: float, kind: str) -> torch.Tensor:
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    match kind:
        case "positive":
            return W.abs() + scale
        case "zero":
            return W * 0
        case "constant":
            return torch.full_like(W, scale if seed % 2 else -scale)
        case "one":
            return torch.zeros_like(W).index_fill_(1, torch.tensor([seed % columns]), scale)
        case "mixed":  # a zero block beside one of any size
            W[:, : columns // 2] = 0
    return W


def test_weights_beyond_float16_are_stored_as_the_largest_there_is():
    W = torch.full((2, 256), 1e30)
    for name in ("Q4_K", "Q6_K"):
        tensor = quantize(W, BLOCK_TYPES[name].spec())
        assert same_bits(read(name, pack(name, tensor)), tensor.dequantize().numpy())
        assert tensor.super_blocks.d.max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_a_tensor_of_other_settings_is_refused_by_name(name):
    tensor = quantize(torch.randn(2, 256), QuantSpec(nbits=4, group_size=32, zero="float"))
    with pytest.raises(TensorError, match=f"{name}: zero 'float': wanted"):
        pack(name, tensor)


def test_rows_that_do_not_fill_blocks_are_refused():
    tensor = quantize(torch.randn(2, 128), QuantSpec(nbits=1.58, group_size=None, zero="none"))
    with pytest.raises(TensorError, match="group_size None: wanted 256"):
        pack("TQ2_0", tensor)


@pytest.mark.parametrize("name", TYPES)
def test_packing_takes_the_result_twice_and_a_copy_of_the_codes(name):
    """An embedding has codes by the gigabyte."""
    quantized = anything(name, 256, 1024 // BLOCK_TYPES[name].block_size, 0)
    tracemalloc.start()
    packed = pack(name, quantized)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * packed.nbytes + quantized.numel + 50_000
