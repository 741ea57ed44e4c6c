"""CPU kernel for scales within super-blocks (ggml's K types): integers per group, times one float16 per 256 weights.

As in `_numba`, what belongs to one row lies in one vector lane: a block is LANES rows by one super-block, and no sum crosses
lanes.
`_superblocks_reference` has the same search in float64.

Precision: weights, codes, residuals and the sums of a group float32; sums over groups and all fits float64.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hqq_core.solver._numba import (
    LANES,
    N_FLOAT32,
    N_FLOAT64,
    OFFSET,
    PER_UNIT,
    UNIT,
    _copy,
    _load,
    _round_stored,
    _to_rows,
)
from hqq_core.solver._superblocks_reference import SINGULAR

f32, f64 = np.float32, np.float64
SMALLEST = 2.0**-24  # float16's, which weights below it are not scaled up to

# State of one group: rows of LANES numbers in one buffer.
OBJECTIVE, SUM_Q, SUM_QQ, SUM_R, SUM_QR = (LANES * i for i in range(5))
STEP, BASE, INVERSE, UNIT_D, UNIT_M = (LANES * i for i in range(5, 10))
SCALE, MIN, BEST, BEST_SCALE, BEST_MIN, BEST_Q = (LANES * i for i in range(10, 16))
CENTRE, CENTRE_MIN, CENTRE_Q = (LANES * i for i in range(16, 19))
N_STATE = 19 * LANES

_jit = njit(nogil=True, cache=True, fastmath={"contract", "nsz", "nnan", "ninf"}, error_model="numpy")
_inline = njit(nogil=True, inline="always", error_model="numpy")


@_inline
def _residual(w, offset, step, inverse, low, high):
    """Code of a weight, and what is left of it."""
    v = w - offset
    q = min(max(np.rint(v * inverse), low), high)
    return q, v - step * q


@_jit
def _place(F):
    """Step and offset of the integers in SCALE and MIN."""
    for lane in range(LANES):
        step = F[UNIT_D + lane] * F[SCALE + lane]
        F[STEP + lane] = step
        F[BASE + lane] = -F[UNIT_M + lane] * F[MIN + lane]
        F[INVERSE + lane] = f32(1.0) / step if step != f32(0.0) else f32(0.0)


@_jit
def _errors(T, H, F, low, high):
    """Weighted squared error at SCALE and MIN."""
    _place(F)
    for lane in range(LANES):
        F[OBJECTIVE + lane] = f32(0.0)
    n = H.size
    # All of it; written so, the compiler sees that j does not wrap, and is ten times faster.
    for j in range(0, n - n % 4, 4):
        h0, h1, h2, h3 = H[j], H[j + 1], H[j + 2], H[j + 3]
        for lane in range(LANES):
            at, o, s, inverse = j * LANES + lane, F[BASE + lane], F[STEP + lane], F[INVERSE + lane]
            _, r0 = _residual(T[at], o, s, inverse, low, high)
            _, r1 = _residual(T[at + LANES], o, s, inverse, low, high)
            _, r2 = _residual(T[at + 2 * LANES], o, s, inverse, low, high)
            _, r3 = _residual(T[at + 3 * LANES], o, s, inverse, low, high)
            F[OBJECTIVE + lane] += (h0 * r0 * r0 + h1 * r1 * r1) + (h2 * r2 * r2 + h3 * r3 * r3)


@_jit
def _moments(T, H, F, low, high):
    """The same, and the sums that least squares needs, at STEP, BASE and INVERSE."""
    for row in range(SUM_QR + LANES):
        F[row] = f32(0.0)
    n = H.size
    for j in range(0, n - n % 4, 4):
        h0, h1, h2, h3 = H[j], H[j + 1], H[j + 2], H[j + 3]
        for lane in range(LANES):
            at, o, s, inverse = j * LANES + lane, F[BASE + lane], F[STEP + lane], F[INVERSE + lane]
            q0, r0 = _residual(T[at], o, s, inverse, low, high)
            q1, r1 = _residual(T[at + LANES], o, s, inverse, low, high)
            q2, r2 = _residual(T[at + 2 * LANES], o, s, inverse, low, high)
            q3, r3 = _residual(T[at + 3 * LANES], o, s, inverse, low, high)
            p0, p1, p2, p3 = h0 * q0, h1 * q1, h2 * q2, h3 * q3
            e0, e1, e2, e3 = h0 * r0, h1 * r1, h2 * r2, h3 * r3
            F[OBJECTIVE + lane] += (e0 * r0 + e1 * r1) + (e2 * r2 + e3 * r3)
            F[SUM_Q + lane] += (p0 + p1) + (p2 + p3)
            F[SUM_QQ + lane] += (p0 * q0 + p1 * q1) + (p2 * q2 + p3 * q3)
            F[SUM_R + lane] += (e0 + e1) + (e2 + e3)
            F[SUM_QR + lane] += (p0 * r0 + p1 * r1) + (p2 * r2 + p3 * r3)


@_jit
def _keep(F, total, with_mean):
    """Keep what improved, and the mean of its codes where that is known."""
    for lane in range(LANES):
        better = F[OBJECTIVE + lane] < F[BEST + lane]
        F[BEST + lane] = F[OBJECTIVE + lane] if better else F[BEST + lane]
        F[BEST_SCALE + lane] = F[SCALE + lane] if better else F[BEST_SCALE + lane]
        F[BEST_MIN + lane] = F[MIN + lane] if better else F[BEST_MIN + lane]
        if with_mean:
            F[BEST_Q + lane] = F[SUM_Q + lane] / total if better else F[BEST_Q + lane]


@_jit
def _fit(F, total, mode, lowest, highest):
    """The integers next to the least-squares (step, offset) of the codes as they are: the scale, then the min for it."""
    for lane in range(LANES):
        n, q, qq = f64(total), f64(F[SUM_Q + lane]), f64(F[SUM_QQ + lane])
        r, qr = f64(F[SUM_R + lane]), f64(F[SUM_QR + lane])
        d, dmin = f64(F[UNIT_D + lane]), f64(F[UNIT_M + lane])
        step = f64(F[STEP + lane])
        if mode == OFFSET:
            square, cross = qq - q * q / n, qr - q * r / n
        else:
            square, cross = qq, qr
        new = step + (cross / square if square > 0.0 else 0.0)
        scale = min(max(np.rint(new / d if d > 0.0 else 0.0), lowest), highest)
        F[SCALE + lane] = f32(scale)
        if mode == OFFSET:
            offset = f64(F[BASE + lane]) + (r - (d * scale - step) * q) / n
            least = min(max(np.rint(-offset / dmin if dmin > 0.0 else 0.0), 0.0), highest)
            if -offset < 0.0 and qq > 0.0:  # the offset cannot follow, and so the step does
                new = step + (qr + f64(F[BASE + lane]) * q) / qq
                F[SCALE + lane] = f32(min(max(np.rint(new / d if d > 0.0 else 0.0), lowest), highest))
            F[MIN + lane] = f32(least)


@_jit
def _refit_min(F, total, highest):
    """The min next to the least-squares offset, the scale as it is."""
    for lane in range(LANES):
        dmin = f64(F[UNIT_M + lane])
        offset = f64(F[BASE + lane]) + f64(F[SUM_R + lane]) / f64(total)
        F[MIN + lane] = f32(min(max(np.rint(-offset / dmin if dmin > 0.0 else 0.0), 0.0), highest))


@_jit
def _neighbour(F, by, mode, lowest, highest):
    """The scale `by` away from the centre; the mean of the codes keeps its place."""
    for lane in range(LANES):
        centre = F[CENTRE + lane]
        scale = min(max(centre + f32(by), f32(lowest)), f32(highest))
        F[SCALE + lane] = scale
        if mode == OFFSET:
            dmin = F[UNIT_M + lane]
            moved = (scale - centre) * F[UNIT_D + lane] * F[CENTRE_Q + lane]
            shift = moved / dmin if dmin > f32(0.0) else f32(0.0)
            F[MIN + lane] = min(max(np.rint(F[CENTRE_MIN + lane] + shift), f32(0.0)), f32(highest))


@_jit
def _centre(F):
    """The best so far is what neighbours are neighbours of."""
    for lane in range(LANES):
        F[CENTRE + lane] = F[BEST_SCALE + lane]
        F[CENTRE_MIN + lane] = F[BEST_MIN + lane]
        F[CENTRE_Q + lane] = F[BEST_Q + lane]


@_jit
def _look(T, H, F, total, mode, low, high, lowest, highest, whole):
    """Errors at SCALE and MIN; where there are offsets, also at the min that is best for these codes; `whole`: scale and min."""
    if whole or mode == OFFSET:
        _place(F)
        _moments(T, H, F, low, high)
        _keep(F, total, True)
        if whole:
            _fit(F, total, mode, lowest, highest)
        else:
            _refit_min(F, total, highest)
    _errors(T, H, F, low, high)
    _keep(F, total, False)


@_jit
def _search(T, H, F, total, steps, radius, mode, low, high, lowest, highest):
    """From SCALE and MIN, the best integers for one group that least squares and a look at the neighbours find."""
    for lane in range(LANES):
        F[BEST + lane] = f32(np.inf)
    _place(F)
    _moments(T, H, F, low, high)
    _keep(F, total, True)
    for _ in range(steps):
        _fit(F, total, mode, lowest, highest)
        _place(F)
        _moments(T, H, F, low, high)
        _keep(F, total, True)
    _centre(F)
    for away in range(1, radius + 1):
        for by in (-away, away):
            _neighbour(F, by, mode, lowest, highest)
            _look(T, H, F, total, mode, low, high, lowest, highest, False)
    if radius == 0:
        return
    if mode == OFFSET:
        _centre(F)
        for by in (-1, 1):
            for lane in range(LANES):
                F[SCALE + lane] = F[CENTRE + lane]
                F[MIN + lane] = min(max(F[CENTRE_MIN + lane] + f32(by), f32(0.0)), f32(highest))
            _errors(T, H, F, low, high)
            _keep(F, total, False)
    else:
        for lane in range(LANES):
            F[SCALE + lane] = min(-F[CENTRE + lane], f32(highest))
        _look(T, H, F, total, mode, low, high, lowest, highest, True)


@_inline
def _half(x, lane, D, stored):
    """The float16 nearest to x, which is not negative, both in the units of a lane."""
    absolute = min(x * D[UNIT + lane], 65504.0)
    return f32(f64(_round_stored(f32(absolute), stored)) * D[PER_UNIT + lane])


@_jit
def _rounded_to_nearest(X, F, mode, low, high):
    """Step and offset that reach from the smallest weight, or 0, to the largest; without an offset, the larger to its side."""
    for lane in range(LANES):
        F[SUM_Q + lane] = F[SUM_QQ + lane] = X[lane]
    for j in range(X.size // LANES):
        for lane in range(LANES):
            F[SUM_Q + lane] = min(F[SUM_Q + lane], X[j * LANES + lane])
            F[SUM_QQ + lane] = max(F[SUM_QQ + lane], X[j * LANES + lane])
    for lane in range(LANES):
        small, large = F[SUM_Q + lane], F[SUM_QQ + lane]
        if mode == OFFSET:
            F[BASE + lane] = min(small, f32(0.0))
            F[STEP + lane] = (large - F[BASE + lane]) / high
        else:
            F[BASE + lane] = f32(0.0)
            up, down = max(small / low, large / high), -max(large / -low, small / -high)
            F[STEP + lane] = down if large > -small else up


@_jit
def _own_optimum(X, F, D, scale, zero, mode, high):
    """Step and offset that a group has by itself, one for each row. An offset above zero becomes zero."""
    for lane in range(LANES):
        F[STEP + lane] = F[BASE + lane] = f32(0.0)
        if lane < scale.size:
            step = f64(scale[lane]) * D[PER_UNIT + lane]
            F[STEP + lane] = f32(step)
            if mode == OFFSET:
                F[BASE + lane] = f32(-step * f64(zero[lane]))
        if F[BASE + lane] > f32(0.0):
            largest = f32(0.0)
            for j in range(X.size // LANES):
                largest = max(largest, X[j * LANES + lane])
            F[STEP + lane], F[BASE + lane] = largest / high, f32(0.0)


@_jit
def _start(T, H, F, G, scale, zero, plain, D, n, total, mode, low, high):
    """Real step, offset and mean code of each group into G: round to nearest where `plain`, else its own optimum."""
    n_groups = total.size
    size = n_groups * LANES
    for g in range(n_groups):
        X = T[g * n * LANES : (g + 1) * n * LANES]
        if plain:
            _rounded_to_nearest(X, F, mode, low, high)
        else:
            _own_optimum(X, F, D, scale[:, g], zero[:, g], mode, high)
        for lane in range(LANES):
            step = F[STEP + lane]
            F[INVERSE + lane] = f32(1.0) / step if step != f32(0.0) else f32(0.0)
        _moments(X, H[g], F, low, high)
        for lane in range(LANES):
            at = g * LANES + lane
            G[at], G[size + at] = F[STEP + lane], F[BASE + lane]
            G[2 * size + at] = F[SUM_Q + lane] / f32(total[g])


@_jit
def _units(G, share, D, U, top, mode, stored):
    """Units such that a lane's largest step and offset get the integer `top`; groups that count for nothing have no say."""
    size = share.size * LANES
    for lane in range(LANES):
        above, below, offset = f32(0.0), f32(0.0), f32(0.0)
        for g in range(share.size):
            if share[g] > 0.0:
                above = max(above, G[g * LANES + lane])
                below = max(below, -G[g * LANES + lane])
                offset = max(offset, -G[size + g * LANES + lane])
        d = f64(above) / top
        if mode != OFFSET:
            d = max(d, f64(below) / (top + 1.0))
        U[lane] = _half(d, lane, D, stored)
        U[LANES + lane] = _half(f64(offset) / top, lane, D, stored) if mode == OFFSET else f32(0.0)


