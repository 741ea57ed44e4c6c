"""The equations as written, float64, all groups at once, slow: the oracle for all other back-ends.

Half-quadratic quantization: H. Badri and A. Shaji, https://mobiusml.github.io/hqq_blog/ (2023), with a joint least-squares step
for (scale, zero) in place of the zero alone, weights on the squared errors, several starts, per-group best, and scale and zero
rounded to their stored type in every step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hqq_core.solver._precision import FLAT, MAX_STEPS, ROUNDED, STORED_TYPES
from hqq_core.solver._starts import starts, trial_iters
from hqq_core.spec import REAL_ZEROS, QuantSpec

Array = NDArray[np.float64]


def solve(W: Array, spec: QuantSpec, energy: Array | None = None) -> tuple[NDArray[np.uint8], Array, Array]:
    """Solve every row of W as one group.

    Parameters
    ----------
    W : ndarray [shape=(n_groups, group_size)], float64
        Finite weights.
    spec : QuantSpec
    energy : ndarray [shape=(n_groups, group_size)], float64, optional
        Weight h >= 0 of each squared error; default: ones.

    Returns
    -------
    codes : ndarray [shape=(n_groups, group_size)], uint8
    scale, zero : ndarray [shape=(n_groups,)], float64
        Values that `spec.scale_dtype` holds exactly.
    """
    sign = orientation(W) if spec.signed else np.ones(len(W))
    W, exponent = normalize(W * sign[:, None], spec)
    H = np.ones_like(W) if energy is None else normalize_energy(energy)
    scale, zero = minmax(W, exponent, spec)
    if spec.starts > 1:
        tried = [
            alternate(W, H, *clipped(W, H, scale, zero, *start, exponent, spec), trial_iters(spec), exponent, spec)
            for start in starts(spec)
        ]
        best = np.argmin([objective for _, _, objective in tried], axis=0), np.arange(len(W))
        scale, zero = np.stack([found[0] for found in tried])[best], np.stack([found[1] for found in tried])[best]
    best_scale, best_zero, _ = alternate(W, H, scale, zero, spec.iters, exponent, spec)
    codes = encode(W, best_scale, best_zero, spec).astype(np.uint8)
    return codes, np.ldexp(best_scale, exponent) * sign, best_zero


def orientation(W: Array) -> Array:
    """Sign of a group's scale: the codes reach farther below their middle, and there the largest weight comes to lie."""
    return np.where(W.max(axis=1) > -W.min(axis=1), -1.0, 1.0)


def alternate(
    W: Array, H: Array, scale: Array, zero: Array, iters: int, exponent: NDArray[np.int32], spec: QuantSpec
) -> tuple[Array, Array, Array]:
    """From a start, `iters` times codes, shrinkage, least squares; the best (scale, zero) seen and its objective."""
    best_scale, best_zero, best = scale, zero, np.full(len(W), np.inf)
    active = np.ones(len(W), dtype=bool)
    beta = spec.beta
    squares = spec.lp_norm == 2

    def keep(objective: Array) -> NDArray[np.bool_]:
        nonlocal best, best_scale, best_zero
        improved: NDArray[np.bool_] = active & (objective < best)
        best = np.where(improved, objective, best)
        best_scale, best_zero = np.where(improved, scale, best_scale), np.where(improved, zero, best_zero)
        return improved

    for i in range(max(iters, 1) if squares else iters + 1):
        q = encode(W, scale, zero, spec)
        R = residual(W, q, scale, zero)
        improved = keep((H * np.abs(R) ** spec.lp_norm).sum(axis=1))
        if not squares:
            active = improved  # a group that stops improving stops for good
        if i == iters:
            break
        target = W - scale[:, None] * shrink(R / scale[:, None], spec.lp_norm, beta)
        scale, zero = least_squares(q, target, H, scale, W, exponent, spec)
        beta *= spec.kappa
        if squares:  # known for the codes as they are, which new ones can only lower
            slack = (ROUNDED - 1) * (H * R**2).sum(axis=1)
            active = keep((H * residual(W, q, scale, zero) ** 2).sum(axis=1) + slack)
    return best_scale, best_zero, best


def residual(W: Array, q: Array, scale: Array, zero: Array) -> Array:
    """What is left of the weights."""
    return W - scale[:, None] * (q - zero[:, None])


def normalize(W: Array, spec: QuantSpec) -> tuple[Array, NDArray[np.int32]]:
    """Scale each group by a power of two to max|w| in [0.5, 1), or less below the smallest scale: squares stay in range."""
    smallest = int(np.frexp(STORED_TYPES[spec.scale_dtype].min_scale)[1])
    exponent = np.maximum(np.frexp(np.abs(W).max(axis=1))[1], smallest)
    return np.ldexp(W, -exponent[:, None]), exponent


def normalize_energy(energy: Array) -> Array:
    """Scale each group's energies by a power of two to a maximum in [0.5, 1); a group without any has ones."""
    largest = energy.max(axis=-1, keepdims=True)
    return np.where(largest > 0, np.ldexp(energy, -np.frexp(largest)[1]), 1.0)


def minmax(W: Array, exponent: NDArray[np.int32], spec: QuantSpec) -> tuple[Array, Array]:
    """The start: round to nearest between the smallest and the largest weight."""
    low, high = W.min(axis=1), W.max(axis=1)
    if spec.zero == "none":
        above = max(spec.max_code - spec.middle, 0.5)
        scale = np.maximum(-low / spec.middle, high / above)
        return round_scale(scale, W, exponent, spec), np.full(len(W), spec.middle)
    constant = low == high
    if spec.zero == "int":
        low, high = np.where(constant, low, np.minimum(low, 0)), np.where(constant, high, np.maximum(high, 0))
    scale = np.where(constant, np.abs(low), (high - low) / spec.max_code)
    scale = round_scale(scale, W, exponent, spec)
    zero = np.where(constant, (low < 0).astype(float), -low / scale)
    return scale, round_zero(zero, scale, exponent, spec)


