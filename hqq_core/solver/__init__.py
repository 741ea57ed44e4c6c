"""quantize(): one weight in, codes, scale and zero out. Checks, grouping and the choice of back-end live here."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hqq_core.errors import SpecError, TensorError
from hqq_core.solver import _reference
from hqq_core.solver._precision import STORED_TYPES
from hqq_core.solver._starts import starts, trial_iters
from hqq_core.spec import QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor

# Weights of a tile: small weights share the cores all the same, and what each call costs does not show in large ones.
MIN_TILE_NUMEL, MAX_TILE_NUMEL, N_TILES = 1 << 16, 1 << 19, 64
MIN_ROWS = 32  # the lanes of a kernel's block, which share a column of energies
REFINED_ROWS = 32  # that share a read of the correlations
SOLVABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """What one thread solves at a time: rows, and columns of whole groups."""

    rows: slice
    columns: slice

    @property
    def n_columns(self) -> int:
        """Weights per row."""
        return int(self.columns.stop - self.columns.start)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(self.rows.stop - self.rows.start) * self.n_columns


class _Factors(NamedTuple):
    """Of columns and rows, all positive."""

    columns: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(
        cls, columns: torch.Tensor | None, rows: torch.Tensor | None, W: torch.Tensor, axis: int, name: str
    ) -> _Factors:
        """Ones where there are none; a TensorError where they do not fit W."""
        if W.ndim != 2 or axis != 1:
            raise TensorError(
                name, f"factors for weights of shape {tuple(W.shape)}, axis {axis}: wanted a matrix, axis 1"
            )
        found = [
            torch.ones(n) if factors is None else factors.float()
            for n, factors in zip((W.shape[1], W.shape[0]), (columns, rows), strict=True)
        ]
        for n, factors in zip((W.shape[1], W.shape[0]), found, strict=True):
            if factors.shape != (n,) or not (factors.isfinite() & (factors > 0)).all():
                raise TensorError(name, f"factors of shape {tuple(factors.shape)}: wanted {n} positive ones")
        return cls(*found)


Solved = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, float, float
]  # codes, scale, zero, squared error, squared norm


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
        Where the solve runs: "cpu", or a CUDA device, to which W is streamed; the result is on the CPU.

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
    weights = None if energy is None else _group_energy(energy, W, group_size, spec.axis, name)
    factors = None if columns is None and rows is None else _Factors.of(columns, rows, W, spec.axis, name)
    if correlation is not None:
        _check_correlation(correlation, W, spec, energy, name)
    on = torch.device(device)
    if on.type == "cpu":
        solved = _solve_on_cpu(W, spec, weights, factors, group_size, threads, progress)
    else:
        solved = _solve_on_gpu(W, spec, weights, factors, group_size, on, progress)
    codes, scale, zero, squared_error, squared_norm = solved
    if math.isnan(squared_norm):
        nan, infinite = int(W.isnan().sum()), int(W.isinf().sum())
        if not nan + infinite:
            raise TensorError(name, f"weights up to {W.abs().max():g} times their factors overflow float32")
        raise TensorError(name, f"{nan} NaN and {infinite} infinite among {W.numel()} weights: wanted finite ones only")
    stored, column = TORCH_DTYPES[spec.scale_dtype], (-1, 1) if spec.axis == 1 else (1, -1)
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
    )
    limit = torch.finfo(W.dtype).max
    large = squared_norm > (limit / 4) ** 2  # only then may a weight overflow
    # Where it may, no weight is moved further.
    if (
        correlation is not None
        and energy is not None
        and not (large and quantized.dequantize().abs().max() > limit / 4)
    ):
        return _refined(quantized, W, energy, factors, correlation, threads, progress)
    if large and not quantized.dequantize().isfinite().all():
        raise TensorError(
            name, f"weights up to {W.abs().max():g} leave {W.dtype} (up to {limit:g}) no room for rounding"
        )
    return quantized


def _solve_on_cpu(
    W: torch.Tensor,
    spec: QuantSpec,
    weights: NDArray[np.float32] | None,
    factors: _Factors | None,
    group_size: int,
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> Solved:
    """Tiles on a few threads."""
    weighted = weights is not None
    rows = _as_rows(W, group_size, spec.axis, whole=weighted or factors is not None)
    n_rows, n_columns = rows.shape
    if weights is None:
        weights = np.ones((1, n_columns // group_size, group_size), np.float32)
    columns_by, rows_by = factors or _Factors(torch.ones(n_columns), torch.ones(n_rows))
    rows_per_block = n_rows // len(weights)
    n_groups = W.numel() // group_size
    codes = torch.empty((n_groups, group_size) if spec.axis == 1 else (group_size, n_groups), dtype=torch.uint8)
    scale, zero = (np.empty((n_rows, n_columns // group_size), np.float32) for _ in range(2))
    out = codes.numpy().reshape(n_rows, n_columns) if spec.axis == 1 else codes.numpy().T

    def solve(at: Tile) -> tuple[float, float]:
        groups = slice(at.columns.start // group_size, at.columns.stop // group_size)
        own = weights[at.rows.start // rows_per_block, groups]
        outputs = out[at.rows, at.columns], scale[at.rows, groups], zero[at.rows, groups]
        return _solve_tile(
            rows[at.rows, at.columns], columns_by[at.columns], rows_by[at.rows], own, weighted, spec, *outputs
        )

    errors = _run(solve, list(_tiles(n_rows, n_columns, group_size, rows_per_block)), threads, progress)
    squared_error, squared_norm = (math.fsum(sums) for sums in zip(*errors, strict=True))
    return codes, torch.from_numpy(scale), torch.from_numpy(zero), squared_error, squared_norm


def _solve_on_gpu(
    W: torch.Tensor,
    spec: QuantSpec,
    weights: NDArray[np.float32] | None,
    factors: _Factors | None,
    group_size: int,
    device: torch.device,
    progress: Callable[[int], None] | None,
) -> Solved:
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


def _refined(
    solved: QuantizedTensor,
    W: torch.Tensor,
    energy: torch.Tensor,
    factors: _Factors | None,
    correlation: torch.Tensor,
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> QuantizedTensor:
    """What was solved, refined by blocks of rows on a few threads; its codes are overwritten."""
    H = energy.detach().double().numpy()
    mean = H.mean()
    if not mean > 0:
        return solved
    n_rows, n_columns = W.shape
    roots, C = np.sqrt(H / mean).astype(np.float32), correlation.detach().contiguous().numpy()
    columns_by, rows_by = factors or _Factors(torch.ones(n_columns), torch.ones(n_rows))
    codes = solved.W_q.numpy().reshape(n_rows, n_columns)
    scale, zero = (stored.float().clone().numpy().reshape(n_rows, -1) for stored in (solved.scale, solved.zero))

    def refine(at: Tile) -> tuple[float, float]:
        outputs = codes[at.rows], scale[at.rows], zero[at.rows]
        return _refine_tile(W[at.rows], columns_by, rows_by[at.rows], roots, C, solved.spec, *outputs), 0.0

    first = range(0, n_rows, REFINED_ROWS)
    tiles = [Tile(slice(row, min(row + REFINED_ROWS, n_rows)), slice(0, n_columns)) for row in first]
    errors = _run(refine, tiles, threads, (lambda _: progress(0)) if progress else None)  # all were counted when solved
    return dataclasses.replace(
        solved,
        scale=torch.from_numpy(scale).view(-1, 1).to(solved.scale.dtype),
        zero=torch.from_numpy(zero).view(-1, 1).to(solved.zero.dtype),
        squared_error=math.fsum(error for error, _ in errors),
    )


def resolve_group_size(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Weights per group for this shape; a SpecError where the group size does not divide it."""
    if len(shape) < 2 or 0 in shape:
        raise SpecError("group_size", f"shape {shape}: wanted two or more sizes, none of them zero")
    size = shape[-1] if spec.axis == 1 else shape[0]
    group_size = spec.group_size or size
    if size % group_size:
        raise SpecError("group_size", f"group_size {group_size} does not divide {size} (axis {spec.axis} of {shape})")
    return group_size