@_jit
def _from_real(F, G, g, n_groups, mode, lowest, highest):
    """Integers next to the real step and offset; the mean of the codes keeps its place."""
    size = n_groups * LANES
    for lane in range(LANES):
        at, d, dmin = g * LANES + lane, F[UNIT_D + lane], F[UNIT_M + lane]
        scale = min(max(np.rint(G[at] / d if d > f32(0.0) else f32(0.0)), f32(lowest)), f32(highest))
        F[SCALE + lane], F[MIN + lane] = scale, f32(0.0)
        if mode == OFFSET:
            offset = G[size + at] + (G[at] - scale * d) * G[2 * size + at]
            least = np.rint(-offset / dmin if dmin > f32(0.0) else f32(0.0))
            F[MIN + lane] = min(max(least, f32(0.0)), f32(highest))


@_jit
def _try(T, H, F, G, N, U, B, n, total, share, steps, radius, real, mode, low, high, lowest, highest):
    """Search all groups at the units U, from their real optima or from the integers N; a lane's better is kept in N and B."""
    n_groups = total.size
    size = n_groups * LANES
    objective = np.zeros(LANES, f64)
    tried = np.empty(2 * size, f32)
    for g in range(n_groups):
        X = T[g * n * LANES : (g + 1) * n * LANES]
        for lane in range(LANES):
            F[UNIT_D + lane], F[UNIT_M + lane] = U[lane], U[LANES + lane]
            F[SCALE + lane], F[MIN + lane] = N[g * LANES + lane], N[size + g * LANES + lane]
        if real:
            _from_real(F, G, g, n_groups, mode, lowest, highest)
        _search(X, H[g], F, f32(total[g]), steps, radius, mode, low, high, lowest, highest)
        for lane in range(LANES):
            tried[g * LANES + lane], tried[size + g * LANES + lane] = F[BEST_SCALE + lane], F[BEST_MIN + lane]
            objective[lane] += share[g] * f64(F[BEST + lane])
    improved = False
    for lane in range(LANES):
        if objective[lane] < B[lane]:
            improved = True
            B[lane], B[LANES + lane], B[2 * LANES + lane] = objective[lane], f64(U[lane]), f64(U[LANES + lane])
            for g in range(n_groups):
                at = g * LANES + lane
                N[at], N[size + at] = tried[at], tried[size + at]
    return improved


