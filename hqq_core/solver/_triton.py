"""GPU kernel: no checks; `_reference` has the equations and their source, `_numba` the same steps for a CPU.

A program holds a tile of groups in registers from its one load of W to its one store of the result. Up to 64 weights of a group
lie in one thread, so that sums need few or no shuffles; a wider group is shared by neighbouring threads.

Precision: as `_numba`. Weights, codes and residuals float32; per-group sums float32; the 2 x 2 solve and the errors float64. Sums
run in another order than on a CPU and multiply-adds are fused otherwise, so the two part at ties: for the same scale and zero,
codes part by one, where w / s + z is within two float32 roundings of a tie. A scale or a zero that rounds otherwise, or two
starts that come out alike, send a group along another path: as good on average, and about one group in a hundred.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hqq_core.solver._precision import FLAT, MAX_STEPS, NOISE, ROUNDED, STORED_TYPES
from hqq_core.solver._starts import starts, trial_iters
from hqq_core.spec import QuantSpec

MAX_GROUP_SIZE = 1 << 16  # a full block of 1024 threads
PACKED_BITS = (1, 2, 4, 8)  # codes that do not straddle bytes
SLAB_NUMEL = 1 << 25  # 64 MB of bfloat16 a copy: long beside what starting it costs
STREAMS = 2

_WARP = 32
_VECTOR = 8  # 16 bytes of bfloat16: one load
_PER_THREAD = (
    64  # weights: with as many energies the most that sm_90 holds in registers (tests/benchmarks/gpu.py --assembly)
)
_MAX_WARPS = 32


@triton.jit
def _sum(X):
    """Over a group, in a thread first and across threads last: (CHUNKS, GROUPS, LANES, VECTOR) -> (GROUPS,)."""
    return tl.sum(tl.sum(tl.sum(X, 3), 0), 1)


@triton.jit
def _min(X):
    return tl.min(tl.min(tl.min(X, 3), 0), 1)


@triton.jit
def _max(X):
    return tl.max(tl.max(tl.max(X, 3), 0), 1)


@triton.jit
def _spread(x):
    """(GROUPS,) -> (1, GROUPS, 1, 1)."""
    return x[None, :, None, None]


@triton.jit
def _rint(x):
    """Ties to even, for |x| < 2 ** 22."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2 ** 23: the sum has no bits below one


@triton.jit
def _rint64(x):
    """Ties to even, for |x| < 2 ** 51."""
    magic = tl.full(x.shape, 6755399441055744.0, tl.float64)  # 1.5 * 2 ** 52
    return (x + magic) - magic


@triton.jit
def _power_of_two(exponent):
    """2 ** exponent as float32, for -126 .. 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two64(exponent):
    """2 ** exponent as float64."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent(bits):
    """Exponent of float32 bits without a sign, for a fraction in [0.5, 1); too high for subnormals, which `smallest` covers."""
    return (bits >> 23) - 126


@triton.jit
def _shrink_by(X, exponent):
    """X * 2 ** -exponent: exact, in two halves, for 2 ** 128 is no float32."""
    half = exponent >> 1
    return X * _spread(_power_of_two(-half)) * _spread(_power_of_two(half - exponent))


@triton.jit
def _round_stored(x, DROP: tl.constexpr, SUBNORMAL_BELOW: tl.constexpr):
    """Round float32 to a type with DROP fewer bits, ties to even."""
    if DROP == 0:
        return x
    word = x.to(tl.uint32, bitcast=True)
    word = (word + ((1 << (DROP - 1)) - 1) + ((word >> DROP) & 1)) >> DROP << DROP
    rounded = word.to(tl.float32, bitcast=True)
    if SUBNORMAL_BELOW > 0:
        rounded = tl.where(
            tl.abs(x) < SUBNORMAL_BELOW, _rint(x * 16777216.0) * 5.9604644775390625e-08, rounded
        )  # 2 ** 24
    return rounded


