"""CPU kernels: no checks, preallocated outputs, one thread; `_reference` has the equations and their source.

Precision: weights, codes and residuals float32; per-group sums float32 in vector lanes; the 2 x 2 solve and the reported errors
float64. A group's answer depends on nothing but the group, so thread count and tile size never show in the result.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

f32 = np.float32
FLOAT, INT, NONE = 0, 1, 2  # zero modes
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2  # stored types

# Sums may be split over vector lanes; nothing else may be reordered. Weights are finite, the caller looked.
LANES = {"reassoc", "contract", "nsz", "nnan", "ninf"}
_jit = njit(nogil=True, cache=True, fastmath=LANES, error_model="numpy", boundscheck=False)
_exact = njit(nogil=True, cache=True, inline="always", error_model="numpy")


@_exact
def _round_stored(x, dtype, bits):
    """Round float32 `x` to what `dtype` holds, ties to even; `bits` is a uint32 scratch of length 1."""
    if dtype == FLOAT32:
        return x
    if dtype == FLOAT16 and abs(x) < f32(2.0**-14):
        return f32(np.rint(x * f32(2.0**24)) * f32(2.0**-24))
    drop = np.uint32(13) if dtype == FLOAT16 else np.uint32(16)
    bits.view(np.float32)[0] = x
    word = bits[0]
    half = (np.uint32(1) << np.uint32(drop - np.uint32(1))) - np.uint32(1)
    word = np.uint32(word + half + ((word >> drop) & np.uint32(1)))
    bits[0] = np.uint32(word & ~((np.uint32(1) << drop) - np.uint32(1)))
    return bits.view(np.float32)[0]


@_exact
def _round_scale(scale, floor, low, high, unit, dtype, bits):
    """Clamp and round a scale given in normalized units; one such unit is `unit`, a power of two."""
    absolute = min(max(max(scale, floor) * unit, low), high)
    return np.float64(_round_stored(f32(absolute), dtype, bits)) / unit


@_exact
def _round_zero(zero, max_zero, dtype, bits):
    """Clamp and round a float zero."""
    return np.float64(_round_stored(f32(min(max(zero, -2.0 * max_zero), 2.0 * max_zero)), dtype, bits))


@_jit
def _moments(w, s, z, max_code, p, beta):
    """One pass over a group: objective at (s, z), and the sums that the next least-squares step needs."""
    inverse = f32(1.0) / s
    objective = f32(0.0)
    sum_q = f32(0.0)
    sum_qq = f32(0.0)
    sum_t = f32(0.0)
    sum_qt = f32(0.0)
    if p == f32(2.0):
        for j in range(w.size):
            q = min(max(np.rint(w[j] * inverse + z), f32(0.0)), max_code)
            r = w[j] - s * (q - z)
            objective += r * r
            sum_q += q
            sum_qq += q * q
            sum_t += w[j]
            sum_qt += q * w[j]
    else:
        for j in range(w.size):
            q = min(max(np.rint(w[j] * inverse + z), f32(0.0)), max_code)
            r = w[j] - s * (q - z)
            x = max(abs(r) * inverse, f32(1e-12))
            power = f32(math.exp((p - f32(1.0)) * math.log(x)))  # x ** (p - 1)
            objective += power * x
            t = w[j] - math.copysign(max(x - power / beta, f32(0.0)) * s, r)
            sum_q += q
            sum_qq += q * q
            sum_t += t
            sum_qt += q * t
        objective *= s**p
    return objective, np.float64(sum_q), np.float64(sum_qq), np.float64(sum_t), np.float64(sum_qt)


@_jit
def _fit_scale(sum_q, sum_qq, sum_t, sum_qt, n, zero, scale, low, high, unit, dtype, bits):
    """Least-squares scale for a given zero, and how much of the target's square it explains."""
    cross = sum_qt - zero * sum_t
    square = sum_qq - 2.0 * zero * sum_q + n * zero * zero
    fitted = cross / square if square > 0.0 else scale
    fitted = _round_scale(fitted, 0.0, low, high, unit, dtype, bits)
    return fitted, fitted * (2.0 * cross - fitted * square)


@_jit
def _start(w, mode, max_code, middle, floor, low, high, max_zero, unit, dtype, bits):
    """Round to nearest between the smallest and the largest weight."""
    smallest = w[0]
    largest = w[0]
    for j in range(w.size):
        smallest = min(smallest, w[j])
        largest = max(largest, w[j])
    small = np.float64(smallest)
    large = np.float64(largest)
    if mode == NONE:
        scale = max(-small / middle, large / max(max_code - middle, 0.5))
        return _round_scale(scale, floor, low, high, unit, dtype, bits), middle
    if small == large:
        return _round_scale(abs(small), floor, low, high, unit, dtype, bits), (1.0 if small < 0.0 else 0.0)
    if mode == INT:
        small = min(small, 0.0)
        large = max(large, 0.0)
    scale = _round_scale((large - small) / max_code, floor, low, high, unit, dtype, bits)
    if mode == INT:
        return scale, min(max(np.rint(-small / scale), 0.0), max_code)
    return scale, _round_zero(-small / scale, max_zero, dtype, bits)


