"""CPU kernels: no checks, preallocated outputs, one thread; `_reference` has the equations and their source.

Groups lie side by side in vector lanes: a block is LANES groups, transposed, so that a sum over a group never crosses lanes.
Nothing is reordered, and so neither thread count, tile size nor vector width shows in the result.

Precision: weights, codes and residuals float32; per-group sums float32; the 2 x 2 solve and the reported errors float64.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from hqq_core.solver._precision import FLAT, MAX_STEPS, NOISE, ROUNDED

f32, f64, i64, u32, u64 = np.float32, np.float64, np.int64, np.uint32, np.uint64
FLOAT, INT, NONE, OFFSET = 0, 1, 2, 3
MODES = {"float": FLOAT, "int": INT, "none": NONE, "offset": OFFSET}
LANES = 32

# A block's state: rows of LANES numbers in one float32 and one float64 buffer. One buffer each, so that the compiler sees that
# rows do not overlap.
OBJECTIVE, SUM_Q, SUM_QQ, SUM_R, SUM_QR = (LANES * i for i in range(5))
SCALE, ZERO, INVERSE, SUM_T, MEAN = (LANES * i for i in range(5, 10))
FIRST_SCALE, FIRST_ZERO, BEST_SCALE, BEST_ZERO, BEST, ACTIVE = (LANES * i for i in range(10, 16))
N_FLOAT32 = 16 * LANES
FLOOR, UNIT, PER_UNIT, SIGN = (LANES * i for i in range(4))
N_FLOAT64 = 4 * LANES
MAGNITUDE, INFINITE = u32(0x7FFFFFFF), u32(0x7F800000)

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
def _round_real(zero, scale, mode, high, max_zero, unit, per_unit, stored):
    """Clamp and round a float zero itself, or its offset -zero * scale; arguments as `_round_scale` has them."""
    if mode == FLOAT:
        return f64(_round_zero(zero, max_zero, stored))
    offset = -min(max(zero, -2.0 * max_zero), 2.0 * max_zero) * scale * unit
    return -f64(_round_stored(f32(min(max(offset, -high), high)), stored)) * per_unit / scale


@_jit
def _interleave(A, B):
    """B[2 i], B[2 i + 1] = A[i], A[half + i]. Five times is 2^5 = LANES rows to columns, all of it in wide code."""
    half = A.size // 2
    for i in range(half):
        B[2 * i], B[2 * i + 1] = A[i], A[half + i]


@_jit
def _separate(A, B):
    """The inverse of `_interleave`."""
    half = A.size // 2
    for i in range(half):
        B[i], B[half + i] = A[2 * i], A[2 * i + 1]


@_jit
def _to_lanes(S, T):
    """Transpose LANES rows in S, which is overwritten, into T."""
    _interleave(S, T)
    _interleave(T, S)
    _interleave(S, T)
    _interleave(T, S)
    _interleave(S, T)


@_jit
def _to_rows(S, T):
    """The inverse of `_to_lanes`."""
    _separate(S, T)
    _separate(T, S)
    _separate(S, T)
    _separate(T, S)
    _separate(S, T)


@_jit
def _copy(A, B):
    """B = A: as a loop over views, which becomes wide code; an assignment of slices does not."""
    for i in range(A.size):
        B[i] = A[i]


@_jit
def _widen(L, T):
    """Words as float32."""
    if L.itemsize == 2:
        for i in range(T.size):
            T[i] = u32(u32(L[i]) << u32(16)).view(f32)
    else:
        for i in range(T.size):
            T[i] = u32(L[i]).view(f32)


@_jit
def _extremes(T, F):
    """Smallest weights into SUM_Q, largest into SUM_QQ."""
    for lane in range(LANES):
        F[SUM_Q + lane] = F[SUM_QQ + lane] = T[lane]
    n = T.size // LANES
    whole = n - n % 4
    for j in range(0, whole, 4):
        for lane in range(LANES):
            at = j * LANES + lane
            w0, w1, w2, w3 = T[at], T[at + LANES], T[at + 2 * LANES], T[at + 3 * LANES]
            F[SUM_Q + lane] = min(F[SUM_Q + lane], min(min(w0, w1), min(w2, w3)))
            F[SUM_QQ + lane] = max(F[SUM_QQ + lane], max(max(w0, w1), max(w2, w3)))
    for j in range(whole, n):
        for lane in range(LANES):
            F[SUM_Q + lane] = min(F[SUM_Q + lane], T[j * LANES + lane])
            F[SUM_QQ + lane] = max(F[SUM_QQ + lane], T[j * LANES + lane])


@_jit
def _normalize(T, H, F):
    """Each weight times INVERSE; weighted sums into SUM_T."""
    for lane in range(LANES):
        F[SUM_T + lane] = f32(0.0)
    n = T.size // LANES
    whole = n - n % 4
    for j in range(0, whole, 4):
        h0, h1, h2, h3 = H[j], H[j + 1], H[j + 2], H[j + 3]
        for lane in range(LANES):
            at, factor = j * LANES + lane, F[INVERSE + lane]
            w0, w1 = T[at] * factor, T[at + LANES] * factor
            w2, w3 = T[at + 2 * LANES] * factor, T[at + 3 * LANES] * factor
            T[at], T[at + LANES], T[at + 2 * LANES], T[at + 3 * LANES] = w0, w1, w2, w3
            F[SUM_T + lane] += (h0 * w0 + h1 * w1) + (h2 * w2 + h3 * w3)
    for j in range(whole, n):
        for lane in range(LANES):
            w = T[j * LANES + lane] * F[INVERSE + lane]
            T[j * LANES + lane] = w
            F[SUM_T + lane] += H[j] * w


@_jit
def _load(W, row, column, C, R, H, T, S, L, F, D, mode, signed, low, max_zero):
    """The groups of LANES rows, times column and row factors, each scaled by a power of two to max|w| in [0.5, 1), or less below
    `low`, in T; smallest weights in SUM_Q, largest in SUM_QQ, weighted sums in SUM_T. Where `signed`, a group is negated if that
    brings its largest weight to the longer side of the codes.

    S and L are scratch: words, as large as T. Returns whether all weights are finite.
    """
    n = H.size
    smallest = math.frexp(low)[1]
    for lane in range(LANES):
        if row + lane < W.shape[0]:
            _copy(W[row + lane, column : column + n], S[lane * n : (lane + 1) * n])
        else:
            S[lane * n : (lane + 1) * n] = 0
    _to_lanes(S, L)
    _widen(L, T)
    for j in range(n):
        factor = C[j]
        if factor != f32(1.0):
            for lane in range(LANES):
                T[j * LANES + lane] *= factor
    _extremes(T, F)
    worst = u32(0)
    for lane in range(LANES):
        factor = R[row + lane] if row + lane < W.shape[0] else f32(1.0)
        largest = max(-F[SUM_Q + lane], F[SUM_QQ + lane]) * factor
        word = u32(f32(largest).view(u32) & MAGNITUDE)
        worst = max(worst, word)  # a factor may have carried it too far; as integers NaN is the largest
        exponent = max(i64(word >> u32(23)) - 126, smallest)  # so that its inverse and the squares are finite
        D[UNIT + lane] = _power_of_two(exponent)
        D[PER_UNIT + lane] = _power_of_two(-exponent)
        D[FLOOR + lane] = f64(largest) * D[PER_UNIT + lane] / (max_zero if mode in (FLOAT, OFFSET) else MAX_STEPS)
        D[SIGN + lane] = -1.0 if signed and F[SUM_QQ + lane] > -F[SUM_Q + lane] else 1.0
        F[INVERSE + lane] = factor * f32(D[PER_UNIT + lane] * D[SIGN + lane])
        small, large = F[SUM_Q + lane] * F[INVERSE + lane], F[SUM_QQ + lane] * F[INVERSE + lane]
        F[SUM_Q + lane], F[SUM_QQ + lane] = min(small, large), max(small, large)
    _normalize(T, H, F)
    for lane in range(LANES):  # a weight that is not finite leaves its mark there, whatever its energy
        worst = max(worst, u32(f32(F[SUM_T + lane]).view(u32) & MAGNITUDE))
    return worst < INFINITE


@_jit
def _minmax(total, F, D, mode, max_code, middle, low, high, max_zero, stored):
    """The first start: round to nearest between the smallest and the largest weight."""
    for lane in range(LANES):
        F[MEAN + lane] = F[SUM_T + lane] / f32(total)
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
        if mode in (FLOAT, OFFSET) and not constant:
            zero = _round_real(-small / scale, scale, mode, high, max_zero, D[UNIT + lane], D[PER_UNIT + lane], stored)
        F[FIRST_SCALE + lane] = F[BEST_SCALE + lane] = f32(scale)
        F[FIRST_ZERO + lane] = F[BEST_ZERO + lane] = f32(zero)


@_jit
def _clip(F, D, factor, shift, mode, max_code, low, high, max_zero, stored):
    """A start with a smaller step: the mean keeps its place among the codes, but for the shift."""
    for lane in range(LANES):
        first, mean = f64(F[FIRST_SCALE + lane]), f64(F[MEAN + lane])
        scale = _round_scale(first * factor, D[FLOOR + lane], low, high, D[UNIT + lane], D[PER_UNIT + lane], stored)
        zero = f64(F[FIRST_ZERO + lane]) + mean / first - mean / scale + shift
        if mode in (FLOAT, OFFSET):
            rounded = _round_real(zero, scale, mode, high, max_zero, D[UNIT + lane], D[PER_UNIT + lane], stored)
        else:
            rounded = min(max(np.rint(zero), 0.0), max_code)
        F[SCALE + lane] = f32(scale)
        F[ZERO + lane] = F[FIRST_ZERO + lane] if mode == NONE else f32(rounded)


@_jit
def _forget(F):
    """No best yet, all groups under way."""
    for lane in range(LANES):
        F[BEST + lane] = f32(np.inf)
        F[ACTIVE + lane] = f32(1.0)


@_inline
def _power_of_two(exponent):
    return u64(u64(exponent + 1023) << u64(52)).view(f64)


@_inline
def _residual(w, inverse, zero, max_code):
    """Code of a weight, and what is left of it in steps."""
    x = w * inverse + zero
    q = min(max(np.rint(x), f32(0.0)), max_code)
    return q, x - q


@_jit
def _clear_sums(F):
    for lane in range(LANES):
        F[INVERSE + lane] = f32(1.0) / F[SCALE + lane]
    for row in range(SCALE):
        F[row] = f32(0.0)


def _moments_of(weighted):
    """The pass over a block, with energies or without: one source, two kernels."""

    @_jit
    def moments(T, H, F, max_code):
        """Squared error in steps at (scale, zero), and the sums that the next least-squares step needs."""
        n = H.size
        _clear_sums(F)
        whole = n - n % 4
        for j in range(0, whole, 4):
            h0, h1, h2, h3 = H[j], H[j + 1], H[j + 2], H[j + 3]
            for lane in range(LANES):
                z, inverse = F[ZERO + lane], F[INVERSE + lane]
                at = j * LANES + lane
                q0, r0 = _residual(T[at], inverse, z, max_code)
                q1, r1 = _residual(T[at + LANES], inverse, z, max_code)
                q2, r2 = _residual(T[at + 2 * LANES], inverse, z, max_code)
                q3, r3 = _residual(T[at + 3 * LANES], inverse, z, max_code)
                if weighted:
                    p0, p1, p2, p3 = h0 * q0, h1 * q1, h2 * q2, h3 * q3
                    e0, e1, e2, e3 = h0 * r0, h1 * r1, h2 * r2, h3 * r3
                else:
                    p0, p1, p2, p3 = q0, q1, q2, q3
                    e0, e1, e2, e3 = r0, r1, r2, r3
                F[OBJECTIVE + lane] += (e0 * r0 + e1 * r1) + (e2 * r2 + e3 * r3)
                F[SUM_Q + lane] += (p0 + p1) + (p2 + p3)
                F[SUM_QQ + lane] += (p0 * q0 + p1 * q1) + (p2 * q2 + p3 * q3)
                F[SUM_QR + lane] += (p0 * r0 + p1 * r1) + (p2 * r2 + p3 * r3)
        for j in range(whole, n):
            for lane in range(LANES):
                q, r = _residual(T[j * LANES + lane], F[INVERSE + lane], F[ZERO + lane], max_code)
                F[OBJECTIVE + lane] += H[j] * r * r
                F[SUM_Q + lane] += H[j] * q
                F[SUM_QQ + lane] += H[j] * q * q
                F[SUM_QR + lane] += H[j] * q * r
        for lane in range(LANES):
            F[OBJECTIVE + lane] *= F[SCALE + lane] * F[SCALE + lane]

    return moments


_moments, _moments_weighted = _moments_of(False), _moments_of(True)


@_jit
def _moments_shrunk(T, H, F, max_code, p, beta, total):
    """As `_moments`, with the lp objective and the least-squares target behind the shrinkage step."""
    _clear_sums(F)
    for j in range(H.size):
        for lane in range(LANES):
            q, r = _residual(T[j * LANES + lane], F[INVERSE + lane], F[ZERO + lane], max_code)
            x = max(abs(r), f32(1e-12))
            power = f32(math.exp((p - f32(1.0)) * math.log(x)))  # x ** (p - 1)
            r -= math.copysign(max(x - power / beta, f32(0.0)), r)
            F[OBJECTIVE + lane] += H[j] * power * x
            F[SUM_Q + lane] += H[j] * q
            F[SUM_QQ + lane] += H[j] * q * q
            F[SUM_R + lane] += H[j] * r
            F[SUM_QR + lane] += H[j] * q * r
    for lane in range(LANES):
        F[OBJECTIVE + lane] *= F[SCALE + lane] ** p
        F[SUM_T + lane] = F[SCALE + lane] * (F[SUM_Q + lane] + F[SUM_R + lane] - F[ZERO + lane] * total)


@_jit
def _keep_best(F, stop):
    """Keep what improved; where `stop`, a group that stops improving stops for good. Returns how many improved."""
    active = f32(0.0)
    for lane in range(LANES):
        improved = F[ACTIVE + lane] if F[OBJECTIVE + lane] < F[BEST + lane] else f32(0.0)
        better = improved > f32(0.0)
        F[BEST + lane] = F[OBJECTIVE + lane] if better else F[BEST + lane]
        F[BEST_SCALE + lane] = F[SCALE + lane] if better else F[BEST_SCALE + lane]
        F[BEST_ZERO + lane] = F[ZERO + lane] if better else F[BEST_ZERO + lane]
        F[ACTIVE + lane] = improved if stop else F[ACTIVE + lane]
        active += improved
    return active


@_inline
def _sums(F, lane):
    """Sums of q, q^2, t and q t over a group, for the target t = s (q + r - z)."""
    sum_q, sum_qq = f64(F[SUM_Q + lane]), f64(F[SUM_QQ + lane])
    sum_qt = f64(F[SCALE + lane]) * (sum_qq + f64(F[SUM_QR + lane]) - f64(F[ZERO + lane]) * sum_q)
    return sum_q, sum_qq, f64(F[SUM_T + lane]), sum_qt


@_inline
def _move(F, lane, scale, zero, n, sum_q, sum_qq, sum_t):
    """Take the fitted (scale, zero); the objective there for the codes as they are, which new codes can only lower.

    With a = s - s', b = s' z' - s z the residual s r becomes s r + a q + b: sums of small numbers, whatever the zero is.
    """
    last, last_zero = f64(F[SCALE + lane]), f64(F[ZERO + lane])
    a, b = last - scale, scale * zero - last * last_zero
    sum_r = sum_t / last + last_zero * n - sum_q
    cross = last * (a * f64(F[SUM_QR + lane]) + b * sum_r) + a * b * sum_q
    noise = NOISE * abs(b * sum_t)
    F[OBJECTIVE + lane] = f32(f64(F[OBJECTIVE + lane]) * ROUNDED + noise + a * a * sum_qq + b * b * n + 2.0 * cross)
    F[SCALE + lane], F[ZERO + lane] = f32(scale), f32(zero)


@_jit
def _fit_float(F, D, n, mode, low, high, max_zero, stored):
    """Least squares in (scale, zero)."""
    per_n = 1.0 / n  # divisions take as long as all the rest
    for lane in range(LANES):
        sum_q, sum_qq, sum_t, sum_qt = _sums(F, lane)
        var = sum_qq - sum_q * sum_q * per_n
        varied = var > FLAT * sum_qq
        cov = sum_qt - sum_q * sum_t * per_n
        joint = cov / (var if varied else 1.0)
        joint = joint if varied else f64(F[SCALE + lane])
        joint = _round_scale(joint, D[FLOOR + lane], low, high, D[UNIT + lane], D[PER_UNIT + lane], stored)
        zero = (sum_q - sum_t / joint) * per_n
        zero = _round_real(zero, joint, mode, high, max_zero, D[UNIT + lane], D[PER_UNIT + lane], stored)
        _move(F, lane, joint, f64(zero), n, sum_q, sum_qq, sum_t)


@_inline
def _fit_scale(sum_q, sum_qq, sum_t, sum_qt, n, zero, scale, floor, low, high, unit, per_unit, stored):
    """Least-squares scale for a given zero, and how much of the target's square it explains."""
    cross = sum_qt - zero * sum_t
    square = sum_qq - 2.0 * zero * sum_q + n * zero * zero
    fitted = cross / (square if square > 0.0 else 1.0)
    fitted = _round_scale(fitted if square > 0.0 else scale, floor, low, high, unit, per_unit, stored)
    return fitted, fitted * (2.0 * cross - fitted * square)


