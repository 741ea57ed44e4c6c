"""The CPU back-end for scales within super-blocks: each group by itself, then its integers; kernels in `_superblocks_numba`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hqq_core.solver import _cpu, _reference
from hqq_core.solver._factors import Factors
from hqq_core.solver._precision import STORED_TYPES
from hqq_core.solver._starts import super_block_search
from hqq_core.solver._superblocks_reference import alone, code_range, integer_range, shares
from hqq_core.spec import SUPER_BLOCK, QuantSpec
from hqq_core.tensors import SuperBlocks


class Solved(NamedTuple):
    """Codes [shape=(n_groups, group_size)], what their scales are, and unweighted sums of squares."""

    codes: torch.Tensor
    super_blocks: SuperBlocks
    squared_error: float
    squared_norm: float


def solve(
    W: torch.Tensor,
    spec: QuantSpec,
    weights: NDArray[np.float32] | None,
    factors: Factors | None,
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> Solved:
    """Tiles of whole super-blocks on a few threads; `weights` are (n_blocks, super-blocks per row, SUPER_BLOCK)."""
    assert spec.group_size is not None
    weighted, n_groups = weights is not None, SUPER_BLOCK // spec.group_size
    rows = _cpu.as_rows(W, SUPER_BLOCK, 1, whole=weighted or factors is not None)
    n_rows, n_columns = rows.shape
    n_super = n_columns // SUPER_BLOCK
    if weights is None:
        weights = np.ones((1, n_super, SUPER_BLOCK), np.float32)
    H = weights.astype(np.float64).reshape(*weights.shape[:2], n_groups, -1)
    energy, share = (_reference.normalize_energy(H) if weighted else H).astype(np.float32), shares(H)
    columns_by, rows_by = factors or Factors(torch.ones(n_columns), torch.ones(n_rows))
    rows_per_block = n_rows // len(weights)
    codes = torch.empty((W.numel() // spec.group_size, spec.group_size), dtype=torch.uint8)
    d, dmin = (np.empty((n_rows, n_super), np.float32) for _ in range(2))
    scales, mins = (np.empty((n_rows, n_super * n_groups), np.int16) for _ in range(2))
    out = codes.numpy().reshape(n_rows, n_columns)

    def solve_tile(at: _cpu.Tile) -> tuple[float, float]:
        block, supers = at.rows.start // rows_per_block, _part(at.columns, SUPER_BLOCK)
        groups = _part(at.columns, SUPER_BLOCK // n_groups)
        outputs = (
            out[at.rows, at.columns],
            d[at.rows, supers],
            dmin[at.rows, supers],
            scales[at.rows, groups],
            mins[at.rows, groups],
        )
        return _solve_tile(
            rows[at.rows, at.columns], columns_by[at.columns], rows_by[at.rows],
            energy[block, supers], share[block, supers], weighted, spec, *outputs,
        )  # fmt: skip

    tiles = list(_cpu.tiles(n_rows, n_columns, SUPER_BLOCK, rows_per_block))
    errors = _cpu.run(solve_tile, tiles, threads, progress)
    squared_error, squared_norm = (math.fsum(sums) for sums in zip(*errors, strict=True))
    return Solved(codes, _stored(spec, d, dmin, scales, mins), squared_error, squared_norm)


def _part(columns: slice, size: int) -> slice:
    return slice(columns.start // size, columns.stop // size)


def _stored(
    spec: QuantSpec, d: NDArray[Any], dmin: NDArray[Any], scales: NDArray[Any], mins: NDArray[Any]
) -> SuperBlocks:
    def halves(units: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(units.astype(np.float16).reshape(-1))

    if spec.zero == "none":
        return SuperBlocks(halves(d), torch.from_numpy(scales.astype(np.int8).reshape(-1)))
    integers = (torch.from_numpy(x.astype(np.uint8).reshape(-1)) for x in (scales, mins))
    return SuperBlocks(halves(d), next(integers), halves(dmin), next(integers))


def _solve_tile(
    tile: torch.Tensor, columns_by: torch.Tensor, rows_by: torch.Tensor, energy: NDArray[np.float32],
    share: NDArray[np.float64], weighted: bool, spec: QuantSpec, *outputs: NDArray[Any],
) -> tuple[float, float]:  # fmt: skip
    """Fill codes, units and integers; squared error and squared norm, NaN where weights are not finite."""
    from hqq_core.solver import _numba, _superblocks_numba  # here, so that importing the library compiles nothing

    n_super, n_groups, group_size = energy.shape
    contiguous = [np.empty(out.shape, out.dtype) for out in outputs]
    scale, zero = (np.empty((len(tile), n_super * n_groups), np.float32) for _ in range(2))
    by_group = energy.reshape(-1, group_size)
    errors = _cpu.fill_tile(tile, columns_by, rows_by, by_group, weighted, alone(spec), contiguous[0], scale, zero)
    if math.isnan(errors[1]):
        return errors
    stored, (low, high), search = STORED_TYPES[spec.scale_dtype], code_range(spec), super_block_search(spec)
    sums: tuple[float, float] = _superblocks_numba.solve_tile(
        _cpu.to_words(tile), columns_by.numpy().reshape(n_super, SUPER_BLOCK), rows_by.numpy(), energy, share,
        contiguous[0], scale, zero, *contiguous[1:],
        np.array([integer_range(spec)[1] - fewer for fewer in range(search.units)], np.float64),
        search.steps, search.radius, search.rounds,
        _numba.MODES[spec.zero], np.float32(low), np.float32(high), *map(float, integer_range(spec)),
        _numba.rounding(24 - stored.mantissa_bits, stored.subnormal_below),
    )  # fmt: skip
    for out, solved in zip(outputs, contiguous, strict=True):
        out[:] = solved
    return sums
