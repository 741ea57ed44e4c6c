"""Blocks of ggml's quantized types: what a row of codes, scales and offsets is in a GGUF file.

Layouts: ggml-common.h of ggml (block_q4_0 to block_q6_K, block_tq2_0). A row is its blocks one after another; all is
little-endian. Elements share a byte at a distance: byte j of a run holds elements j, j + width, j + 2 width and so on, the first
in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqq_core.errors import TensorError
from hqq_core.recipe import PRESETS, Preset
from hqq_core.spec import SUPER_BLOCK, TERNARY, QuantSpec
from hqq_core.tensors import QuantizedTensor, SuperBlocks

Bytes = NDArray[np.uint8]  # (n_blocks, bytes)
Part = Callable[[QuantizedTensor, Bytes], Bytes]  # one field of each block, from the tensor and its codes by blocks


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of ggml's types.

    Parameters
    ----------
    type_id : int
        ggml_type, as a GGUF file states it.
    block_size : int
        Weights of a block.
    nbytes : int
        Bytes of a block.
    settings : dict
        Fields of the QuantSpec whose result it holds exactly.
    parts : tuple
        What a block consists of, in order.
    """

    type_id: int
    block_size: int
    nbytes: int
    settings: dict[str, Any]
    parts: tuple[Part, ...] = field(repr=False)

    def spec(self, preset: Preset = "balanced") -> QuantSpec:
        """Settings to solve with."""
        iters, starts = PRESETS[preset]
        return QuantSpec(**self.settings, iters=iters, starts=starts)

    def row_nbytes(self, columns: int) -> int:
        """Bytes of a row of so many weights, a multiple of the block size."""
        return columns // self.block_size * self.nbytes


def pack(type_name: str, quantized: QuantizedTensor) -> Bytes:
    """Rows of blocks as a GGUF file stores them.

    Parameters
    ----------
    type_name : str
        One of BLOCK_TYPES.
    quantized : QuantizedTensor [shape=(..., columns)]
        Solved with the settings of that type.

    Returns
    -------
    ndarray [shape=(rows, bytes per row)], uint8

    Raises
    ------
    TensorError
        The tensor was solved with other settings, or its columns do not fill blocks.
    """
    kind, spec, columns = BLOCK_TYPES[type_name], quantized.spec, quantized.shape[-1]
    for name, wanted in kind.settings.items():
        if getattr(spec, name) != wanted:
            raise TensorError(type_name, f"{name} {getattr(spec, name)!r}: wanted {wanted!r} for blocks of {type_name}")
    if spec.axis != 1 or columns % kind.block_size:
        raise TensorError(
            type_name, f"shape {quantized.shape}, axis {spec.axis}: wanted rows of whole blocks of {kind.block_size}"
        )
    codes = quantized.W_q.numpy().reshape(-1, kind.block_size)
    blocks: Bytes = np.concatenate([part(quantized, codes) for part in kind.parts], axis=1)
    return blocks.reshape(-1, kind.row_nbytes(columns))