@_jit
def _fit_int(F, D, n, max_code, low, high, stored):
    """Least squares in (scale, whole zero): the better of the two neighbours of the real optimum, each with its own scale."""
    for lane in range(LANES):
        sum_q, sum_qq, sum_t, sum_qt = _sums(F, lane)
        scale, floor, unit, per_unit = f64(F[SCALE + lane]), D[FLOOR + lane], D[UNIT + lane], D[PER_UNIT + lane]
        var = sum_qq - sum_q * sum_q / n
        varied = var > FLAT * sum_qq
        cov = sum_qt - sum_q * sum_t / n
        joint = cov / (var if varied else 1.0)
        joint = _round_scale(joint if varied else scale, floor, low, high, unit, per_unit, stored)
        below = min(max(math.floor((sum_q - sum_t / joint) / n), 0.0), max_code)
        above = min(below + 1.0, max_code)
        scale_below, gain_below = _fit_scale(
            sum_q, sum_qq, sum_t, sum_qt, n, below, scale, floor, low, high, unit, per_unit, stored
        )
        scale_above, gain_above = _fit_scale(
            sum_q, sum_qq, sum_t, sum_qt, n, above, scale, floor, low, high, unit, per_unit, stored
        )
        fitted = scale_above if gain_above > gain_below else scale_below
        zero = above if gain_above > gain_below else below
        _move(F, lane, fitted, zero, n, sum_q, sum_qq, sum_t)


