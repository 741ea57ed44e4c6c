"""The last step: codes, scales and zeros that answer to each other across a whole row, by the correlations of its inputs.

A row's objective is GPTQ's (arXiv 2210.17323), E|(dequantized - V) x|^2 = u^T R u, with u_j = e_j h_j^(1/2) the error of a column
times the root of its energy, and R the correlations of the columns. Codes descend on it one at a time, as QuantEase's do
(arXiv 2309.01885); then (scale, zero) of each group are fitted to it, and codes descend once more. No step raises the objective,
but for float32.

A block of rows goes through the columns together, so that a row of C is read once for all of them. Nothing is reordered, and so
neither thread count, block size nor vector width shows in the result.

Precision: weights, u and the gradient g = R u float32; the fit and the reported errors float64. Rows are scaled by powers of two.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from hqq_core.solver._numba import FLOAT, MAGNITUDE, OFFSET, _power_of_two, _round_stored, _round_zero

f32, f64, i64, u32 = np.float32, np.float64, np.int64, np.uint32

# Share of a correlation that is believed: those of random tokens are noisy. 0.2 to 0.3 gave the least KL, 0.5 gained nothing,
# and more made it worse.
BELIEVED = 0.25
SWEEPS = 4  # at most, before the fit and after it: most rows come to rest earlier
# A code changes where that gains this share of its step's square: float32 sums may hide less.
MARGIN = 2.0**-12
LOWEST_ENERGY = 1e-6  # of the mean; codes of a column below it would pay for all others' errors, and so they stay
SINGULAR = 1e-9  # of a group's scale and zero, the determinant: its codes are all alike
TINY = 2.0**-100  # smallest scale in a row's units that is divided by

# Rows of C in float32 at a time, and how much of each: they stay in the first-level cache.
TAPS, WIDTH = 8, 512

_jit = njit(nogil=True, cache=True, fastmath={"contract", "nsz", "nnan", "ninf"}, error_model="numpy")


@_jit
def _convert(correlations, out, factor):
    """A row of C as one of R, but for the diagonal."""
    for k in range(correlations.size):
        out[k] = f32(correlations[k]) * factor


@_jit
def _add(x, R, out):
    """Add x R, for one row of R."""
    for k in range(out.size):
        out[k] += x * R[k]


@_jit
def _add_taps(x, R, out):
    """Add x R, for TAPS rows of R: their multipliers fill half the registers."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    for k in range(out.size):
        near = out[k] + x0 * R[k] + x1 * R[WIDTH + k] + x2 * R[2 * WIDTH + k] + x3 * R[3 * WIDTH + k]
        far = x4 * R[4 * WIDTH + k] + x5 * R[5 * WIDTH + k] + x6 * R[6 * WIDTH + k] + x7 * R[7 * WIDTH + k]
        out[k] = near + far


@_jit
def _spread(X, C, first, stop, low, high, out):
    """out[:, low:high] += X[:, first:stop] R[first:stop, low:high]."""
    factor = f32(BELIEVED / 127.0)
    R, x = np.zeros(TAPS * WIDTH, f32), np.zeros(TAPS, f32)
    for j in range(first, stop, TAPS):
        n = min(TAPS, stop - j)
        for left in range(low, high, WIDTH):
            right = min(left + WIDTH, high)
            for i in range(n):
                _convert(C[j + i, left:right], R[i * WIDTH : i * WIDTH + right - left], factor)
                if left <= j + i < right:
                    R[i * WIDTH + j + i - left] = f32(1.0)
            for r in range(X.shape[0]):
                for i in range(TAPS):
                    x[i] = X[r, j + i] if i < n else f32(0.0)
                _add_taps(x, R, out[r, left:right])


@_jit
def _load(W, columns, rows, low, V, units):
    """W times its factors in V, each row scaled by units[r], a power of two, to max|v| in [0.5, 1), or less below `low`."""
    shift = u32(32 - 8 * W.itemsize)
    smallest = math.frexp(low)[1]
    for r in range(W.shape[0]):
        largest = u32(0)
        for j in range(W.shape[1]):
            v = u32(u32(W[r, j]) << shift).view(f32) * columns[j] * rows[r]
            V[r, j] = v
            largest = max(largest, u32(f32(v).view(u32) & MAGNITUDE))
        units[r] = _power_of_two(-max(i64(largest >> u32(23)) - 126, smallest))
        unit = f32(units[r])
        for j in range(W.shape[1]):
            V[r, j] *= unit


