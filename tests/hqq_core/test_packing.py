"""Packing is checked against a bit-stream oracle in numpy and against the hqq library."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqq_core.packing import STRIDED_PER_WORD, pack_dense, pack_strided, unpack_dense, unpack_strided
from tests.oracles import hqq

SIZES = st.one_of(st.sampled_from([1, 7, 31, 32, 33, 65]), st.integers(1, 200))


def codes(rows: int, columns: int, nbits: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << nbits, (rows, columns), dtype=np.uint8))


def bit_stream(values: np.ndarray, nbits: int) -> np.ndarray:
    """Element i at bit i * nbits, lowest bit first, cut into little-endian 32-bit words."""
    bits = (values[:, None] >> np.arange(nbits) & 1).astype(np.uint8).reshape(-1)
    bits = np.pad(bits, (0, -len(bits) % 32))
    return np.packbits(bits, bitorder="little").view("<i4")


@given(nbits=st.integers(1, 8), rows=SIZES, columns=SIZES, seed=st.integers(0, 9))
def test_dense_equals_the_bit_stream_and_returns(nbits, rows, columns, seed):
    q = codes(rows, columns, nbits, seed)
    packed = pack_dense(q, nbits)
    assert packed.dtype == torch.int32
    np.testing.assert_array_equal(packed.numpy(), np.stack([bit_stream(row, nbits) for row in q.numpy()]))
    assert torch.equal(unpack_dense(packed, nbits, columns), q)


@given(nbits=st.sampled_from(sorted(STRIDED_PER_WORD)), words=st.integers(1, 40), columns=SIZES, seed=st.integers(0, 9))
def test_strided_returns_what_was_packed(nbits, words, columns, seed):
    q = codes(words * STRIDED_PER_WORD[nbits], columns, nbits, seed)
    assert torch.equal(unpack_strided(pack_strided(q, nbits), nbits, len(q)), q)


@pytest.mark.parametrize("rows", [1, 7, 64, 65])
def test_strided_pads_three_bits_to_whole_words(rows):
    q = codes(rows, 16, 3, 0)
    packed = pack_strided(q, 3)
    assert packed.shape == (-(-rows // 10), 16)
    assert torch.equal(unpack_strided(packed, 3, rows), q)


@pytest.mark.parametrize("nbits", sorted(STRIDED_PER_WORD))
def test_strided_equals_the_hqq_library(nbits):
    q = codes(120, 24, nbits, 1)
    quantizer = hqq("core.quantize").Quantizer
    packing = quantizer.bit_to_packing[nbits]
    packed = pack_strided(q, nbits)
    expected = quantizer.pack[packing](q)
    assert torch.equal(packed, expected)
    assert packed.dtype == expected.dtype