@triton.jit
def _round_scale(
    scale, floor, unit, per_unit, LOW: tl.constexpr, HIGH: tl.constexpr, DROP: tl.constexpr, SUB: tl.constexpr
):
    """Clamp and round a float64 scale given in normalized units; one such unit is `unit`, a power of two."""
    absolute = tl.minimum(tl.maximum(tl.maximum(scale, floor) * unit, LOW), HIGH)
    return _round_stored(absolute.to(tl.float32), DROP, SUB).to(tl.float64) * per_unit


@triton.jit
def _round_zero(
    zero, scale, unit, per_unit,
    ZERO: tl.constexpr, HIGH: tl.constexpr, MAX_ZERO: tl.constexpr, DROP: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Clamp and round a float zero itself, or its offset -zero * scale; arguments as `_round_scale` has them."""
    limited = tl.minimum(tl.maximum(zero, -2.0 * MAX_ZERO), 2.0 * MAX_ZERO)
    if ZERO == "float":
        return _round_stored(limited.to(tl.float32), DROP, SUB).to(tl.float64)
    offset = tl.minimum(tl.maximum(-limited * scale * unit, -HIGH), HIGH)
    return -_round_stored(offset.to(tl.float32), DROP, SUB).to(tl.float64) * per_unit / scale


@triton.jit
def _codes(X, scale, zero, MAX_CODE: tl.constexpr):
    """clip(rint(x / s + z), 0, Q) as floats: clamped to [0, 1] first, which costs a GPU nothing, then scaled to Q and rounded."""
    inverse = tl.div_rn(1.0, scale * MAX_CODE)
    clamped = tl.clamp(X * _spread(inverse) + _spread(zero * (1.0 / MAX_CODE)), 0.0, 1.0)
    return _rint(clamped * MAX_CODE)


@triton.jit
def _fit_scale(n, sum_q, sum_qq, sum_t, sum_qt, zero, scale, floor, unit, per_unit, LOW, HIGH, DROP, SUB):
    """Least-squares scale for a given zero, and how much of the target's square it explains."""
    cross = sum_qt - zero * sum_t
    square = sum_qq - 2.0 * zero * sum_q + n * zero * zero
    fitted = tl.where(square > 0.0, cross / tl.where(square > 0.0, square, 1.0), scale)
    fitted = _round_scale(fitted, floor, unit, per_unit, LOW, HIGH, DROP, SUB)
    return fitted, fitted * (2.0 * cross - fitted * square)


@triton.jit
def _solve_tiles(
    W, energy, starts, codes, scales, zeros, errors,
    n_groups, groups_per_row, groups_per_block, first_group, trial_iters, iters, p, beta, kappa,
    GROUP_SIZE: tl.constexpr, AXIS: tl.constexpr, WEIGHTED: tl.constexpr, ZERO: tl.constexpr, MAX_CODE: tl.constexpr,
    MIDDLE: tl.constexpr, MAX_STEPS: tl.constexpr, ROUNDED: tl.constexpr, NOISE: tl.constexpr, FLAT: tl.constexpr,
    SQUARES: tl.constexpr, PER_BYTE: tl.constexpr, STARTS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, MAX_ZERO: tl.constexpr, DROP: tl.constexpr, SUB: tl.constexpr, SMALLEST: tl.constexpr,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    chunk = tl.arange(0, CHUNKS)[:, None, None, None]
    lane = tl.arange(0, LANES)[None, None, :, None]
    item = (chunk * LANES + lane) * VECTOR + tl.arange(0, VECTOR)[None, None, None, :]  # (CHUNKS, 1, LANES, VECTOR)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(
        0, GROUPS
    )  # 64 bits: a tensor may have more than 2 ** 31 weights
    real = group < n_groups
    MASKED: tl.constexpr = CHUNKS * LANES * VECTOR != GROUP_SIZE
    present = _spread(real) & (item < GROUP_SIZE) if MASKED else _spread(real) & (item >= 0)
    at = _spread(group) * GROUP_SIZE + item if AXIS == 1 else item.to(tl.int64) * n_groups + _spread(group)

    X = tl.load(W + at, mask=present, other=0.0).to(tl.float32)  # (CHUNKS, GROUPS, LANES, VECTOR)
    bits = _max(X.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # as integers NaN is the largest
    exponent = tl.maximum(_exponent(bits), SMALLEST)  # so that its inverse and the squares are finite
    largest = bits.to(tl.float32, bitcast=True)
    unit, per_unit = _power_of_two64(exponent), _power_of_two64(-exponent)
    X = _shrink_by(X, exponent)
    if WEIGHTED:
        whole = group + first_group
        own = whole // groups_per_block * groups_per_row + whole % groups_per_row
        H = tl.load(energy + _spread(own) * GROUP_SIZE + item, mask=present, other=0.0)
    elif MASKED:
        H = tl.where(present, 1.0, 0.0)
    ALIKE: tl.constexpr = not (WEIGHTED or MASKED)
    # Sums that no step changes.
    if ALIKE:
        n = tl.full((GROUPS,), GROUP_SIZE, tl.float64)
        sum_w = _sum(X)
    else:
        n = tl.where(real, _sum(H).to(tl.float64), 1.0)
        sum_w = _sum(H * X)

    # Round to nearest between the smallest and the largest weight.
    small, large = _min(X), _max(X)
    if MASKED:
        small = _min(tl.where(present, X, float("inf")))
        large = _max(tl.where(present, X, float("-inf")))
    small, large = small.to(tl.float64), large.to(tl.float64)
    floor = largest.to(tl.float64) * per_unit * (1.0 / (MAX_ZERO if ZERO == "float" or ZERO == "offset" else MAX_STEPS))
    constant = small == large
    if ZERO == "none":
        start = tl.maximum(-small / MIDDLE, large / max(MAX_CODE - MIDDLE, 0.5))
    else:
        bottom, top = small, large
        if ZERO == "int":
            bottom, top = tl.minimum(small, 0.0), tl.maximum(large, 0.0)
        start = tl.where(constant, tl.abs(small), (top - bottom) / MAX_CODE)
    start = _round_scale(start, floor, unit, per_unit, LOW, HIGH, DROP, SUB)
    scale = start.to(tl.float32)
    if ZERO == "none":
        zero = tl.full((GROUPS,), MIDDLE, tl.float32)
    else:
        if ZERO == "int":
            middle = tl.minimum(tl.maximum(_rint64(-bottom / start), 0.0), MAX_CODE)
        else:
            middle = _round_zero(-bottom / start, start, unit, per_unit, ZERO, HIGH, MAX_ZERO, DROP, SUB)
        zero = tl.where(constant, tl.where(small < 0.0, 1.0, 0.0), middle).to(tl.float32)

    first_scale, first_zero = scale.to(tl.float64), zero.to(tl.float64)
    mean = sum_w.to(tl.float64) / n
    kept_scale, kept_zero = scale, zero
    kept = tl.full((GROUPS,), float("inf"), tl.float32)
    attempt = 0 if STARTS > 1 else STARTS
    while attempt <= STARTS:  # a short run from each start, and a long one from the best that was seen
        if attempt < STARTS:
            limit = trial_iters
            smaller = first_scale * tl.load(starts + 2 * attempt)
            smaller = _round_scale(smaller, floor, unit, per_unit, LOW, HIGH, DROP, SUB)
            scale = smaller.to(tl.float32)
            if ZERO == "none":
                zero = first_zero.to(tl.float32)
            else:  # the mean keeps its place among the codes, but for a shift
                moved = first_zero + mean / first_scale - mean / smaller + tl.load(starts + 2 * attempt + 1)
                if ZERO == "int":
                    zero = tl.minimum(tl.maximum(_rint64(moved), 0.0), MAX_CODE).to(tl.float32)
                else:
                    moved = _round_zero(moved, smaller, unit, per_unit, ZERO, HIGH, MAX_ZERO, DROP, SUB)
                    zero = moved.to(tl.float32)
        else:
            limit = iters
            scale, zero = kept_scale, kept_zero
        best_scale, best_zero = scale, zero
        best = tl.full((GROUPS,), float("inf"), tl.float32)
        active = real
        penalty = beta
        step = 0
        running = 1
        while running > 0:
            q = _codes(X, scale, zero, MAX_CODE)
            R = X - _spread(scale) * (q - _spread(zero))
            if SQUARES:
                loss = R * R
            else:
                size = tl.maximum(tl.abs(R) * _spread(tl.div_rn(1.0, scale)), 1e-12)  # in steps
                power = tl.exp((p - 1.0) * tl.log(size))
                shrunk = tl.maximum(size - power / penalty, 0.0) * _spread(scale)
                R -= tl.where(R < 0.0, -shrunk, shrunk)
                loss = power * size * _spread(tl.exp(p * tl.log(scale)))
            if ALIKE:
                objective, sum_q, sum_qq, sum_qr = _sum(loss), _sum(q), _sum(q * q), _sum(q * R)
            else:
                Hq = H * q
                objective, sum_q, sum_qq, sum_qr = _sum(H * loss), _sum(Hq), _sum(Hq * q), _sum(Hq * R)
            improved = active & (objective < best)
            best = tl.where(improved, objective, best)
            best_scale, best_zero = tl.where(improved, scale, best_scale), tl.where(improved, zero, best_zero)
            if not SQUARES:
                active = improved  # a group that stops improving stops for good

            sum_q, sum_qq, sum_qr = sum_q.to(tl.float64), sum_qq.to(tl.float64), sum_qr.to(tl.float64)
            last, last_zero = scale.to(tl.float64), zero.to(tl.float64)
            sum_w_r = last * (sum_q - last_zero * n)
            sum_t = sum_w.to(tl.float64)
            if not SQUARES:
                sum_t = (_sum(R) if ALIKE else _sum(H * R)).to(tl.float64) + sum_w_r
            sum_qt = sum_qr + last * (sum_qq - last_zero * sum_q)
            if ZERO == "none":
                middle = tl.full((GROUPS,), MIDDLE, tl.float64)
                fitted, _ = _fit_scale(
                    n, sum_q, sum_qq, sum_t, sum_qt, middle, last, floor, unit, per_unit, LOW, HIGH, DROP, SUB
                )
                scale = fitted.to(tl.float32)
            else:
                var, cov = sum_qq - sum_q * sum_q / n, sum_qt - sum_q * sum_t / n
                varied = var > FLAT * sum_qq
                joint = tl.where(varied, cov / tl.where(varied, var, 1.0), last)
                joint = _round_scale(joint, floor, unit, per_unit, LOW, HIGH, DROP, SUB)
                middle = (sum_q - sum_t / joint) / n
                if ZERO == "float" or ZERO == "offset":
                    middle = _round_zero(middle, joint, unit, per_unit, ZERO, HIGH, MAX_ZERO, DROP, SUB)
                    scale, zero = joint.to(tl.float32), middle.to(tl.float32)
                else:
                    below = tl.minimum(tl.maximum(tl.floor(middle), 0.0), MAX_CODE)
                    above = tl.minimum(below + 1.0, MAX_CODE)
                    scale_below, gain_below = _fit_scale(
                        n, sum_q, sum_qq, sum_t, sum_qt, below, last, floor, unit, per_unit, LOW, HIGH, DROP, SUB
                    )
                    scale_above, gain_above = _fit_scale(
                        n, sum_q, sum_qq, sum_t, sum_qt, above, last, floor, unit, per_unit, LOW, HIGH, DROP, SUB
                    )
                    scale = tl.where(gain_above > gain_below, scale_above, scale_below).to(tl.float32)
                    zero = tl.where(gain_above > gain_below, above, below).to(tl.float32)
            if SQUARES:  # known for the codes as they are, which new ones can only lower; see `_numba._move`
                a = last - scale.to(tl.float64)
                b = scale.to(tl.float64) * zero.to(tl.float64) - last * last_zero
                gain = a * a * sum_qq + b * b * n + 2.0 * (a * sum_qr + b * (sum_t - sum_w_r) + a * b * sum_q)
                noise = NOISE * tl.abs(b * sum_t)
                objective = (objective.to(tl.float64) * ROUNDED + noise + gain).to(tl.float32)
                active = active & (objective < best) & (limit > 0)
                best = tl.where(active, objective, best)
                best_scale, best_zero = tl.where(active, scale, best_scale), tl.where(active, zero, best_zero)
            penalty *= kappa
            step += 1
            running = tl.where(step < (limit if SQUARES else limit + 1), tl.max(active.to(tl.int32), 0), 0)

        better = best < kept
        kept = tl.where(better, best, kept)
        kept_scale, kept_zero = tl.where(better, best_scale, kept_scale), tl.where(better, best_zero, kept_zero)
        attempt += 1

    q = _codes(X, kept_scale, kept_zero, MAX_CODE)
    R = X - _spread(kept_scale) * (q - _spread(kept_zero))
    square = unit * unit
    error = _sum(tl.where(present, R * R, 0.0)).to(tl.float64) * square
    norm = tl.where(bits < 0x7F800000, _sum(X * X).to(tl.float64) * square, float("nan"))  # the caller looks for it
    tl.store(errors + tl.program_id(0).to(tl.int64) * 2, tl.sum(error, 0))
    tl.store(errors + tl.program_id(0).to(tl.int64) * 2 + 1, tl.sum(norm, 0))
    tl.store(scales + group, (kept_scale.to(tl.float64) * unit).to(tl.float32), mask=real)
    tl.store(zeros + group, kept_zero, mask=real)
    if PER_BYTE == 1:
        tl.store(codes + at, q.to(tl.uint8), mask=present)
    else:
        NBITS: tl.constexpr = 8 // PER_BYTE
        parts = q.to(tl.uint8).reshape(CHUNKS, GROUPS, LANES, VECTOR // PER_BYTE, PER_BYTE)
        parts = parts << (tl.arange(0, PER_BYTE) * NBITS).to(tl.uint8)[None, None, None, None, :]
        byte = (chunk * LANES + lane) * (VECTOR // PER_BYTE) + tl.arange(0, VECTOR // PER_BYTE)[None, None, None, :]
        place = _spread(group) * (GROUP_SIZE // PER_BYTE) + byte
        inside = _spread(real) & (byte < GROUP_SIZE // PER_BYTE)
        tl.store(codes + place, tl.sum(parts, 4).to(tl.uint8), mask=inside)


@dataclass(frozen=True, slots=True)
class Solved:
    """What the kernel writes, on W's device; queued on its current stream, so not there until that is.

    Parameters
    ----------
    codes : Tensor, uint8
        [shape=(n_groups, group_size)] for axis 1, (group_size, n_groups) for axis 0; packed:
        (n_groups, group_size * code_bits / 8), the bytes of `packing.pack_dense`.
    scale, zero : Tensor [shape=(n_groups,)], float32
        Values that the stored type holds exactly.
    errors : Tensor [shape=(n_programs, 2)], float64
        Squared error and squared norm, to be added; a norm of NaN says that weights are not finite.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    errors: torch.Tensor

    def sums(self) -> tuple[float, float]:
        """Squared error and squared norm, added exactly; waits for the kernel."""
        error, norm = self.errors.T.tolist()
        return math.fsum(error), math.fsum(norm)


@dataclass(frozen=True, slots=True)
class Tile:
    """How the groups of one program lie in its threads: (chunks, groups, lanes, vector), chunks and vector within a thread."""

    chunks: int
    groups: int
    lanes: int
    vector: int
    warps: int


def tile_for(group_size: int) -> Tile:
    """One thread for each 64 weights of a group, as many groups as fill a warp; a group above 2048 fills a block."""
    padded = max(_VECTOR, triton.next_power_of_2(group_size))
    warps = min(max(1, padded // (_PER_THREAD * _WARP)), _MAX_WARPS)
    lanes = min(max(1, padded // _PER_THREAD), _WARP * warps)
    return Tile(padded // (_VECTOR * lanes), _WARP * warps // lanes, lanes, _VECTOR, warps)


def solve(
    matrix: torch.Tensor,
    spec: QuantSpec,
    energy: torch.Tensor | None = None,
    *,
    first_group: int = 0,
    rows_per_block: int | None = None,
    packed: bool = False,
) -> Solved:
    """Solve every group of a matrix where it lies.

    Parameters
    ----------
    matrix : Tensor [shape=(n_groups, group_size) for axis 1, (group_size, n_groups) for axis 0], contiguous
        float32, float16 or bfloat16; up to MAX_GROUP_SIZE weights a group.
    spec : QuantSpec
    energy : Tensor [shape=(n_blocks, groups_per_row, group_size)], float32, optional
        Weights of squared errors, each group's normalized; axis 1 alone.
    first_group : int
        Place of the matrix's first group in its tensor, where it is a part of one.
    rows_per_block : int, optional
        Rows of the tensor that share a block of energies; default: the matrix is the whole tensor.
    packed : bool
        Pack the codes of axis 1, densely, for code_bits among PACKED_BITS and groups of whole bytes.
    """
    n_groups, group_size = tuple(matrix.shape) if spec.axis == 1 else (matrix.shape[1], matrix.shape[0])
    tile, device = tile_for(group_size), matrix.device
    per_byte = 8 // spec.code_bits if packed else 1
    shape = (n_groups, group_size // per_byte) if spec.axis == 1 else (group_size, n_groups)
    n_programs = triton.cdiv(n_groups, tile.groups)
    solved = Solved(
        torch.empty(shape, dtype=torch.uint8, device=device),
        torch.empty(n_groups, dtype=torch.float32, device=device),
        torch.empty(n_groups, dtype=torch.float32, device=device),
        torch.empty((n_programs, 2), dtype=torch.float64, device=device),
    )
    n_blocks, groups_per_row = (1, 1) if energy is None else energy.shape[:2]
    groups_per_block = (rows_per_block or n_groups // n_blocks // groups_per_row) * groups_per_row
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _solve_tiles[(n_programs,)](
            matrix, energy, _starts_on(device, spec), solved.codes, solved.scale, solved.zero, solved.errors,
            n_groups, groups_per_row, groups_per_block, first_group,
            trial_iters(spec), spec.iters, spec.lp_norm, spec.beta, spec.kappa,
            **constants(spec, group_size, weighted=energy is not None, packed=packed), num_warps=tile.warps,
        )  # fmt: skip
    return solved


@functools.cache
def _starts_on(device: torch.device, spec: QuantSpec) -> torch.Tensor:
    """`starts` as float64 [shape=(n_starts, 2)]; kept, for its copy would wait for the stream each time."""
    return torch.tensor(starts(spec), dtype=torch.float64, device=device)


def constants(spec: QuantSpec, group_size: int, *, weighted: bool, packed: bool) -> dict[str, object]:
    """What one compiled kernel is compiled for."""
    stored, tile = STORED_TYPES[spec.scale_dtype], tile_for(group_size)
    return {
        "GROUP_SIZE": group_size, "AXIS": spec.axis, "WEIGHTED": weighted, "ZERO": spec.zero, "MAX_CODE": float(spec.max_code),
        "MIDDLE": float(spec.middle), "MAX_STEPS": MAX_STEPS, "ROUNDED": ROUNDED, "NOISE": NOISE, "FLAT": FLAT,
        "SQUARES": spec.lp_norm == 2,
        "PER_BYTE": 8 // spec.code_bits if packed else 1,
        "STARTS": spec.starts,
        "LOW": stored.min_scale, "HIGH": stored.max_scale, "MAX_ZERO": stored.max_zero, "DROP": 24 - stored.mantissa_bits,
        "SUB": stored.subnormal_below, "SMALLEST": math.frexp(stored.min_scale)[1],
        "CHUNKS": tile.chunks, "GROUPS": tile.groups, "LANES": tile.lanes, "VECTOR": tile.vector,
    }  # fmt: skip


def solve_streamed(
    matrix: torch.Tensor,
    spec: QuantSpec,
    device: torch.device,
    energy: torch.Tensor | None = None,
    factors: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    rows_per_block: int | None = None,
    progress: Callable[[int], None] | None = None,
    slab_numel: int = SLAB_NUMEL,
) -> Solved:
    """Solve a matrix that lies in the host's memory, slab by slab; the answer is that of `solve`, back on the host.

    Two streams take turns, so that one slab is copied while the other is solved or returns, and device memory does not grow with
    the matrix.

    Parameters
    ----------
    matrix, energy : Tensor
        As `solve` takes them, on the CPU; `matrix` may be strided.
    spec : QuantSpec
    factors : (Tensor [shape=(in_features,)], Tensor [shape=(out_features,)]), float32, optional
        Of columns and rows; axis 1 alone. What is solved is the matrix times both.
    device : torch.device
        A CUDA device, or the CPU under Triton's interpreter.
    rows_per_block : int, optional
        As `solve` takes it.
    progress : callable, optional
        Gets the number of weights of each finished slab; what it raises stops the work.
    slab_numel : int
        Weights of one slab. Codes, scales and zeros do not depend on it.
    """
    along = 0 if spec.axis == 1 else 1  # where groups are counted
    n_groups, group_size = matrix.shape[along], matrix.shape[1 - along]
    n_slab = min(n_groups, max(1, slab_numel // group_size))  # groups
    if energy is not None:
        n_blocks, groups_per_row = energy.shape[:2]
        rows_per_block = rows_per_block or n_groups // n_blocks // groups_per_row
        energy = energy.to(device)
    if factors is not None:
        factors = factors[0].to(device).view(-1, group_size), factors[1].to(device)
    codes = torch.empty(matrix.shape, dtype=torch.uint8)
    scale, zero = torch.empty(n_groups), torch.empty(n_groups)
    errors = []

    def receive(lane: _Lane) -> None:
        for start, solved in lane.receive():
            n = len(solved.scale)
            codes.narrow(along, start, n).copy_(solved.codes)
            scale[start : start + n], zero[start : start + n] = solved.scale, solved.zero
            errors.append(solved.errors)
            if progress:
                progress(n * group_size)

    starts = range(0, n_groups, n_slab)
    lanes = [_Lane(n_slab * group_size, matrix.dtype, device) for _ in starts[:STREAMS]]
    try:
        for turn, start in enumerate(starts):
            lane = lanes[turn % len(lanes)]
            receive(lane)
            slab = matrix.narrow(along, start, min(n_slab, n_groups - start))
            lane.send(start, slab, spec, energy, factors, rows_per_block)
        for turn in range(len(starts), len(starts) + len(lanes)):
            receive(lanes[turn % len(lanes)])
    finally:
        for lane in lanes:
            lane.wait()  # its buffers must outlive the copies under way
    return Solved(codes, scale, zero, torch.cat(errors))


def _times(groups: torch.Tensor, start: int, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Groups [shape=(n, group_size)], the first of them number `start` of its tensor, times their factors, in float32."""
    number = torch.arange(start, start + len(groups), device=groups.device)
    return groups.float() * columns[number % len(columns)] * rows[number // len(columns), None]


class _Lane:
    """One stream, its page-locked copy of a slab, and what that slab's solve will have brought back."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._staged = torch.empty(numel, dtype=dtype, pin_memory=self._cuda)
        self._under_way: list[tuple[int, Solved]] = []
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which copies the energies

    def send(
        self, start: int, slab: torch.Tensor, spec: QuantSpec, energy: torch.Tensor | None,
        factors: tuple[torch.Tensor, torch.Tensor] | None, rows_per_block: int | None,
    ) -> None:  # fmt: skip
        """Queue copy, solve and copy back of the slab whose first group is `start`; what was sent before is received."""
        staged = self._staged[: slab.numel()].view(slab.shape).copy_(slab)
        with torch.cuda.stream(self._stream) if self._cuda else contextlib.nullcontext():
            there = staged.to(self._device, non_blocking=True)
            if factors is not None:
                there = _times(there, start, *factors)
            solved = solve(there, spec, energy, first_group=start, rows_per_block=rows_per_block)
            here = (self._back(tensor) for tensor in (solved.codes, solved.scale, solved.zero, solved.errors))
            self._under_way.append((start, Solved(*here)))

    def receive(self) -> list[tuple[int, Solved]]:
        """Wait for what was sent: its first group and its solution, if there is any."""
        self.wait()
        done, self._under_way = self._under_way, []
        return done

    def wait(self) -> None:
        """Until nothing is under way."""
        if self._cuda:
            self._stream.synchronize()

    def _back(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._cuda:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