@_jit
def _fit_none(F, D, n, middle, low, high, stored):
    """Least squares in the scale alone."""
    for lane in range(LANES):
        sum_q, sum_qq, sum_t, sum_qt = _sums(F, lane)
        fitted, _ = _fit_scale(
            sum_q, sum_qq, sum_t, sum_qt, n, middle, f64(F[SCALE + lane]), D[FLOOR + lane], low, high,
            D[UNIT + lane], D[PER_UNIT + lane], stored,
        )  # fmt: skip
        _move(F, lane, fitted, middle, n, sum_q, sum_qq, sum_t)


@_jit
def _encode(T, F, Q, max_code):
    """Codes at the best (scale, zero); leaves squared errors in OBJECTIVE and squared norms in SUM_QQ, in normalized units."""
    for lane in range(LANES):
        F[INVERSE + lane] = f32(1.0) / F[BEST_SCALE + lane]
        F[OBJECTIVE + lane] = F[SUM_QQ + lane] = f32(0.0)
    n = T.size // LANES
    whole = n - n % 2
    for j in range(0, whole, 2):
        for lane in range(LANES):
            at = j * LANES + lane
            inverse, s, z = F[INVERSE + lane], F[BEST_SCALE + lane], F[BEST_ZERO + lane]
            w0, w1 = T[at], T[at + LANES]
            q0, _ = _residual(w0, inverse, z, max_code)
            q1, _ = _residual(w1, inverse, z, max_code)
            r0, r1 = w0 - s * (q0 - z), w1 - s * (q1 - z)
            F[OBJECTIVE + lane] += r0 * r0 + r1 * r1
            F[SUM_QQ + lane] += w0 * w0 + w1 * w1
            Q[at], Q[at + LANES] = np.uint8(q0), np.uint8(q1)
    for j in range(whole, n):
        for lane in range(LANES):
            w, z = T[j * LANES + lane], F[BEST_ZERO + lane]
            q, _ = _residual(w, F[INVERSE + lane], z, max_code)
            r = w - F[BEST_SCALE + lane] * (q - z)
            F[OBJECTIVE + lane] += r * r
            F[SUM_QQ + lane] += w * w
            Q[j * LANES + lane] = np.uint8(q)


