"""The CPU back-end: a weight in tiles, and the tiles on a few threads. The kernels are in `_numba` and `_refine`."""

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

from hqq_core.solver._factors import Factors
from hqq_core.solver._precision import STORED_TYPES
from hqq_core.solver._starts import starts, trial_iters
from hqq_core.spec import QuantSpec
from hqq_core.tensors import QuantizedTensor

# Weights of a tile: small weights share the cores all the same, and what each call costs does not show in large ones.
MIN_TILE_NUMEL, MAX_TILE_NUMEL, N_TILES = 1 << 16, 1 << 19, 64
MIN_ROWS = 32  # the lanes of a kernel's block, which share a column of energies
REFINED_ROWS = 32  # that share a read of the correlations
NO_STEP = np.float32(2.0**-100)  # for a scale of 0 beside an offset, which no zero times it would be


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


Solved = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, float, float
]  # codes, scale, zero, squared error, squared norm


def solve(
    W: torch.Tensor,
    spec: QuantSpec,
    weights: NDArray[np.float32] | None,
    factors: Factors | None,
    group_size: int,
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> Solved:
    """Tiles on a few threads."""
    weighted = weights is not None
    rows = as_rows(W, group_size, spec.axis, whole=weighted or factors is not None)
    n_rows, n_columns = rows.shape
    if weights is None:
        weights = np.ones((1, n_columns // group_size, group_size), np.float32)
    columns_by, rows_by = factors or Factors(torch.ones(n_columns), torch.ones(n_rows))
    rows_per_block = n_rows // len(weights)
    n_groups = W.numel() // group_size
    codes = torch.empty((n_groups, group_size) if spec.axis == 1 else (group_size, n_groups), dtype=torch.uint8)
    scale, zero = (np.empty((n_rows, n_columns // group_size), np.float32) for _ in range(2))
    out = codes.numpy().reshape(n_rows, n_columns) if spec.axis == 1 else codes.numpy().T

    def solve_tile(at: Tile) -> tuple[float, float]:
        groups = slice(at.columns.start // group_size, at.columns.stop // group_size)
        own = weights[at.rows.start // rows_per_block, groups]
        outputs = out[at.rows, at.columns], scale[at.rows, groups], zero[at.rows, groups]
        return fill_tile(
            rows[at.rows, at.columns], columns_by[at.columns], rows_by[at.rows], own, weighted, spec, *outputs
        )

    errors = run(solve_tile, list(tiles(n_rows, n_columns, group_size, rows_per_block)), threads, progress)
    squared_error, squared_norm = (math.fsum(sums) for sums in zip(*errors, strict=True))
    return codes, torch.from_numpy(scale), torch.from_numpy(zero), squared_error, squared_norm


def refine(
    solved: QuantizedTensor,
    W: torch.Tensor,
    energy: torch.Tensor,
    factors: Factors | None,
    correlation: torch.Tensor,
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> QuantizedTensor:
    """What was solved, refined by blocks of rows on a few threads; its codes are overwritten. Scales of super-blocks stay."""
    H = energy.detach().double().numpy()
    mean = H.mean()
    if not mean > 0:
        return solved
    n_rows, n_columns = W.shape
    roots, C = np.sqrt(H / mean).astype(np.float32), correlation.detach().contiguous().numpy()
    columns_by, rows_by = factors or Factors(torch.ones(n_columns), torch.ones(n_rows))
    codes = solved.W_q.numpy().reshape(n_rows, n_columns)
    scale, zero = (stored.float().clone().numpy().reshape(n_rows, -1) for stored in (solved.scale, solved.zero))
    if solved.super_blocks is not None and solved.super_blocks.offset is not None:
        constant = scale == 0  # what its codes then are makes no difference
        scale[constant], zero[constant] = NO_STEP, (-solved.offset.numpy().reshape(n_rows, -1) / NO_STEP)[constant]

    def refine_tile(at: Tile) -> tuple[float, float]:
        outputs = codes[at.rows], scale[at.rows], zero[at.rows]
        return _refine_tile(W[at.rows], columns_by, rows_by[at.rows], roots, C, solved.spec, *outputs), 0.0

    first = range(0, n_rows, REFINED_ROWS)
    tiles = [Tile(slice(row, min(row + REFINED_ROWS, n_rows)), slice(0, n_columns)) for row in first]
    errors = run(
        refine_tile, tiles, threads, (lambda _: progress(0)) if progress else None
    )  # all were counted when solved
    squared_error = math.fsum(error for error, _ in errors)
    if solved.super_blocks is not None:
        return dataclasses.replace(solved, squared_error=squared_error)
    return dataclasses.replace(
        solved,
        scale=torch.from_numpy(scale).view(-1, 1).to(solved.scale.dtype),
        zero=torch.from_numpy(zero).view(-1, 1).to(solved.zero.dtype),
        squared_error=squared_error,
    )


def as_rows(W: torch.Tensor, group_size: int, axis: int, *, whole: bool) -> torch.Tensor:
    """W as rows of whole groups: one group each, or a `whole` output's where groups of a column share energies or factors."""
    if axis == 0:
        return W.reshape(group_size, -1).T  # strided
    return W.reshape(-1, W.shape[-1] if whole else group_size)


def tiles(n_rows: int, n_columns: int, group_size: int, rows_per_block: int) -> Iterator[Tile]:
    """Cut rows into about N_TILES, at whole groups and whole lanes, none across two blocks."""
    numel = min(max(n_rows * n_columns // N_TILES, MIN_TILE_NUMEL), MAX_TILE_NUMEL)
    width = min(n_columns, max(1, numel // (MIN_ROWS * group_size)) * group_size)
    height = max(1, numel // (MIN_ROWS * width)) * MIN_ROWS
    for start in range(0, n_rows, rows_per_block):
        stop = start + rows_per_block
        for row in range(start, stop, height):
            for column in range(0, n_columns, width):
                yield Tile(slice(row, min(row + height, stop)), slice(column, min(column + width, n_columns)))


def run(
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


def to_words(tile: torch.Tensor) -> NDArray[Any]:
    """A contiguous tile as the words of float32, or of its upper half, which bfloat16 is."""
    if tile.dtype == torch.bfloat16:
        return np.ascontiguousarray(tile.view(torch.int16).numpy()).view(np.uint16)
    return np.ascontiguousarray(tile.numpy(), np.float32).view(np.uint32)


def fill_tile(
    tile: torch.Tensor, columns_by: torch.Tensor, rows_by: torch.Tensor, energy: NDArray[np.float32],
    weighted: bool, spec: QuantSpec, *outputs: NDArray[Any],
) -> tuple[float, float]:  # fmt: skip
    """Fill codes, scale and zero; squared error and squared norm, NaN where weights are not finite."""
    from hqq_core.solver import _numba  # here, so that importing the library compiles nothing

    stored = STORED_TYPES[spec.scale_dtype]
    contiguous = [out if out.flags.c_contiguous else np.empty(out.shape, out.dtype) for out in outputs]
    errors: tuple[float, float] = _numba.solve_tile(
        to_words(tile), columns_by.numpy().reshape(energy.shape), rows_by.numpy(), energy, weighted, *contiguous,
        np.array(starts(spec)), trial_iters(spec), spec.iters,
        _numba.MODES[spec.zero], spec.signed,
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
        to_words(tile), columns_by.numpy(), rows_by.numpy(), roots, correlation, *outputs, errors,
        tile.shape[1] // outputs[1].shape[1],
        _numba.OFFSET if spec.scale_bits else _numba.MODES[spec.zero], float(spec.max_code),
        _numba.rounding(24 - stored.mantissa_bits, stored.subnormal_below),
        stored.min_scale, stored.max_scale, stored.max_zero,
    )  # fmt: skip
    return math.fsum(errors)