def _as_rows(W: torch.Tensor, group_size: int, axis: int, *, whole: bool) -> torch.Tensor:
    """W as rows of whole groups: one group each, or a `whole` output's where groups of a column share energies or factors."""
    if axis == 0:
        return W.reshape(group_size, -1).T  # strided
    return W.reshape(-1, W.shape[-1] if whole else group_size)


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


def _tiles(n_rows: int, n_columns: int, group_size: int, rows_per_block: int) -> Iterator[Tile]:
    """Cut rows into about N_TILES, at whole groups and whole lanes, none across two blocks."""
    numel = min(max(n_rows * n_columns // N_TILES, MIN_TILE_NUMEL), MAX_TILE_NUMEL)
    width = min(n_columns, max(1, numel // (MIN_ROWS * group_size)) * group_size)
    height = max(1, numel // (MIN_ROWS * width)) * MIN_ROWS
    for start in range(0, n_rows, rows_per_block):
        stop = start + rows_per_block
        for row in range(start, stop, height):
            for column in range(0, n_columns, width):
                yield Tile(slice(row, min(row + height, stop)), slice(column, min(column + width, n_columns)))


def _run(
    solve: Callable[[Tile], tuple[float, float]],
    tiles: list[Tile],
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> list[tuple[float, float]]:
    """Solve tiles on a few threads (the kernels hold no lock), awaited in order; an error in one stops the rest."""
    pool = _pool(threads or os.cpu_count() or 1)
    futures = [pool.submit(solve, tile) for tile in tiles]
    errors = []
    try:
        for future, tile in zip(futures, tiles, strict=True):
            errors.append(future.result())
            if progress:
                progress(tile.numel)
    finally:
        for future in futures:
            if not future.cancel():
                future.exception()  # waits: nobody writes into the outputs after us
    return errors


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept for the next tensor: starting a thread takes as long as solving 50,000 weights."""
    return ThreadPoolExecutor(threads, thread_name_prefix="solver")


def _to_words(tile: torch.Tensor) -> NDArray[Any]:
    """A contiguous tile as the words of float32, or of its upper half, which bfloat16 is."""
    if tile.dtype == torch.bfloat16:
        return np.ascontiguousarray(tile.view(torch.int16).numpy()).view(np.uint16)
    return np.ascontiguousarray(tile.numpy(), np.float32).view(np.uint32)


def _solve_tile(
    tile: torch.Tensor, columns_by: torch.Tensor, rows_by: torch.Tensor, energy: NDArray[np.float32],
    weighted: bool, spec: QuantSpec, *outputs: NDArray[Any],
) -> tuple[float, float]:  # fmt: skip
    """Fill codes, scale and zero; squared error and squared norm, NaN where weights are not finite."""
    from hqq_core.solver import _numba  # here, so that importing the library compiles nothing

    stored = STORED_TYPES[spec.scale_dtype]
    contiguous = [out if out.flags.c_contiguous else np.empty(out.shape, out.dtype) for out in outputs]
    errors: tuple[float, float] = _numba.solve_tile(
        _to_words(tile), columns_by.numpy().reshape(energy.shape), rows_by.numpy(), energy, weighted, *contiguous,
        np.array(starts(spec)), trial_iters(spec), spec.iters,
        _numba.MODES[spec.zero],
        float(spec.max_code), spec.middle,
        _numba.rounding(24 - stored.mantissa_bits, stored.subnormal_below),
        stored.min_scale, stored.max_scale, stored.max_zero,
        float(spec.lp_norm), float(spec.beta), float(spec.kappa),
    )  # fmt: skip
    for out, solved in zip(outputs, contiguous, strict=True):
        if solved is not out:
            out[:] = solved
    return errors


def _refine_tile(
    tile: torch.Tensor, columns_by: torch.Tensor, rows_by: torch.Tensor, roots: NDArray[np.float32],
    correlation: NDArray[np.int8], spec: QuantSpec, *outputs: NDArray[Any],
) -> float:  # fmt: skip
    """Refine codes, scale and zero of a block of rows in place; their squared error."""
    from hqq_core.solver import _numba, _refine  # here, so that importing the library compiles nothing

    stored, errors = STORED_TYPES[spec.scale_dtype], np.empty(len(tile))
    _refine.refine_rows(
        _to_words(tile), columns_by.numpy(), rows_by.numpy(), roots, correlation, *outputs, errors,
        tile.shape[1] // outputs[1].shape[1],
        _numba.MODES[spec.zero], float(spec.max_code),
        _numba.rounding(24 - stored.mantissa_bits, stored.subnormal_below),
        stored.min_scale, stored.max_scale, stored.max_zero,
    )  # fmt: skip
    return math.fsum(errors)