@_jit
def _alternate(
    T, H, F, D, total, iters, stop, weighted, mode, max_code, middle, stored, low, high, max_zero, p, beta, kappa
):
    """From (SCALE, ZERO), `iters` times codes, shrinkage, least squares; keeps the best seen.

    Squared errors are known after a least-squares step without another pass; the lp objective behind a shrinkage step is not.
    """
    squares = p == 2.0
    for i in range(max(iters, 1) if squares else iters + 1):
        if not squares:
            _moments_shrunk(T, H, F, f32(max_code), f32(p), f32(beta), f32(total))
        elif weighted:
            _moments_weighted(T, H, F, f32(max_code))
        else:
            _moments(T, H, F, f32(max_code))
        active = _keep_best(F, stop and not squares)
        if (active == 0.0 and stop and not squares) or i == iters:
            break
        beta *= kappa
        if mode in (FLOAT, OFFSET):
            _fit_float(F, D, total, mode, low, high, max_zero, stored)
        elif mode == INT:
            _fit_int(F, D, total, max_code, low, high, stored)
        else:
            _fit_none(F, D, total, middle, low, high, stored)
        if squares and _keep_best(F, stop) == 0.0 and stop:
            break


@_jit
def solve_tile(
    W, column_factors, row_factors, energy, weighted, codes, scale, zero, starts, trial_iters, iters,
    mode, signed, max_code, middle, stored, low, high, max_zero, p, beta, kappa,
):  # fmt: skip
    """Solve a tile: each row of W is cut into groups.

    Parameters
    ----------
    W : ndarray [shape=(rows, n * group_size)], uint16 or uint32
        Weights as words: the upper half of a float32 (bfloat16), or all of it.
    column_factors, row_factors : ndarray [shape=(n, group_size)] and [shape=(rows,)], float32
        What is solved is W times both, the row factors positive.
    energy : ndarray [shape=(n, group_size)], float32
        Weight of each column's squared error, with a maximum of [0.5, 1) in every group; ones where not `weighted`.
    codes : ndarray [shape=(rows, n * group_size)], uint8, out
    scale, zero : ndarray [shape=(rows, n)], float32, out
        Values that the stored type holds exactly; in mode OFFSET it holds -zero * scale.
    starts : ndarray [shape=(n_starts, 2)], float64
        Factor of the min-max step and shift of the zero.

    Returns
    -------
    squared_error, squared_norm : float
        Not weighted; NaN where weights are not finite, and then there is no other result.
    """
    n = energy.shape[1]
    T, F, D = np.empty(n * LANES, f32), np.empty(N_FLOAT32, f32), np.empty(N_FLOAT64, f64)
    S, L = np.empty(n * LANES, W.dtype), np.empty(n * LANES, W.dtype)
    Q, C = np.empty(n * LANES, np.uint8), np.empty(n * LANES, np.uint8)
    squared_error = squared_norm = 0.0
    for group in range(energy.shape[0]):
        H = energy[group]
        total = f64(0.0)
        for j in range(n):
            total += f64(H[j])
        for first in range(0, W.shape[0], LANES):
            if not _load(
                W, first, group * n, column_factors[group], row_factors, H, T, S, L, F, D, mode, signed, low, max_zero
            ):
                return np.nan, np.nan
            _minmax(total, F, D, mode, max_code, middle, low, high, max_zero, stored)
            if len(starts) > 1:
                _forget(F)
                for i in range(len(starts)):
                    _clip(F, D, starts[i, 0], starts[i, 1], mode, max_code, low, high, max_zero, stored)
                    _alternate(
                        T, H, F, D, total, trial_iters, False, weighted,
                        mode, max_code, middle, stored, low, high, max_zero, p, beta, kappa,
                    )  # fmt: skip
            _forget(F)
            for lane in range(LANES):
                F[SCALE + lane], F[ZERO + lane] = F[BEST_SCALE + lane], F[BEST_ZERO + lane]
            _alternate(
                T, H, F, D, total, iters, True, weighted,
                mode, max_code, middle, stored, low, high, max_zero, p, beta, kappa,
            )  # fmt: skip
            _encode(T, F, Q, f32(max_code))
            _to_rows(Q, C)
            for lane in range(min(LANES, W.shape[0] - first)):
                row, unit = first + lane, D[UNIT + lane]
                scale[row, group] = f32(f64(F[BEST_SCALE + lane]) * unit * D[SIGN + lane])
                zero[row, group] = F[BEST_ZERO + lane]
                squared_error += f64(F[OBJECTIVE + lane]) * unit * unit
                squared_norm += f64(F[SUM_QQ + lane]) * unit * unit
                _copy(C[lane * n : (lane + 1) * n], codes[row, group * n : (group + 1) * n])
    return squared_error, squared_norm


def rounding(drop: int, subnormal_below: float) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32, np.float32]:
    """What `_round_stored` needs: for a type that drops so many bits of float32, subnormal (as float16 is) below a limit."""
    if drop == 0:
        return u32(0), u32(0), u32(0xFFFFFFFF), u32(0), f32(0)
    return u32((1 << (drop - 1)) - 1), u32(1), u32(0xFFFFFFFF ^ ((1 << drop) - 1)), u32(drop), f32(subnormal_below)
