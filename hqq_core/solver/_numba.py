"""CPU kernels: no checks, preallocated outputs, one thread; `_reference` has the equations and their source.

Groups lie side by side in vector lanes: a block is LANES groups, transposed, so that a sum over a group never crosses lanes.
Nothing is reordered, and so neither thread count, tile size nor vector width shows in the result.

Precision: weights, codes and residuals float32; per-group sums float32; the 2 x 2 solve and the reported errors float64.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

f32, f64, u32 = np.float32, np.float64, np.uint32
FLOAT, INT, NONE = 0, 1, 2  # zero modes
LANES = 32
LARGEST = np.finfo(np.float32).max

# A block's state: rows of LANES numbers in one float32 and one float64 buffer. One buffer each, so that the compiler sees that
# rows do not overlap.
SCALE, ZERO, INVERSE, OBJECTIVE, SUM_Q, SUM_QQ, SUM_T, SUM_QT = (LANES * i for i in range(8))
BEST_SCALE, BEST_ZERO, BEST, ACTIVE = (LANES * i for i in range(8, 12))
N_FLOAT32 = 12 * LANES
FLOOR, UNIT, PER_UNIT = (LANES * i for i in range(3))
N_FLOAT64 = 3 * LANES

# Multiply-adds may be fused; sums keep their order. Weights are finite, the caller looked.
_jit = njit(nogil=True, cache=True, fastmath={"contract", "nsz", "nnan", "ninf"}, error_model="numpy")
_inline = njit(nogil=True, inline="always", error_model="numpy")


@_inline
def _round_stored(x, stored):
    """Round float32 to the stored type, ties to even, without a branch; `stored` is `rounding(dtype)`."""
    half, lowest, keep, drop, limit = stored
    word = f32(x).view(u32)
    normal = u32((u32(word + half + ((word >> drop) & lowest))) & keep).view(f32)
    subnormal = f32(np.rint(x * f32(2.0**24)) * f32(2.0**-24))
    return subnormal if abs(x) < limit else normal


@_inline
def _round_scale(scale, floor, low, high, unit, per_unit, stored):
    """Clamp and round a scale given in normalized units; one such unit is `unit`, a power of two."""
    absolute = min(max(max(scale, floor) * unit, low), high)
    return f64(_round_stored(f32(absolute), stored)) * per_unit


@_inline
def _round_zero(zero, max_zero, stored):
    """Clamp and round a float zero."""
    return _round_stored(f32(min(max(zero, -2.0 * max_zero), 2.0 * max_zero)), stored)


@_inline
def _code(w, inverse, zero, max_code):
    return min(max(np.rint(w * inverse + zero), f32(0.0)), max_code)


@_jit
def _load(W, first, T, D, mode, low, max_zero):
    """Transpose LANES groups into T and scale each by a power of two to max|w| in [0.5, 1), or less below `low`."""
    n = W.shape[1]
    smallest = math.frexp(low)[1]
    for lane in range(LANES):
        row = first + lane
        if row >= W.shape[0]:
            for j in range(n):
                T[j * LANES + lane] = f32(0.0)
            D[UNIT + lane] = D[PER_UNIT + lane] = 1.0
            D[FLOOR + lane] = 0.0
            continue
        largest = f32(0.0)
        for j in range(n):
            largest = max(largest, abs(W[row, j]))
        exponent = max(math.frexp(largest)[1], smallest)  # so that its inverse and the squares are finite
        D[UNIT + lane] = math.ldexp(1.0, exponent)
        D[PER_UNIT + lane] = math.ldexp(1.0, -exponent)
        D[FLOOR + lane] = f64(largest) * D[PER_UNIT + lane] / max_zero if mode == FLOAT else 0.0
        shrunk = f32(D[PER_UNIT + lane])
        for j in range(n):
            T[j * LANES + lane] = W[row, j] * shrunk


@_jit
def _start(T, F, D, mode, max_code, middle, low, high, max_zero, stored):
    """Round to nearest between the smallest and the largest weight."""
    n = T.size // LANES
    for lane in range(LANES):
        F[SUM_Q + lane] = F[SUM_QQ + lane] = T[lane]
    for j in range(1, n):
        for lane in range(LANES):
            F[SUM_Q + lane] = min(F[SUM_Q + lane], T[j * LANES + lane])
            F[SUM_QQ + lane] = max(F[SUM_QQ + lane], T[j * LANES + lane])
    for lane in range(LANES):
        small, large = f64(F[SUM_Q + lane]), f64(F[SUM_QQ + lane])
        constant = small == large
        if mode == NONE:
            scale, zero = max(-small / middle, large / max(max_code - middle, 0.5)), middle
        elif constant:
            scale, zero = abs(small), (1.0 if small < 0.0 else 0.0)
        else:
            if mode == INT:
                small, large = min(small, 0.0), max(large, 0.0)
            scale, zero = (large - small) / max_code, 0.0
        scale = _round_scale(scale, D[FLOOR + lane], low, high, D[UNIT + lane], D[PER_UNIT + lane], stored)
        if mode == INT and not constant:
            zero = min(max(np.rint(-small / scale), 0.0), max_code)
        if mode == FLOAT and not constant:
            zero = f64(_round_zero(-small / scale, max_zero, stored))
        F[SCALE + lane] = F[BEST_SCALE + lane] = f32(scale)
        F[ZERO + lane] = F[BEST_ZERO + lane] = f32(zero)
        F[BEST + lane] = LARGEST
        F[ACTIVE + lane] = f32(1.0)


@_jit
def _moments(T, F, max_code):
    """One pass over a block: squared error at (scale, zero), and the sums that the next least-squares step needs."""
    n = T.size // LANES
    for lane in range(LANES):
        F[INVERSE + lane] = f32(1.0) / F[SCALE + lane]
    for row in range(OBJECTIVE, BEST_SCALE):
        F[row] = f32(0.0)
    whole = n - n % 4
    for j in range(0, whole, 4):
        for lane in range(LANES):
            s, z, inverse = F[SCALE + lane], F[ZERO + lane], F[INVERSE + lane]
            at = j * LANES + lane
            w0, w1, w2, w3 = T[at], T[at + LANES], T[at + 2 * LANES], T[at + 3 * LANES]
            q0, q1 = _code(w0, inverse, z, max_code), _code(w1, inverse, z, max_code)
            q2, q3 = _code(w2, inverse, z, max_code), _code(w3, inverse, z, max_code)
            r0, r1, r2, r3 = w0 - s * (q0 - z), w1 - s * (q1 - z), w2 - s * (q2 - z), w3 - s * (q3 - z)
            F[OBJECTIVE + lane] += (r0 * r0 + r1 * r1) + (r2 * r2 + r3 * r3)
            F[SUM_Q + lane] += (q0 + q1) + (q2 + q3)
            F[SUM_QQ + lane] += (q0 * q0 + q1 * q1) + (q2 * q2 + q3 * q3)
            F[SUM_T + lane] += (w0 + w1) + (w2 + w3)
            F[SUM_QT + lane] += (q0 * w0 + q1 * w1) + (q2 * w2 + q3 * w3)
    for j in range(whole, n):
        for lane in range(LANES):
            w = T[j * LANES + lane]
            q = _code(w, F[INVERSE + lane], F[ZERO + lane], max_code)
            r = w - F[SCALE + lane] * (q - F[ZERO + lane])
            F[OBJECTIVE + lane] += r * r
            F[SUM_Q + lane] += q
            F[SUM_QQ + lane] += q * q
            F[SUM_T + lane] += w
            F[SUM_QT + lane] += q * w


@_jit
def _moments_shrunk(T, F, max_code, p, beta):
    """As `_moments`, with the lp objective and the least-squares target behind the shrinkage step."""
    n = T.size // LANES
    for row in range(OBJECTIVE, BEST_SCALE):
        F[row] = f32(0.0)
    for j in range(n):
        for lane in range(LANES):
            w, s, z = T[j * LANES + lane], F[SCALE + lane], F[ZERO + lane]
            inverse = f32(1.0) / s
            q = _code(w, inverse, z, max_code)
            r = w - s * (q - z)
            x = max(abs(r) * inverse, f32(1e-12))
            power = f32(math.exp((p - f32(1.0)) * math.log(x)))  # x ** (p - 1)
            t = w - math.copysign(max(x - power / beta, f32(0.0)) * s, r)
            F[OBJECTIVE + lane] += power * x * s**p
            F[SUM_Q + lane] += q
            F[SUM_QQ + lane] += q * q
            F[SUM_T + lane] += t
            F[SUM_QT + lane] += q * t


@_jit
def _keep_best(F):
    """Keep what improved; a group that stops improving stops for good. Returns how many go on."""
    active = f32(0.0)
    for lane in range(LANES):
        improved = F[ACTIVE + lane] if F[OBJECTIVE + lane] < F[BEST + lane] else f32(0.0)
        go_on = improved > f32(0.0)
        F[BEST + lane] = F[OBJECTIVE + lane] if go_on else F[BEST + lane]
        F[BEST_SCALE + lane] = F[SCALE + lane] if go_on else F[BEST_SCALE + lane]
        F[BEST_ZERO + lane] = F[ZERO + lane] if go_on else F[BEST_ZERO + lane]
        F[ACTIVE + lane] = improved
        active += improved
    return active


@_jit
def _fit_float(F, D, n, low, high, max_zero, stored):
    """Least squares in (scale, zero)."""
    for lane in range(LANES):
        sum_q, sum_t = f64(F[SUM_Q + lane]), f64(F[SUM_T + lane])
        var = f64(F[SUM_QQ + lane]) - sum_q * sum_q / n
        cov = f64(F[SUM_QT + lane]) - sum_q * sum_t / n
        joint = cov / (var if var > 0.0 else 1.0)
        joint = joint if var > 0.0 else f64(F[SCALE + lane])
        joint = _round_scale(joint, D[FLOOR + lane], low, high, D[UNIT + lane], D[PER_UNIT + lane], stored)
        F[SCALE + lane] = f32(joint)
        F[ZERO + lane] = _round_zero((sum_q - sum_t / joint) / n, max_zero, stored)


@_inline
def _fit_scale(sum_q, sum_qq, sum_t, sum_qt, n, zero, scale, low, high, unit, per_unit, stored):
    """Least-squares scale for a given zero, and how much of the target's square it explains."""
    cross = sum_qt - zero * sum_t
    square = sum_qq - 2.0 * zero * sum_q + n * zero * zero
    fitted = cross / (square if square > 0.0 else 1.0)
    fitted = _round_scale(fitted if square > 0.0 else scale, 0.0, low, high, unit, per_unit, stored)
    return fitted, fitted * (2.0 * cross - fitted * square)