@_jit
def _integers_of(F, N, B, g, n_groups):
    """What has been found for a group."""
    for lane in range(LANES):
        F[UNIT_D + lane], F[UNIT_M + lane] = f32(B[LANES + lane]), f32(B[2 * LANES + lane])
        F[SCALE + lane], F[MIN + lane] = N[g * LANES + lane], N[(n_groups + g) * LANES + lane]


@_jit
def _fit_units(T, H, F, N, U, B, D, n, total, share, mode, low, high, stored):
    """Least squares in (d, dmin) over all groups, their codes and integers as they are."""
    A = np.zeros((5, LANES), f64)
    for g in range(total.size):
        _integers_of(F, N, B, g, total.size)
        _place(F)
        _moments(T[g * n * LANES : (g + 1) * n * LANES], H[g], F, low, high)
        for lane in range(LANES):
            s, m = share[g] * f64(F[SCALE + lane]), share[g] * f64(F[MIN + lane])
            A[0, lane] += s * f64(F[SCALE + lane]) * f64(F[SUM_QQ + lane])
            A[1, lane] -= s * f64(F[MIN + lane]) * f64(F[SUM_Q + lane])
            A[2, lane] += m * f64(F[MIN + lane]) * total[g]
            A[3, lane] += s * f64(F[SUM_QR + lane])
            A[4, lane] -= m * f64(F[SUM_R + lane])
    for lane in range(LANES):
        a, b, c, u, v = A[0, lane], A[1, lane], A[2, lane], A[3, lane], A[4, lane]
        determinant = a * c - b * b
        d = dmin = 0.0
        if mode == OFFSET and determinant > SINGULAR * a * c:
            d, dmin = (c * u - b * v) / determinant, (a * v - b * u) / determinant
        elif a > 0.0:
            d = u / a
        U[lane] = _half(max(B[LANES + lane] + d, 0.0), lane, D, stored)
        U[LANES + lane] = _half(max(B[2 * LANES + lane] + dmin, 0.0), lane, D, stored)


