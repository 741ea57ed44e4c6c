"""Each format's layout as its description has it, bit by bit in numpy: what judges the packing, for any shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hqq_core import QuantSpec

Stored = dict[str, torch.Tensor]  # of one module, by the last part of the name


@dataclass(frozen=True)
class Decoded:
    """What was stored: in the order of the grouped matrix, flat; zero is the offset where that is stored."""

    codes: np.ndarray
    scale: torch.Tensor
    zero: np.ndarray | torch.Tensor


def bits(words: torch.Tensor) -> np.ndarray:
    """Rows of words as rows of bits, lowest bit first."""
    rows = np.ascontiguousarray(words.numpy())
    return np.unpackbits(rows.view(np.uint8), axis=-1, bitorder="little")


def numbers(bits: np.ndarray, nbits: int, n: int) -> np.ndarray:
    """The first n numbers of each row of a dense bit stream; what is left must be unused."""
    assert not bits[..., n * nbits :].any()
    return bits[..., : n * nbits].reshape(*bits.shape[:-1], n, nbits) @ (1 << np.arange(nbits))


def compressed_tensors(stored: Stored, spec: QuantSpec, shape: tuple[int, int]) -> Decoded:
    assert stored["weight_shape"].tolist() == list(shape)
    codes = numbers(bits(stored["weight_packed"]), spec.code_bits, shape[1])
    if spec.zero == "none":
        assert "weight_zero_point" not in stored
        return Decoded(codes, stored["weight_scale"], np.full(stored["weight_scale"].shape, spec.middle))
    zero = numbers(bits(stored["weight_zero_point"].T), spec.code_bits, shape[0]).T
    return Decoded(codes, stored["weight_scale"], zero)


def mlx(stored: Stored, spec: QuantSpec, shape: tuple[int, int], offsets: str = "biases") -> Decoded:
    codes = numbers(bits(stored["weight"].view(torch.int32)), spec.code_bits, shape[1])
    return Decoded(codes, stored["scales"], stored[offsets])


def metal(stored: Stored, spec: QuantSpec, shape: tuple[int, int]) -> Decoded:
    return mlx(stored, spec, shape, "qbiases")


def awq(stored: Stored, spec: QuantSpec, shape: tuple[int, int]) -> Decoded:
    lies_at = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of outputs 0, 1, ... of a word, in fours of bits

    def outputs(words: torch.Tensor) -> np.ndarray:
        fours = numbers(bits(words), 4, shape[0])
        return fours.reshape(len(fours), -1, 8)[..., lies_at].reshape(len(fours), -1).T

    return Decoded(outputs(stored["qweight"]), stored["scales"].T, outputs(stored["qzeros"]))


def gptq(stored: Stored, spec: QuantSpec, shape: tuple[int, int]) -> Decoded:
    group_size = shape[1] // len(stored["scales"])
    assert stored["g_idx"].tolist() == [i // group_size for i in range(shape[1])]
    codes = numbers(bits(stored["qweight"].T), spec.code_bits, shape[1])
    zero = numbers(bits(stored["qzeros"]), spec.code_bits, shape[0]).T + 1
    return Decoded(codes, stored["scales"].T, zero)


def hqq(stored: Stored, spec: QuantSpec, shape: tuple[int, int]) -> Decoded:
    """Blocks of rows share words, the first in the highest bits; five and six bits have bytes of their own."""
    assert tuple(stored["shape"].tolist()) == shape
    per_word, width = {8: (1, 8), 6: (1, 8), 5: (1, 8), 4: (2, 4), 3: (10, 3), 2: (4, 2), 1: (8, 1)}[spec.code_bits]
    words = stored["W_q"].numpy().astype(np.int64)
    blocks = [words >> width * (per_word - 1 - i) & (1 << width) - 1 for i in range(per_word)]
    n_rows = shape[0] * shape[1] // words.shape[1]
    codes = np.concatenate(blocks)
    assert not codes[n_rows:].any()
    return Decoded(codes[:n_rows], stored["scale"], stored["zero"])


def bitnet(stored: Stored, spec: QuantSpec, shape: tuple[int, int]) -> Decoded:
    """Quarters of the rows share bytes, the first in the lowest bits; one scale."""
    packed = stored["weight"].numpy()
    codes = np.concatenate([packed // 4**i % 4 for i in range(4)])
    scale = stored["weight_scale"].expand(shape[0], 1)
    return Decoded(codes, scale, np.full(scale.shape, 1))


def humming(stored: Stored, spec: QuantSpec, shape: tuple[int, int]) -> Decoded:
    codes = numbers(bits(stored["weight"]), spec.code_bits, shape[1])
    return Decoded(codes, stored["weight_scale"], stored["zero_point"])


LAYOUTS = {
    "compressed-tensors": compressed_tensors,
    "hqq": hqq,
    "mlx": mlx,
    "awq": awq,
    "gptq": gptq,
    "metal": metal,
    "bitnet": bitnet,
    "humming": humming,
}