@_jit
def _residuals(V, codes, S, Z, roots, group_size, first, stop, U):
    """U = (dequantized - V) h^(1/2) of the columns first to stop."""
    for r in range(V.shape[0]):
        for j in range(first, stop):
            group = j // group_size
            U[r, j] = ((f32(codes[r, j]) - Z[r, group]) * S[r, group] - V[r, j]) * roots[j]


@_jit
def _descend(V, codes, S, Z, roots, lowest, C, group_size, max_code, U, G, R):
    """Codes one column at a time, for a row until a sweep changes none of it; U and its gradient G follow."""
    active = np.ones(V.shape[0], np.bool_)
    inverse = np.empty(V.shape[0], f32)
    for _ in range(SWEEPS):
        changed = np.zeros(V.shape[0], np.bool_)
        for j in range(V.shape[1]):
            group, root = j // group_size, roots[j]
            if j % group_size == 0:
                for r in range(V.shape[0]):
                    inverse[r] = f32(1.0) / (S[r, group] if abs(S[r, group]) > f32(TINY) else f32(TINY))
            if root < lowest:
                continue
            per_root, converted = f32(1.0) / root, False
            for r in range(V.shape[0]):
                if not active[r]:
                    continue
                v, u, g, s, z = V[r, j], U[r, j], G[r, j], S[r, group], Z[r, group]
                q = min(max(np.rint((v + (u - g) * per_root) * inverse[r] + z), f32(0.0)), max_code)
                if q == f32(codes[r, j]):
                    continue
                new = ((q - z) * s - v) * root
                step = new - u
                slope = f32(2.0) * g + f32(1.0 + MARGIN) * step
                if not ((step > f32(0.0) and slope < f32(0.0)) or (step < f32(0.0) and slope > f32(0.0))):
                    continue
                if not converted:
                    _convert(C[j], R, f32(BELIEVED / 127.0))
                    R[j], converted = f32(1.0), True
                codes[r, j], U[r, j], changed[r] = np.uint8(q), new, True
                _add(step, R, G[r])
        active &= changed
        if not active.any():
            break


@_jit
def _fit(V, codes, S, Z, roots, units, C, group_size, mode, stored, low, high, max_zero, U, G, X, M, scale, zero):
    """Least squares in (scale, zero) of each group, or in the scale alone; taken where the rounded values lower the objective.

    With a centre c, e = (q - c) s + (c - z) s - v moves along A = (q - c) h^(1/2) by ds, and along B = h^(1/2) by the change dt
    of (c - z) s. X and M are scratch.
    """
    n_rows = V.shape[0]
    centres = np.empty(n_rows, f32)
    ones, spread_ones = np.empty((1, V.shape[1]), f32), np.empty((1, V.shape[1]), f32)
    for group in range(S.shape[1]):
        first, stop = group * group_size, (group + 1) * group_size
        total = square_b = 0.0
        if mode == FLOAT:
            for j in range(first, stop):
                ones[0, j], spread_ones[0, j] = roots[j], f32(0.0)
                total += f64(roots[j]) * f64(roots[j])
            _spread(ones, C, first, stop, first, stop, spread_ones)
            for j in range(first, stop):
                square_b += f64(roots[j]) * f64(spread_ones[0, j])
        for r in range(n_rows):
            centres[r] = Z[r, group]
            if mode == FLOAT and total > 0.0:
                weighted = 0.0
                for j in range(first, stop):
                    weighted += f64(roots[j]) * f64(roots[j]) * f64(codes[r, j])
                centres[r] = f32(weighted / total)
            for j in range(first, stop):
                X[r, j], M[r, j] = (f32(codes[r, j]) - centres[r]) * roots[j], f32(0.0)
        _spread(X, C, first, stop, first, stop, M)
        moved = False
        for r in range(n_rows):
            s, z, c, unit = f64(S[r, group]), f64(Z[r, group]), f64(centres[r]), units[r]
            square_a = cross = slope_a = slope_b = 0.0
            for j in range(first, stop):
                square_a += f64(X[r, j]) * f64(M[r, j])
                cross += f64(roots[j]) * f64(M[r, j])
                slope_a += f64(X[r, j]) * f64(G[r, j])
                slope_b += f64(roots[j]) * f64(G[r, j])
                X[r, j] = f32(0.0)
            free_zero = mode == FLOAT
            determinant = square_a * square_b - cross * cross if free_zero else square_a
            if not determinant > (SINGULAR * square_a * square_b if free_zero else 0.0):
                continue
            step = (cross * slope_b - square_b * slope_a) / determinant if free_zero else -slope_a / determinant
            sign = -1.0 if s < 0.0 else 1.0
            absolute = _round_stored(f32(min(max(sign * (s + step) / unit, low), high)), stored) * f32(sign)
            new_s, new_z = f64(absolute) * unit, z
            if not 0.5 * abs(s) <= sign * new_s <= 2.0 * abs(s):
                continue
            ds = new_s - s
            if free_zero:
                offset = (c - z) * s - (slope_b + cross * ds) / square_b
                new_z = f64(_round_zero(f32(c - offset / new_s), max_zero, stored))
            dt = (c - new_z) * new_s - (c - z) * s
            change = 2.0 * (ds * slope_a + dt * slope_b) if free_zero else 2.0 * ds * slope_a
            change += ds * ds * square_a
            if free_zero:
                change += 2.0 * ds * dt * cross + dt * dt * square_b
            if not change < 0.0:
                continue
            S[r, group], Z[r, group] = f32(new_s), f32(new_z)
            scale[r, group], zero[r, group] = absolute, f32(new_z)
            for j in range(first, stop):
                new = ((f32(codes[r, j]) - Z[r, group]) * S[r, group] - V[r, j]) * roots[j]
                X[r, j], U[r, j] = new - U[r, j], new
            moved = True
        if moved:
            _spread(X, C, first, stop, 0, V.shape[1], G)