def clipped(
    W: Array,
    H: Array,
    scale: Array,
    zero: Array,
    factor: float,
    shift: float,
    exponent: NDArray[np.int32],
    spec: QuantSpec,
) -> tuple[Array, Array]:
    """A start with a smaller step: the mean keeps its place among the codes, but for the shift."""
    smaller = round_scale(scale * factor, W, exponent, spec)
    if spec.zero == "none":
        return smaller, zero
    mean = (H * W).sum(axis=1) / H.sum(axis=1)
    return smaller, round_zero(zero + mean / scale - mean / smaller + shift, smaller, exponent, spec)


def encode(W: Array, scale: Array, zero: Array, spec: QuantSpec) -> Array:
    """Codes q = clip(round(w / s + z), 0, Q)."""
    return np.clip(np.rint(W / scale[:, None] + zero[:, None]), 0, spec.max_code)


def shrink(X: Array, p: float, beta: float) -> Array:
    """Proximal step of the lp norm on residuals in units of the step: sign(x) max(0, |x| - |x|^(p-1) / beta)."""
    if p == 2:
        return np.zeros_like(X)
    size = np.maximum(np.abs(X), 1e-12)
    return np.sign(X) * np.maximum(0, size - size ** (p - 1) / beta)


def least_squares(
    q: Array, target: Array, H: Array, scale: Array, W: Array, exponent: NDArray[np.int32], spec: QuantSpec
) -> tuple[Array, Array]:
    """The (scale, zero) of spec's zero mode that fits `target` best for these codes, weighted by H."""
    n, sum_q, sum_qq = H.sum(1), (H * q).sum(1), (H * q * q).sum(1)
    sum_t, sum_qt = (H * target).sum(1), (H * q * target).sum(1)
    if spec.zero == "none":
        zero = np.full(len(q), spec.middle)
        return _fixed_zero(sum_q, sum_qq, sum_t, sum_qt, n, zero, scale, W, exponent, spec)[:2]
    var, cov = sum_qq - sum_q**2 / n, sum_qt - sum_q * sum_t / n
    with np.errstate(divide="ignore", invalid="ignore"):
        joint = np.where(var > FLAT * sum_qq, cov / var, scale)
    joint = round_scale(joint, W, exponent, spec)
    zero = sum_q / n - sum_t / n / joint
    if spec.zero in REAL_ZEROS:
        return joint, round_zero(zero, joint, exponent, spec)
    below = np.clip(np.floor(zero), 0, spec.max_code)
    above = np.clip(below + 1, 0, spec.max_code)
    scale_below, _, gain_below = _fixed_zero(sum_q, sum_qq, sum_t, sum_qt, n, below, scale, W, exponent, spec)
    scale_above, _, gain_above = _fixed_zero(sum_q, sum_qq, sum_t, sum_qt, n, above, scale, W, exponent, spec)
    take_above = gain_above > gain_below
    return np.where(take_above, scale_above, scale_below), np.where(take_above, above, below)


def _fixed_zero(
    sum_q: Array, sum_qq: Array, sum_t: Array, sum_qt: Array, n: Array, zero: Array, scale: Array, W: Array,
    exponent: NDArray[np.int32], spec: QuantSpec,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Least-squares scale for a given zero, and how much of the target's square it explains."""
    cross = sum_qt - zero * sum_t
    square = sum_qq - 2 * zero * sum_q + n * zero**2
    with np.errstate(divide="ignore", invalid="ignore"):
        fitted = round_scale(np.where(square > 0, cross / square, scale), W, exponent, spec)
    return fitted, zero, fitted * (2 * cross - fitted * square)


def round_scale(scale: Array, W: Array, exponent: NDArray[np.int32], spec: QuantSpec) -> Array:
    """Clamp to what the stored type holds and round to it; `scale` is in normalized units, the type is not."""
    stored = STORED_TYPES[spec.scale_dtype]
    floor = np.abs(W).max(axis=1) / (stored.max_zero if spec.zero in REAL_ZEROS else MAX_STEPS)
    absolute = np.ldexp(np.maximum(scale, floor), exponent)
    absolute = np.clip(absolute, stored.min_scale, stored.max_scale)
    return np.ldexp(round_stored(absolute, spec.scale_dtype), -exponent)


def round_zero(zero: Array, scale: Array, exponent: NDArray[np.int32], spec: QuantSpec) -> Array:
    """Round to a whole code (int) or to the stored type, itself (float) or as -zero * scale (offset)."""
    if spec.zero == "int":
        return np.clip(np.rint(zero), 0, spec.max_code)
    stored = STORED_TYPES[spec.scale_dtype]
    zero = np.clip(zero, -2 * stored.max_zero, 2 * stored.max_zero)
    if spec.zero == "float":
        return round_stored(zero, spec.scale_dtype)
    offset = np.clip(np.ldexp(-zero * scale, exponent), -stored.max_scale, stored.max_scale)
    return round_stored(np.ldexp(-round_stored(offset, spec.scale_dtype), -exponent) / scale, "float32")


def round_stored(x: Array, dtype: str) -> Array:
    """Round float64 to the nearest value that `dtype` holds, ties to even."""
    stored = STORED_TYPES[dtype]
    bits, exponent = stored.mantissa_bits, np.frexp(x)[1]
    if stored.subnormal_below:
        exponent = np.maximum(exponent, np.frexp(stored.subnormal_below)[1])
    rounded: Array = np.ldexp(np.rint(np.ldexp(x, bits - exponent)), exponent - bits)
    return rounded