@_jit
def _encode(T, F, Q, low, high):
    """Codes at SCALE and MIN; squared errors and norms, not weighted."""
    _place(F)
    for lane in range(LANES):
        F[OBJECTIVE + lane] = F[SUM_QQ + lane] = f32(0.0)
    for j in range(T.size // LANES):
        for lane in range(LANES):
            at = j * LANES + lane
            q, r = _residual(T[at], F[BASE + lane], F[STEP + lane], F[INVERSE + lane], low, high)
            F[OBJECTIVE + lane] += r * r
            F[SUM_QQ + lane] += T[at] * T[at]
            Q[at] = np.uint8(q - low)


@_jit
def _solve_lanes(
    T, H, F, G, N, B, D, scale, zero, n, total, share, tops, steps, radius, rounds,
    mode, low, high, lowest, highest, stored,
):  # fmt: skip
    """One super-block of each lane: units into B, integers into N."""
    U = np.empty(2 * LANES, f32)
    for lane in range(LANES):
        B[lane] = np.inf
    _start(T, H, F, G, scale, zero, True, D, n, total, mode, low, high)
    _units(G, share, D, U, highest, mode, stored)
    _try(T, H, F, G, N, U, B, n, total, share, 0, 0, True, mode, low, high, lowest, highest)
    _start(T, H, F, G, scale, zero, False, D, n, total, mode, low, high)
    for top in tops:
        _units(G, share, D, U, top, mode, stored)
        _try(T, H, F, G, N, U, B, n, total, share, steps, radius, True, mode, low, high, lowest, highest)
    for _ in range(rounds):
        _fit_units(T, H, F, N, U, B, D, n, total, share, mode, low, high, stored)
        if not _try(T, H, F, G, N, U, B, n, total, share, 1, 1, False, mode, low, high, lowest, highest):
            break


@_jit
def solve_tile(
    W, column_factors, row_factors, energy, share, codes, scale, zero, d, dmin, scales, mins,
    tops, steps, radius, rounds, mode, low, high, lowest, highest, stored,
):  # fmt: skip
    """Solve a tile: each row of W is cut into super-blocks, whose groups have been solved by themselves.

    Parameters
    ----------
    W : ndarray [shape=(rows, n_super * n_groups * n)], uint16 or uint32
        Weights as words: the upper half of a float32 (bfloat16), or all of it. Finite, and so are the products with factors.
    column_factors, row_factors : ndarray [shape=(n_super, n_groups * n)] and [shape=(rows,)], float32
        What is solved is W times both, the row factors positive.
    energy : ndarray [shape=(n_super, n_groups, n)], float32
        Weight of each column's squared error, with a maximum of [0.5, 1) in every group.
    share : ndarray [shape=(n_super, n_groups)], float64
        What a group's weighted errors count for within its super-block: powers of two, or 0.
    codes : ndarray [shape=(rows, n_super * n_groups * n)], uint8, out
    scale, zero : ndarray [shape=(rows, n_super * n_groups)], float32
        Each group's own optimum.
    d, dmin : ndarray [shape=(rows, n_super)], float32, out
        Values that float16 holds exactly.
    scales, mins : ndarray [shape=(rows, n_super * n_groups)], int16, out
    tops : ndarray [shape=(n,)], float64
        Integers that the largest scale and offset of a super-block get, one unit to be tried for each.
    low, high, lowest, highest : float32, float32, float64, float64
        Range of the codes around the middle, and of the integers.

    Returns
    -------
    squared_error, squared_norm : float
        Not weighted.
    """
    n_groups, n = energy.shape[1], energy.shape[2]
    width = n_groups * n
    T, D = np.empty(width * LANES, f32), np.empty(N_FLOAT64, f64)
    S, L, X = np.empty(width * LANES, W.dtype), np.empty(width * LANES, W.dtype), np.empty(N_FLOAT32, f32)
    F, B = np.zeros(N_STATE, f32), np.empty(3 * LANES, f64)
    G, N = np.zeros(3 * n_groups * LANES, f32), np.zeros(2 * n_groups * LANES, f32)
    Q, C = np.empty(n * LANES, np.uint8), np.empty(n * LANES, np.uint8)
    total = np.empty(n_groups, f64)
    squared_error = squared_norm = 0.0
    for block in range(energy.shape[0]):
        H, column = energy[block], block * width
        for g in range(n_groups):
            total[g] = 0.0
            for j in range(n):
                total[g] += f64(H[g, j])
        for first in range(0, W.shape[0], LANES):
            _load(
                W,
                first,
                column,
                column_factors[block],
                row_factors,
                H.reshape(-1),
                T,
                S,
                L,
                X,
                D,
                mode,
                False,
                SMALLEST,
                1.0,
            )
            n_lanes = min(LANES, W.shape[0] - first)
            own = slice(first, first + n_lanes), slice(block * n_groups, (block + 1) * n_groups)
            _solve_lanes(
                T, H, F, G, N, B, D, scale[own], zero[own], n, total, share[block], tops, steps, radius, rounds,
                mode, low, high, lowest, highest, stored,
            )  # fmt: skip
            for lane in range(n_lanes):
                d[first + lane, block] = f32(B[LANES + lane] * D[UNIT + lane])
                dmin[first + lane, block] = f32(B[2 * LANES + lane] * D[UNIT + lane])
            for g in range(n_groups):
                _integers_of(F, N, B, g, n_groups)
                _encode(T[g * n * LANES : (g + 1) * n * LANES], F, Q, low, high)
                _to_rows(Q, C)
                for lane in range(n_lanes):
                    row, group, unit = first + lane, block * n_groups + g, D[UNIT + lane]
                    scales[row, group], mins[row, group] = np.int16(F[SCALE + lane]), np.int16(F[MIN + lane])
                    squared_error += f64(F[OBJECTIVE + lane]) * unit * unit
                    squared_norm += f64(F[SUM_QQ + lane]) * unit * unit
                    _copy(C[lane * n : (lane + 1) * n], codes[row, group * n : (group + 1) * n])
    return squared_error, squared_norm