@_jit
def _fit_int(F, D, n, max_code, low, high, stored):
    """Least squares in (scale, whole zero): the better of the two neighbours of the real optimum, each with its own scale."""
    for lane in range(LANES):
        sum_q, sum_qq = f64(F[SUM_Q + lane]), f64(F[SUM_QQ + lane])
        sum_t, sum_qt = f64(F[SUM_T + lane]), f64(F[SUM_QT + lane])
        scale, unit, per_unit = f64(F[SCALE + lane]), D[UNIT + lane], D[PER_UNIT + lane]
        var = sum_qq - sum_q * sum_q / n
        cov = sum_qt - sum_q * sum_t / n
        joint = cov / (var if var > 0.0 else 1.0)
        joint = _round_scale(joint if var > 0.0 else scale, 0.0, low, high, unit, per_unit, stored)
        below = min(max(math.floor((sum_q - sum_t / joint) / n), 0.0), max_code)
        above = min(below + 1.0, max_code)
        scale_below, gain_below = _fit_scale(
            sum_q, sum_qq, sum_t, sum_qt, n, below, scale, low, high, unit, per_unit, stored
        )
        scale_above, gain_above = _fit_scale(
            sum_q, sum_qq, sum_t, sum_qt, n, above, scale, low, high, unit, per_unit, stored
        )
        F[SCALE + lane] = f32(scale_above if gain_above > gain_below else scale_below)
        F[ZERO + lane] = f32(above if gain_above > gain_below else below)


