"""QuantizedTensor: codes, scale and zero of one tensor, and what they stand for."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from hqq_core.spec import QuantSpec

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class SuperBlocks:
    """Scales, and offsets, of groups as integers: those of `spec.SUPER_BLOCK` weights are multiples of one number each.

    The products are exact in float32.

    Parameters
    ----------
    d : Tensor [shape=(n_super_blocks,)], float16
        Unit of the scales.
    scales : Tensor [shape=(n_groups,)], uint8 beside offsets, else int8
        Integers of `spec.scale_bits`.
    dmin : Tensor [shape=(n_super_blocks,)], float16, or None
        Unit of the negated offsets, not negative; None with zero "none".
    mins : Tensor [shape=(n_groups,)], uint8, or None
        Integers of `spec.scale_bits`.
    """

    d: torch.Tensor
    scales: torch.Tensor
    dmin: torch.Tensor | None = None
    mins: torch.Tensor | None = None

    @property
    def scale(self) -> torch.Tensor:
        """Scale of each group: Tensor [shape=(n_groups, 1)], float32."""
        return _products(self.d, self.scales)

    @property
    def offset(self) -> torch.Tensor | None:
        """Offset of each group, none of them positive: Tensor [shape=(n_groups, 1)], float32, or None."""
        return None if self.dmin is None or self.mins is None else -_products(self.dmin, self.mins)


def _products(units: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    return (units.float()[:, None] * integers.view(len(units), -1).float()).view(-1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """One quantized weight: W ~ (W_q - zero) * scale by group along `spec.axis`.

    Parameters
    ----------
    W_q : Tensor [shape=(n_groups, group_size) for axis 1, (group_size, n_groups) for axis 0], uint8
        Codes in 0 .. 2 ** nbits - 1, grouped as `hqq` groups them.
    scale, zero : Tensor [shape=(n_groups, 1) for axis 1, (1, n_groups) for axis 0], spec.scale_dtype
        Step, and code of 0. With `spec.zero` "int" the zero is a whole number of 0 .. Q, with "none" `spec.middle`; with "offset"
        it is float32, and what `spec.scale_dtype` holds is `offset`. With `spec.scale_bits` both are float32, the scale that of
        `super_blocks`, and the zero is 0 where the scale is.
    shape : tuple of int
        Shape of the original W.
    dtype : torch.dtype
        Type of the original W, which a reader computes in.
    spec : QuantSpec
    squared_error, squared_norm : float
        ||W - dequantized||^2 and ||W||^2, from the float32 residuals of the solve.
    super_blocks : SuperBlocks or None
        What is stored in place of scale and offset, with `spec.scale_bits`.
    """

    W_q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: QuantSpec
    squared_error: float
    squared_norm: float
    super_blocks: SuperBlocks | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W as a reader sees it: (W_q - zero) * scale, or W_q * scale + offset, in the arithmetic of `dtype` (default: W's).

        Examples
        --------
        >>> from hqq_core import QuantSpec, quantize
        >>> quantize(torch.ones(2, 64), QuantSpec()).dequantize().unique().tolist()
        [1.0]
        """
        dtype = dtype or self.dtype
        if self.spec.zero == "offset":
            W_r = self.W_q.to(dtype) * self.scale.to(dtype) + self.offset.to(dtype)
        else:
            W_r = (self.W_q.to(dtype) - self.zero.to(dtype)) * self.scale.to(dtype)
        return W_r.reshape(self.shape)

    @property
    def offset(self) -> torch.Tensor:
        """-zero * scale, what code 0 stands for, as `spec.scale_dtype`: with zero "offset" the one that was solved for."""
        if self.super_blocks is not None and (offset := self.super_blocks.offset) is not None:
            return offset
        return (-self.zero.float() * self.scale.float()).to(self.scale.dtype)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def digest(self) -> str:
        """Hex SHA-256 of what was solved, whatever the format: what a reader of the written file must find again.

        Over the codes in the order of W, a byte each; then the scales, then the zeros (with zero "offset" the offsets), in the
        order of the groups, as little-endian float32.
        """
        shift = self.offset if self.spec.zero == "offset" else self.zero
        digest = hashlib.sha256(self.W_q.contiguous().numpy().data)
        for part in (self.scale, shift):
            digest.update(part.float().contiguous().numpy().astype("<f4", copy=False).data)
        return digest.hexdigest()