@_jit
def _solve_group(w, mode, max_code, middle, floor, low, high, max_zero, unit, dtype, iters, p, beta, kappa, bits):
    """Alternate codes, shrinkage and least squares; return the best (scale, zero) seen."""
    n = np.float64(w.size)
    scale, zero = _start(w, mode, max_code, middle, floor, low, high, max_zero, unit, dtype, bits)
    best_scale, best_zero, best = scale, zero, np.inf
    for i in range(iters + 1):
        objective, sum_q, sum_qq, sum_t, sum_qt = _moments(w, f32(scale), f32(zero), f32(max_code), f32(p), f32(beta))
        if not objective < best:
            break  # this group stopped improving
        best_scale, best_zero, best = scale, zero, np.float64(objective)
        if i == iters:
            break
        beta *= kappa
        if mode == NONE:
            scale, _ = _fit_scale(sum_q, sum_qq, sum_t, sum_qt, n, zero, scale, low, high, unit, dtype, bits)
            continue
        var = sum_qq - sum_q * sum_q / n
        cov = sum_qt - sum_q * sum_t / n
        joint = _round_scale(cov / var if var > 0.0 else scale, floor, low, high, unit, dtype, bits)
        joint_zero = sum_q / n - sum_t / n / joint
        if mode == FLOAT:
            scale, zero = joint, _round_zero(joint_zero, max_zero, dtype, bits)
            continue
        below = min(max(np.floor(joint_zero), 0.0), max_code)
        above = min(below + 1.0, max_code)
        below_scale, below_gain = _fit_scale(
            sum_q, sum_qq, sum_t, sum_qt, n, below, scale, low, high, unit, dtype, bits
        )
        above_scale, above_gain = _fit_scale(
            sum_q, sum_qq, sum_t, sum_qt, n, above, scale, low, high, unit, dtype, bits
        )
        scale, zero = (above_scale, above) if above_gain > below_gain else (below_scale, below)
    return best_scale, best_zero


@_jit
def _encode(w, s, z, max_code, codes):
    """Final codes of one group; returns its squared error and squared norm, in normalized units."""
    inverse = f32(1.0) / s
    error = f32(0.0)
    norm = f32(0.0)
    for j in range(w.size):
        q = min(max(np.rint(w[j] * inverse + z), f32(0.0)), max_code)
        r = w[j] - s * (q - z)
        error += r * r
        norm += w[j] * w[j]
        codes[j] = np.uint8(q)
    return np.float64(error), np.float64(norm)


@_jit
def solve_tile(W, codes, scale, zero, mode, max_code, middle, dtype, low, high, max_zero, iters, p, beta, kappa):
    """Solve every row of W as one group.

    Parameters
    ----------
    W : ndarray [shape=(n_groups, group_size)], float32
        Finite weights; normalized in place.
    codes : ndarray [shape=(n_groups, group_size)], uint8, out
    scale, zero : ndarray [shape=(n_groups,)], float32, out
        Values that the stored type holds exactly.

    Returns
    -------
    squared_error, squared_norm : float
    """
    bits = np.empty(1, dtype=np.uint32)
    smallest = math.frexp(low)[1]
    squared_error = 0.0
    squared_norm = 0.0
    for i in range(W.shape[0]):
        w = W[i]
        largest = f32(0.0)
        for j in range(w.size):
            largest = max(largest, abs(w[j]))
        exponent = max(math.frexp(largest)[1], smallest)  # so that 2 ** -exponent and the squares are finite
        unit = math.ldexp(1.0, exponent)
        shrunk = f32(math.ldexp(1.0, -exponent))
        for j in range(w.size):
            w[j] *= shrunk
        floor = np.float64(largest) / unit / max_zero if mode == FLOAT else 0.0
        s, z = _solve_group(
            w, mode, max_code, middle, floor, low, high, max_zero, unit, dtype, iters, p, beta, kappa, bits
        )
        error, norm = _encode(w, f32(s), f32(z), f32(max_code), codes[i])
        scale[i] = f32(s * unit)
        zero[i] = f32(z)
        squared_error += error * unit * unit
        squared_norm += norm * unit * unit
    return squared_error, squared_norm
