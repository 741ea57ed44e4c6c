"""quantize(): one weight in, codes, scale and zero out. Checks, grouping and the choice of back-end live here."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from hqq_core.errors import SpecError, TensorError
from hqq_core.solver import _cpu, _reference, _superblocks
from hqq_core.solver._factors import Factors
from hqq_core.spec import SUPER_BLOCK, QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor, SuperBlocks

SOLVABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    W: torch.Tensor,
    spec: QuantSpec,
    *,
    energy: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    correlation: torch.Tensor | None = None,
    name: str = "W",
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    device: torch.device | str = "cpu",
) -> QuantizedTensor:
    """Quantize one weight without data.

    Parameters
    ----------
    W : Tensor [shape=(..., in_features)], float32, float16 or bfloat16
        On the CPU. For axis 1 its last size, for axis 0 its first, must be a multiple of the group size.
    spec : QuantSpec
    energy : Tensor [shape=(in_features,) or W.shape[:-2] + (in_features,)], float32, optional
        Mean square of what each input column is multiplied with, none negative: the weight of its squared errors. Default: all
        alike. With axis 0 a group lies in one input column, and so it makes no difference.
    columns, rows : Tensor [shape=(in_features,) and (out_features,)], float32, optional
        Positive factors: what is solved, along axis 1, is W times both, in float32, for a model that divides by them elsewhere.
        `energy` is that of the columns as they are solved.
    correlation : Tensor [shape=(in_features, in_features)], int8, optional
        Correlations of the input columns times 127, symmetric; the diagonal is not read, but taken as 1. What was solved is then
        refined by a share of them: see `solver/_refine.py`. For a matrix with energies, axis 1 and lp_norm 2.
    name : str
        What errors call the tensor.
    threads : int, optional
        Solver threads; default: one per core. The answer does not depend on it.
    progress : callable, optional
        Gets the number of weights of each finished tile, and 0 for each refined one; what it raises stops the work.
    device : torch.device or str
        Where the solve runs: "cpu", or a CUDA device, to which W is streamed; the result is on the CPU. Scales within
        super-blocks and signed ones are solved on the CPU whatever it says.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    SpecError
        The group size does not divide the shape.
    TensorError
        NaN or infinite weights, counted; weights that overflow their dtype when rounded; a dtype that is not solved; energies
        that do not fit, or are none; correlations that do not fit, or cannot be used.

    Examples
    --------
    >>> quantize(torch.randn(4, 128), QuantSpec(nbits=4, group_size=64)).W_q.shape
    torch.Size([8, 64])
    """
    if W.dtype not in SOLVABLE_DTYPES:
        raise TensorError(name, f"dtype {W.dtype}: wanted one of {', '.join(map(str, SOLVABLE_DTYPES))}")
    group_size = resolve_group_size(tuple(W.shape), spec)
    shared = SUPER_BLOCK if spec.scale_bits else group_size  # by so many columns energies are compared
    weights = None if energy is None else _group_energy(energy, W, shared, spec.axis, name)
    factors = None if columns is None and rows is None else Factors.of(columns, rows, W, spec.axis, name)
    if correlation is not None:
        _check_correlation(correlation, W, spec, energy, name)
    on = torch.device(device)
    super_blocks = None
    if spec.scale_bits:
        codes, super_blocks, squared_error, squared_norm = _superblocks.solve(
            W, spec, weights, factors, threads, progress
        )
        scale, zero = _parameters(super_blocks, spec)
    elif on.type == "cpu" or spec.signed:
        codes, scale, zero, squared_error, squared_norm = _cpu.solve(
            W, spec, weights, factors, group_size, threads, progress
        )
    else:
        codes, scale, zero, squared_error, squared_norm = _solve_on_gpu(
            W, spec, weights, factors, group_size, on, progress
        )
    if math.isnan(squared_norm):
        nan, infinite = int(W.isnan().sum()), int(W.isinf().sum())
        if not nan + infinite:
            raise TensorError(name, f"weights up to {W.abs().max():g} times their factors overflow float32")
        raise TensorError(name, f"{nan} NaN and {infinite} infinite among {W.numel()} weights: wanted finite ones only")
    stored, column = (
        TORCH_DTYPES["float32" if spec.scale_bits else spec.scale_dtype],
        (-1, 1) if spec.axis == 1 else (1, -1),
    )
    zero = zero if spec.zero == "offset" else zero.to(stored)
    quantized = QuantizedTensor(
        W_q=codes,
        scale=scale.to(stored).view(column),
        zero=zero.view(column),
        shape=tuple(W.shape),
        dtype=W.dtype,
        spec=spec,
        squared_error=squared_error,
        squared_norm=squared_norm,
        super_blocks=super_blocks,
    )
    limit = torch.finfo(W.dtype).max
    large = squared_norm > (limit / 4) ** 2  # only then may a weight overflow
    # Where it may, no weight is moved further.
    if (
        correlation is not None
        and energy is not None
        and not (large and quantized.dequantize().abs().max() > limit / 4)
    ):
        return _cpu.refine(quantized, W, energy, factors, correlation, threads, progress)
    if large and not quantized.dequantize().isfinite().all():
        raise TensorError(
            name, f"weights up to {W.abs().max():g} leave {W.dtype} (up to {limit:g}) no room for rounding"
        )
    return quantized


def _solve_on_gpu(
    W: torch.Tensor,
    spec: QuantSpec,
    weights: NDArray[np.float32] | None,
    factors: Factors | None,
    group_size: int,
    device: torch.device,
    progress: Callable[[int], None] | None,
) -> _cpu.Solved:
    """Pieces of W through two streams of one device."""
    from hqq_core.solver import _triton  # here, so that importing the library loads no triton

    if group_size > _triton.MAX_GROUP_SIZE:
        raise SpecError(
            "group_size", f"group_size {group_size}: a GPU solves groups of at most {_triton.MAX_GROUP_SIZE}"
        )
    matrix = W.reshape(-1, group_size) if spec.axis == 1 else W.reshape(group_size, -1)
    energy = None if weights is None else torch.from_numpy(weights)
    solved = _triton.solve_streamed(matrix, spec, device, energy, factors, progress=progress)
    return solved.codes, solved.scale, solved.zero, *solved.sums()


def _check_correlation(
    correlation: torch.Tensor, W: torch.Tensor, spec: QuantSpec, energy: torch.Tensor | None, name: str
) -> None:
    """A TensorError where correlations do not fit W, or are of no use to what is solved."""
    if W.ndim != 2 or spec.axis != 1:
        raise TensorError(
            name, f"correlation for weights of shape {tuple(W.shape)}, axis {spec.axis}: wanted a matrix, axis 1"
        )
    if spec.lp_norm != 2:
        raise TensorError(name, f"correlation with lp_norm {spec.lp_norm:g}: wanted 2, whose objective it is part of")
    if energy is None:
        raise TensorError(name, "correlation without energy: wanted both")
    n = W.shape[1]
    if tuple(correlation.shape) != (n, n) or correlation.dtype != torch.int8:
        raise TensorError(
            name, f"correlation of shape {tuple(correlation.shape)}, {correlation.dtype}: wanted {(n, n)}, torch.int8"
        )


def resolve_group_size(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Weights per group for this shape; a SpecError where the group size does not divide it."""
    if len(shape) < 2 or 0 in shape:
        raise SpecError("group_size", f"shape {shape}: wanted two or more sizes, none of them zero")
    size = shape[-1] if spec.axis == 1 else shape[0]
    group_size = spec.group_size or size
    if size % group_size:
        raise SpecError("group_size", f"group_size {group_size} does not divide {size} (axis {spec.axis} of {shape})")
    if spec.scale_bits and size % SUPER_BLOCK:
        raise SpecError(
            "scale_bits", f"super-blocks of {SUPER_BLOCK} do not divide {size} (axis {spec.axis} of {shape})"
        )
    return group_size