def _codes(nbits: int, width: int, drop: int = 0) -> Part:
    """`nbits` of each code above its lowest `drop`, in runs of `width` bytes."""

    def pack_codes(_: QuantizedTensor, codes: Bytes) -> Bytes:
        runs = codes.reshape(len(codes), -1, 8 // nbits, width)
        packed = np.zeros((len(codes), runs.shape[1], width), np.uint8)
        for i in range(8 // nbits):  # in turn: no copy of all codes
            packed |= (runs[:, :, i] >> drop & (1 << nbits) - 1) << i * nbits
        return packed.reshape(len(codes), -1)

    return pack_codes


def _signed_codes(_: QuantizedTensor, codes: Bytes) -> Bytes:
    """Codes of 8 bits as signed bytes around the middle, 128."""
    return codes ^ np.uint8(128)


def _scale(quantized: QuantizedTensor, codes: Bytes) -> Bytes:
    return _halves(quantized.scale.numpy(), len(codes))


def _offset(quantized: QuantizedTensor, codes: Bytes) -> Bytes:
    return _halves(quantized.offset.numpy(), len(codes))


def _d(quantized: QuantizedTensor, codes: Bytes) -> Bytes:
    return _halves(_super_blocks(quantized).d.numpy(), len(codes))


def _dmin(quantized: QuantizedTensor, codes: Bytes) -> Bytes:
    dmin = _super_blocks(quantized).dmin
    assert dmin is not None
    return _halves(dmin.numpy(), len(codes))


def _halves(numbers: NDArray[Any], n_blocks: int) -> Bytes:
    return np.ascontiguousarray(numbers.reshape(n_blocks, 1), "<f2").view(np.uint8)


def _super_blocks(quantized: QuantizedTensor) -> SuperBlocks:
    assert quantized.super_blocks is not None
    return quantized.super_blocks


def _integers(quantized: QuantizedTensor, n_blocks: int) -> tuple[Bytes, Bytes]:
    """Scales and mins as bytes."""
    stored = _super_blocks(quantized)
    assert stored.mins is not None
    return stored.scales.numpy().reshape(n_blocks, -1), stored.mins.numpy().reshape(n_blocks, -1)


def _scales_and_mins_4(quantized: QuantizedTensor, codes: Bytes) -> Bytes:
    """Q2_K: a byte for each group, the scale in its lower half."""
    scales, mins = _integers(quantized, len(codes))
    packed: Bytes = scales | mins << np.uint8(4)
    return packed


def _scales_and_mins_6(quantized: QuantizedTensor, codes: Bytes) -> Bytes:
    """Q4_K, Q5_K: 8 scales and 8 mins of 6 bits in 12 bytes; the upper bits of groups 4 to 7 lie above those of groups 0 to 3."""
    scales, mins = _integers(quantized, len(codes))
    first = [x[:, :4] | x[:, 4:] >> 4 << 6 for x in (scales, mins)]
    return np.concatenate([*first, scales[:, 4:] & 15 | mins[:, 4:] << 4], axis=1)


def _scales_6(quantized: QuantizedTensor, codes: Bytes) -> Bytes:
    """Q3_K: 16 scales of 6 bits, 32 added, in 12 bytes: lower four bits, then upper two."""
    scales = (_super_blocks(quantized).scales.numpy().reshape(len(codes), 16) + np.int8(32)).view(np.uint8)
    low = scales[:, :8] & 15 | scales[:, 8:] << 4
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce((scales >> 4).reshape(len(codes), 4, 4) << shifts, axis=1)
    return np.concatenate([low, high], axis=1)


def _scales_8(quantized: QuantizedTensor, codes: Bytes) -> Bytes:
    """Q6_K: 16 signed bytes."""
    scales: Bytes = _super_blocks(quantized).scales.numpy().reshape(len(codes), 16).view(np.uint8)
    return scales


def _simple(nbits: float, group_size: int, zero: str, *, signed: bool = False) -> dict[str, Any]:
    return {
        "nbits": nbits, "group_size": group_size, "zero": zero, "scale_dtype": "float16", "scale_bits": None, "signed": signed,
    }  # fmt: skip


def _super(nbits: int, group_size: int, zero: str, scale_bits: int) -> dict[str, Any]:
    return _simple(nbits, group_size, zero) | {"scale_bits": scale_bits}


BLOCK_TYPES = {
    "Q4_0": BlockType(2, 32, 18, _simple(4, 32, "none", signed=True), (_scale, _codes(4, 16))),
    "Q4_1": BlockType(3, 32, 20, _simple(4, 32, "offset"), (_scale, _offset, _codes(4, 16))),
    "Q5_0": BlockType(6, 32, 22, _simple(5, 32, "none", signed=True), (_scale, _codes(1, 1, 4), _codes(4, 16))),
    "Q5_1": BlockType(7, 32, 24, _simple(5, 32, "offset"), (_scale, _offset, _codes(1, 1, 4), _codes(4, 16))),
    "Q8_0": BlockType(8, 32, 34, _simple(8, 32, "none"), (_scale, _signed_codes)),
    "Q2_K": BlockType(
        10, SUPER_BLOCK, 84, _super(2, 16, "offset", 4), (_scales_and_mins_4, _codes(2, 32), _d, _dmin)
    ),
    "Q3_K": BlockType(
        11, SUPER_BLOCK, 110, _super(3, 16, "none", 6), (_codes(1, 32, 2), _codes(2, 32), _scales_6, _d)
    ),
    "Q4_K": BlockType(
        12, SUPER_BLOCK, 144, _super(4, 32, "offset", 6), (_d, _dmin, _scales_and_mins_6, _codes(4, 32))
    ),
    "Q5_K": BlockType(
        13, SUPER_BLOCK, 176, _super(5, 32, "offset", 6), (_d, _dmin, _scales_and_mins_6, _codes(1, 32, 4), _codes(4, 32))
    ),
    "Q6_K": BlockType(
        14, SUPER_BLOCK, 210, _super(6, 16, "none", 8), (_codes(4, 64), _codes(2, 32, 4), _scales_8, _d)
    ),
    "TQ2_0": BlockType(35, SUPER_BLOCK, 66, _simple(TERNARY, SUPER_BLOCK, "none"), (_codes(2, 32), _scale)),
}  # fmt: skip