@_jit
def refine_rows(
    W, columns, rows, roots, C, codes, scale, zero, errors, group_size,
    mode, max_code, stored, low, high, max_zero,
):  # fmt: skip
    """Refine a block of rows in place.

    Parameters
    ----------
    W : ndarray [shape=(rows, n)], uint16 or uint32
        Weights as words: the upper half of a float32 (bfloat16), or all of it. Finite, and so are the products with factors.
    columns, rows : ndarray [shape=(n,)] and [shape=(rows,)], float32
        What was solved is V = W times both.
    roots : ndarray [shape=(n,)], float32
        Roots of the energies, whose mean is one.
    C : ndarray [shape=(n, n)], int8
        Correlations times 127, symmetric; the diagonal is not read.
    codes : ndarray [shape=(rows, n)], uint8, in and out
    scale, zero : ndarray [shape=(rows, n / group_size)], float32, in and out
        Values that the stored type holds exactly.
    errors : ndarray [shape=(rows,)], float64, out
        Squared errors of V, not weighted.
    """
    n_rows, n = W.shape
    V, U, G = np.empty((n_rows, n), f32), np.empty((n_rows, n), f32), np.zeros((n_rows, n), f32)
    X, M, R = np.empty((n_rows, n), f32), np.empty((n_rows, n), f32), np.empty(n, f32)
    S, units = np.empty(scale.shape, f32), np.empty(n_rows, f64)
    lowest = f32(math.sqrt(LOWEST_ENERGY))
    _load(W, columns, rows, low, V, units)
    for r in range(n_rows):
        for group in range(S.shape[1]):
            S[r, group] = f32(f64(scale[r, group]) * units[r])
    Z = zero.copy()
    _residuals(V, codes, S, Z, roots, group_size, 0, n, U)
    _spread(U, C, 0, n, 0, n, G)
    _descend(V, codes, S, Z, roots, lowest, C, group_size, f32(max_code), U, G, R)
    if mode != OFFSET:  # a scale that moved alone would leave an offset that no stored value is
        _fit(V, codes, S, Z, roots, units, C, group_size, mode, stored, low, high, max_zero, U, G, X, M, scale, zero)
        _descend(V, codes, S, Z, roots, lowest, C, group_size, f32(max_code), U, G, R)
    for r in range(n_rows):
        total = 0.0
        for j in range(n):
            group = j // group_size
            e = (f64(codes[r, j]) - f64(Z[r, group])) * f64(S[r, group]) - f64(V[r, j])
            total += e * e
        errors[r] = total / (units[r] * units[r])
