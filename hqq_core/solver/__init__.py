"""quantize(): one weight in, codes, scale and zero out. Checks, grouping and the choice of back-end live here."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from hqq_core.errors import SpecError, TensorError
from hqq_core.solver._precision import STORED_TYPES
from hqq_core.spec import QuantSpec
from hqq_core.tensors import TORCH_DTYPES, QuantizedTensor

TILE_NUMEL = 1 << 16  # 256 KB of float32: stays in a core's second-level cache, and small weights still share the cores
TILE_GROUPS = 32  # at least, and in multiples: the CPU kernel takes as many groups at once
SOLVABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Tile = tuple[slice, float, float, float]  # groups, squared error, squared norm, largest weight


def quantize(
    W: torch.Tensor,
    spec: QuantSpec,
    *,
    name: str = "W",
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> QuantizedTensor:
    """Quantize one weight without data.

    Parameters
    ----------
    W : Tensor [shape=(..., in_features)], float32, float16 or bfloat16
        On the CPU. For axis 1 its last size, for axis 0 its first, must be a multiple of the group size.
    spec : QuantSpec
    name : str
        What errors call the tensor.
    threads : int, optional
        Solver threads; default: one per core. The answer does not depend on it.
    progress : callable, optional
        Gets the number of weights of each finished tile; what it raises stops the work.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    SpecError
        The group size does not divide the shape.
    TensorError
        NaN or infinite weights, counted; weights that overflow their dtype when rounded; or a dtype that is not solved.

    Examples
    --------
    >>> quantize(torch.randn(4, 128), QuantSpec(nbits=4, group_size=64)).W_q.shape
    torch.Size([8, 64])
    """
    if W.dtype not in SOLVABLE_DTYPES:
        raise TensorError(name, f"dtype {W.dtype}: wanted one of {', '.join(map(str, SOLVABLE_DTYPES))}")
    group_size = resolve_group_size(tuple(W.shape), spec)
    groups = _as_groups(W, group_size, spec.axis)  # (n_groups, group_size); strided for axis 0
    n_groups = groups.shape[0]
    codes = torch.empty((n_groups, group_size) if spec.axis == 1 else (group_size, n_groups), dtype=torch.uint8)
    scale, zero = np.empty(n_groups, np.float32), np.empty(n_groups, np.float32)
    out = codes.numpy() if spec.axis == 1 else codes.numpy().T

    def solve(rows: slice) -> Tile:
        tile = _to_float32(groups[rows])
        peak = float(np.abs(tile).max())
        if not math.isfinite(peak):
            raise _not_finite(W, name)
        return rows, *_solve_tile(tile, spec, out[rows], scale[rows], zero[rows]), peak

    report = (lambda n: progress(n * group_size)) if progress else None
    tiles = list(_run(solve, list(_tiles(n_groups, group_size)), threads, report))
    stored, column = TORCH_DTYPES[spec.scale_dtype], (-1, 1) if spec.axis == 1 else (1, -1)
    quantized = QuantizedTensor(
        W_q=codes,
        scale=torch.from_numpy(scale).to(stored).view(column),
        zero=torch.from_numpy(zero).to(stored).view(column),
        shape=tuple(W.shape),
        dtype=W.dtype,
        spec=spec,
        squared_error=math.fsum(tile[1] for tile in tiles),
        squared_norm=math.fsum(tile[2] for tile in tiles),
    )
    peak, limit = max(tile[3] for tile in tiles), torch.finfo(W.dtype).max
    if peak > limit / 4 and not quantized.dequantize().isfinite().all():
        raise TensorError(name, f"weights up to {peak:g} leave {W.dtype} (up to {limit:g}) no room for their rounding")
    return quantized


def resolve_group_size(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Weights per group for this shape; a SpecError where the group size does not divide it."""
    if len(shape) < 2 or 0 in shape:
        raise SpecError("group_size", f"shape {shape}: wanted two or more sizes, none of them zero")
    size = shape[-1] if spec.axis == 1 else shape[0]
    group_size = spec.group_size or size
    if size % group_size:
        raise SpecError("group_size", f"group_size {group_size} does not divide {size} (axis {spec.axis} of {shape})")
    return group_size


def _as_groups(W: torch.Tensor, group_size: int, axis: int) -> torch.Tensor:
    return W.reshape(-1, group_size) if axis == 1 else W.reshape(group_size, -1).T


def _tiles(n_groups: int, group_size: int) -> Iterator[slice]:
    step = max(1, TILE_NUMEL // group_size // TILE_GROUPS) * TILE_GROUPS
    return (slice(start, min(start + step, n_groups)) for start in range(0, n_groups, step))


def _run(
    solve: Callable[[slice], Tile], tiles: list[slice], threads: int | None, report: Callable[[int], None] | None
) -> Iterator[Tile]:
    """Solve tiles on a few threads (the kernels hold no lock), in order; an error in one stops the rest."""
    futures = [_pool(threads or os.cpu_count() or 1).submit(solve, tile) for tile in tiles]
    try:
        for future in futures:
            tile = future.result()
            if report:
                report(tile[0].stop - tile[0].start)  # groups
            yield tile
    finally:
        for future in futures:
            if not future.cancel():
                future.exception()  # waits: nobody writes into the outputs after us


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept for the next tensor: starting a thread takes as long as solving 50,000 weights."""
    return ThreadPoolExecutor(threads, thread_name_prefix="solver")


def _to_float32(tile: torch.Tensor) -> NDArray[np.float32]:
    """A fresh contiguous float32 copy of one tile."""
    if tile.dtype == torch.bfloat16:  # numpy has no bfloat16: it is the upper half of a float32
        words = np.ascontiguousarray(tile.view(torch.int16).numpy()).view(np.uint16)
        return np.left_shift(words, 16, dtype=np.uint32).view(np.float32)
    return np.array(tile.numpy(), dtype=np.float32, order="C")


def _not_finite(W: torch.Tensor, name: str) -> TensorError:
    nan, infinite = int(W.isnan().sum()), int(W.isinf().sum())
    return TensorError(name, f"{nan} NaN and {infinite} infinite among {W.numel()} weights: wanted finite ones only")


def _solve_tile(
    W: NDArray[np.float32],
    spec: QuantSpec,
    codes: NDArray[np.uint8],
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
) -> tuple[float, float]:
    from hqq_core.solver import _numba  # here, so that importing the library compiles nothing

    stored = STORED_TYPES[spec.scale_dtype]
    contiguous = codes if codes.flags.c_contiguous else np.empty(codes.shape, np.uint8)
    errors: tuple[float, float] = _numba.solve_tile(
        W, contiguous, scale, zero,
        {"float": _numba.FLOAT, "int": _numba.INT, "none": _numba.NONE}[spec.zero],
        float(spec.max_code), spec.middle,
        _numba.rounding(24 - stored.mantissa_bits, stored.subnormal_below),
        stored.min_scale, stored.max_scale, stored.max_zero,
        spec.iters, float(spec.lp_norm), float(spec.beta), float(spec.kappa),
    )  # fmt: skip
    if contiguous is not codes:
        codes[:] = contiguous
    return errors