@_jit
def _fit_none(F, D, n, middle, low, high, stored):
    """Least squares in the scale alone."""
    for lane in range(LANES):
        fitted, _ = _fit_scale(
            f64(F[SUM_Q + lane]), f64(F[SUM_QQ + lane]), f64(F[SUM_T + lane]), f64(F[SUM_QT + lane]), n, middle,
            f64(F[SCALE + lane]), low, high, D[UNIT + lane], D[PER_UNIT + lane], stored,
        )  # fmt: skip
        F[SCALE + lane] = f32(fitted)


@_jit
def _encode(T, F, Q, max_code):
    """Codes at the best (scale, zero); leaves squared errors in OBJECTIVE and squared norms in SUM_QQ, in normalized units."""
    for lane in range(LANES):
        F[INVERSE + lane] = f32(1.0) / F[BEST_SCALE + lane]
        F[OBJECTIVE + lane] = F[SUM_QQ + lane] = f32(0.0)
    for j in range(T.size // LANES):
        for lane in range(LANES):
            w, z = T[j * LANES + lane], F[BEST_ZERO + lane]
            q = _code(w, F[INVERSE + lane], z, max_code)
            r = w - F[BEST_SCALE + lane] * (q - z)
            F[OBJECTIVE + lane] += r * r
            F[SUM_QQ + lane] += w * w
            Q[j * LANES + lane] = np.uint8(q)


@_jit
def solve_tile(W, codes, scale, zero, mode, max_code, middle, stored, low, high, max_zero, iters, p, beta, kappa):
    """Solve every row of W as one group.

    Parameters
    ----------
    W : ndarray [shape=(n_groups, group_size)], float32
        Finite weights.
    codes : ndarray [shape=(n_groups, group_size)], uint8, out
    scale, zero : ndarray [shape=(n_groups,)], float32, out
        Values that the stored type holds exactly.

    Returns
    -------
    squared_error, squared_norm : float
    """
    n = W.shape[1]
    T, Q = np.empty(n * LANES, f32), np.empty(n * LANES, np.uint8)
    F, D = np.empty(N_FLOAT32, f32), np.empty(N_FLOAT64, f64)
    squared_error = squared_norm = 0.0
    for first in range(0, W.shape[0], LANES):
        _load(W, first, T, D, mode, low, max_zero)
        _start(T, F, D, mode, max_code, middle, low, high, max_zero, stored)
        penalty = beta
        for i in range(iters + 1):
            if p == 2.0:
                _moments(T, F, f32(max_code))
            else:
                _moments_shrunk(T, F, f32(max_code), f32(p), f32(penalty))
            if _keep_best(F) == 0.0 or i == iters:
                break
            penalty *= kappa
            if mode == FLOAT:
                _fit_float(F, D, f64(n), low, high, max_zero, stored)
            elif mode == INT:
                _fit_int(F, D, f64(n), max_code, low, high, stored)
            else:
                _fit_none(F, D, f64(n), middle, low, high, stored)
        _encode(T, F, Q, f32(max_code))
        for lane in range(min(LANES, W.shape[0] - first)):
            row, unit = first + lane, D[UNIT + lane]
            scale[row] = f32(f64(F[BEST_SCALE + lane]) * unit)
            zero[row] = F[BEST_ZERO + lane]
            squared_error += f64(F[OBJECTIVE + lane]) * unit * unit
            squared_norm += f64(F[SUM_QQ + lane]) * unit * unit
            for j in range(n):
                codes[row, j] = Q[j * LANES + lane]
    return squared_error, squared_norm


def rounding(drop: int, subnormal_below: float) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32, np.float32]:
    """What `_round_stored` needs: for a type that drops so many bits of float32, subnormal (as float16 is) below a limit."""
    if drop == 0:
        return u32(0), u32(0), u32(0xFFFFFFFF), u32(0), f32(0)
    return u32((1 << (drop - 1)) - 1), u32(1), u32(0xFFFFFFFF ^ ((1 << drop) - 1)), u32(drop), f32(subnormal_below)