def _parameters(super_blocks: SuperBlocks, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each group, float32; the zero is 0 where the scale is."""
    scale, offset = super_blocks.scale, super_blocks.offset
    if offset is None:
        return scale, torch.full_like(scale, spec.middle)
    return scale, torch.where(scale > 0, -offset / scale, torch.zeros_like(scale))


def _group_energy(
    energy: torch.Tensor, W: torch.Tensor, group_size: int, axis: int, name: str
) -> NDArray[np.float32] | None:
    """Energies as (n_blocks, groups per row, group_size), each group scaled as `_reference.normalize_energy` does."""
    if tuple(energy.shape) not in ((W.shape[-1],), (*W.shape[:-2], W.shape[-1])):
        raise TensorError(name, f"energy of shape {tuple(energy.shape)} for weights of shape {tuple(W.shape)}")
    if not energy.is_floating_point():
        raise TensorError(name, f"energy of dtype {energy.dtype}: wanted float32")
    bad = int((~(energy.isfinite() & (energy >= 0))).sum())
    if bad:
        raise TensorError(name, f"{bad} of {energy.numel()} energies are negative, NaN or infinite")
    if axis == 0:
        return None
    H = energy.detach().double().numpy().reshape(-1, W.shape[-1] // group_size, group_size)
    return _reference.normalize_energy(H).astype(np.float32)
