"""Scales within super-blocks: the search as written, float64, all super-blocks at once, slow. The oracle of `_superblocks_numba`.

A weight is d sc q - dmin m, or d sc (q - middle): q its code, (sc, m) integers of its group, (d, dmin) float16 numbers of its
super-block; ggml's K types. Minimised is the weighted squared error of the super-block, for those stored values:

1. each group is solved by itself, for a real scale and offset
2. units are chosen such that the largest scale and offset become the largest integers (first of all for round to nearest)
3. each group's integers: next to its own optimum, a least-squares step, then scales near by, each with the offset that keeps the
   mean code in place and the one that fits its codes best; codes are chosen anew for every pair that is tried
4. (d, dmin) by least squares over the super-block, codes and integers as they are; then 3 again, from there, with the next
   neighbours; as long as that improves it
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hqq_core.solver import _reference
from hqq_core.solver._precision import STORED_TYPES
from hqq_core.solver._starts import super_block_search
from hqq_core.spec import SUPER_BLOCK, QuantSpec, ZeroMode

Array = NDArray[np.float64]
SINGULAR = 1e-9  # share of the product, of the determinant of (d, dmin): they cannot be told apart


def alone(spec: QuantSpec) -> QuantSpec:
    """Settings of a group that is solved by itself, before its scale becomes a multiple."""
    signed = spec.zero == "none"
    zero: ZeroMode = "none" if signed else "float"
    return dataclasses.replace(spec, scale_bits=None, zero=zero, signed=signed, scale_dtype="float32")


def shares(H: Array) -> Array:
    """What each group's normalized energies were divided by, the largest of a super-block being 1; 0 where a group has none."""
    largest = H.max(axis=-1)
    powers = np.where(largest > 0, np.ldexp(1.0, np.frexp(largest)[1]), 0.0)
    shared: Array = powers / powers.max(axis=-1, keepdims=True)
    return shared


def code_range(spec: QuantSpec) -> tuple[float, float]:
    """Smallest and largest code as the scale multiplies them: around the middle, unless there are offsets."""
    low = -spec.middle if spec.zero == "none" else 0.0
    return low, low + spec.max_code


def integer_range(spec: QuantSpec) -> tuple[float, float]:
    """Smallest and largest integer of a scale."""
    assert spec.scale_bits is not None
    levels = 1 << spec.scale_bits
    return (-(levels // 2), levels // 2 - 1) if spec.zero == "none" else (0, levels - 1)


class Integers(NamedTuple):
    """Scales and mins of all groups [shape=(n_super, n_groups)], whole numbers in float64."""

    scale: Array
    least: Array


class Units(NamedTuple):
    """d and dmin of all super-blocks [shape=(n_super, 1)], float16 values in float64."""

    d: Array
    dmin: Array


class Problem(NamedTuple):
    """Weights [shape=(n_super, n_groups, group_size)], their energies, shares of groups, and settings."""

    W: Array
    H: Array
    share: Array
    spec: QuantSpec
    codes: tuple[float, float]
    integers: tuple[float, float]

    @property
    def offsets(self) -> bool:
        """Whether there are any."""
        return self.spec.zero == "offset"


class Fit(NamedTuple):
    """Codes at some integers, what is left of the weights, and the weighted squared error of each group."""

    q: Array
    residual: Array
    error: Array


class Best:
    """The best integers of each group so far, with the mean of their codes where it was looked at."""

    def __init__(self, problem: Problem, at: Integers, fit: Fit) -> None:
        self.at, self.error, self.mean = at, fit.error, mean(problem, fit)

    def keep(self, problem: Problem, at: Integers, fit: Fit, *, with_mean: bool) -> None:
        """Take what is better."""
        better = fit.error < self.error
        self.at = Integers(*(np.where(better, new, old) for new, old in zip(at, self.at, strict=True)))
        self.error = np.where(better, fit.error, self.error)
        if with_mean:
            self.mean = np.where(better, mean(problem, fit), self.mean)


def solve(W: Array, spec: QuantSpec, energy: Array | None = None) -> tuple[NDArray[np.uint8], Units, Integers]:
    """Solve every row of W as one super-block.

    Parameters
    ----------
    W : ndarray [shape=(n_super, SUPER_BLOCK)], float64
        Finite weights.
    spec : QuantSpec
        With scale_bits.
    energy : ndarray [shape=(n_super, SUPER_BLOCK)], float64, optional
        Weight h >= 0 of each squared error; default: ones.

    Returns
    -------
    codes : ndarray [shape=(n_super, n_groups, group_size)], uint8
    units : Units
    integers : Integers
    """
    shape = len(W), -1, spec.group_size or SUPER_BLOCK
    H = (np.ones_like(W) if energy is None else _reference.normalize_energy(energy)).reshape(shape)
    problem = Problem(
        W.reshape(shape), _reference.normalize_energy(H), shares(H), spec, code_range(spec), integer_range(spec)
    )
    search = super_block_search(spec)
    error = np.full(len(W), np.inf)
    none = np.zeros(problem.W.shape[:2])
    units, at = Units(none[:, :1], none[:, :1]), Integers(none, none)

    def keep(new_units: Units, best: Best) -> bool:
        nonlocal error, units, at
        total = (problem.share * best.error).sum(axis=1)
        better = total < error
        error = np.where(better, total, error)
        units = Units(*(np.where(better[:, None], new, old) for new, old in zip(new_units, units, strict=True)))
        at = Integers(*(np.where(better[:, None], new, old) for new, old in zip(best.at, at, strict=True)))
        return bool(better.any())

    scale, offset, centre = rounded_to_nearest(problem)
    first = first_units(problem, scale, offset, problem.integers[1])
    keep(first, searched(problem, first, nearest(problem, first, scale, offset, centre), 0, 0))
    scale, offset, centre = own_optima(problem)
    for fewer in range(search.units):
        first = first_units(problem, scale, offset, problem.integers[1] - fewer)
        keep(
            first, searched(problem, first, nearest(problem, first, scale, offset, centre), search.steps, search.radius)
        )
    for _ in range(search.rounds):
        fitted = fitted_units(problem, units, at)
        if not keep(fitted, searched(problem, fitted, at, 1, 1)):
            break
    return (encode(problem, units, at).q - problem.codes[0]).astype(np.uint8), units, at


def rounded_to_nearest(problem: Problem) -> tuple[Array, Array, Array]:
    """Scale, offset and mean code that reach from the smallest weight, or 0, to the largest, or the larger to its side."""
    small, large, (low, high) = problem.W.min(axis=2), problem.W.max(axis=2), problem.codes
    if problem.offsets:
        offset = np.minimum(small, 0)
        scale = (large - offset) / high
    else:
        offset = np.zeros_like(small)
        up, down = np.maximum(small / low, large / high), -np.maximum(-large / low, -small / high)
        scale = np.where(large > -small, down, up)
    return scale, offset, mean(problem, fit_at(problem, scale, offset))


def own_optima(problem: Problem) -> tuple[Array, Array, Array]:
    """Scale, offset and mean code of each group by itself. An offset above zero becomes zero."""
    W, H, spec = problem.W, problem.H, problem.spec
    shape = W.shape[:2]
    _, scale, zero = _reference.solve(W.reshape(-1, W.shape[2]), alone(spec), H.reshape(-1, W.shape[2]))
    scale = scale.reshape(shape)
    offset = -scale * zero.reshape(shape) if problem.offsets else np.zeros(shape)
    scale = np.where(offset > 0, np.maximum(W.max(axis=2), 0) / problem.codes[1], scale)
    offset = np.minimum(offset, 0)
    return scale, offset, mean(problem, fit_at(problem, scale, offset))


def first_units(problem: Problem, scale: Array, offset: Array, top: float) -> Units:
    """Units such that the largest scale and offset are the integer `top`; the lowest scale has room for one more.

    Groups that count for nothing have no say.
    """
    scale, offset = np.where(problem.share > 0, scale, 0.0), np.where(problem.share > 0, offset, 0.0)
    d = np.maximum(scale.max(axis=1), 0) / top
    if not problem.offsets:
        d = np.maximum(d, np.maximum(-scale.min(axis=1), 0) / (top + 1))
    return Units(half(d), half(-offset.min(axis=1) / top))


def nearest(problem: Problem, units: Units, scale: Array, offset: Array, centre: Array) -> Integers:
    """Integers next to a real scale and offset; the mean code keeps its place."""
    whole = clipped(problem, ratio(scale, units.d))
    if not problem.offsets:
        return Integers(whole, np.zeros_like(whole))
    return Integers(whole, clipped(problem, ratio(-(offset + (scale - whole * units.d) * centre), units.dmin)))


def searched(problem: Problem, units: Units, at: Integers, steps: int, radius: int) -> Best:
    """The best integers for these units that least squares and a look at the neighbours find."""
    fit = encode(problem, units, at)
    best = Best(problem, at, fit)
    for _ in range(steps):
        at = least_squares(problem, units, at, fit)
        fit = encode(problem, units, at)
        best.keep(problem, at, fit, with_mean=True)
    middle, mean_code = best.at, best.mean
    for away in range(1, radius + 1):
        for by in (-away, away):
            look(problem, units, neighbour(problem, units, middle, mean_code, by), best)
    if radius == 0:
        return best
    if problem.offsets:
        middle = best.at
        for by in (-1, 1):
            at = Integers(middle.scale, clipped(problem, middle.least + by))
            best.keep(problem, at, encode(problem, units, at), with_mean=False)
    else:
        at = Integers(np.minimum(-middle.scale, problem.integers[1]), middle.least)
        fit = encode(problem, units, at)
        best.keep(problem, at, fit, with_mean=True)
        at = least_squares(problem, units, at, fit)
        best.keep(problem, at, encode(problem, units, at), with_mean=False)
    return best


def look(problem: Problem, units: Units, at: Integers, best: Best) -> None:
    """Keep integers that are better; where there are offsets, also the min that fits their codes best."""
    if problem.offsets:
        fit = encode(problem, units, at)
        best.keep(problem, at, fit, with_mean=True)
        offset = -units.dmin * at.least + (problem.H * fit.residual).sum(axis=2) / problem.H.sum(axis=2)
        at = Integers(at.scale, clipped(problem, ratio(-offset, units.dmin)))
    best.keep(problem, at, encode(problem, units, at), with_mean=False)


def neighbour(problem: Problem, units: Units, middle: Integers, mean_code: Array, by: int) -> Integers:
    """A scale `by` away; the mean code keeps its place."""
    scale = clipped(problem, middle.scale + by)
    if not problem.offsets:
        return Integers(scale, middle.least)
    moved = (scale - middle.scale) * units.d * mean_code
    return Integers(scale, clipped(problem, middle.least + ratio(moved, units.dmin)))


def least_squares(problem: Problem, units: Units, at: Integers, fit: Fit) -> Integers:
    """Integers next to the (scale, offset) that fit these codes best: the scale, then the min for it."""
    H, q, r = problem.H, fit.q, fit.residual
    n, sum_q, sum_qq = H.sum(axis=2), (H * q).sum(axis=2), (H * q * q).sum(axis=2)
    sum_r, sum_qr = (H * r).sum(axis=2), (H * q * r).sum(axis=2)
    scale, offset = units.d * at.scale, -units.dmin * at.least
    if not problem.offsets:
        return Integers(clipped(problem, ratio(scale + ratio(sum_qr, sum_qq), units.d)), at.least)
    step = ratio(sum_qr - sum_q * sum_r / n, sum_qq - sum_q**2 / n)
    whole = clipped(problem, ratio(scale + step, units.d))
    new = offset + (sum_r - (whole * units.d - scale) * sum_q) / n
    alone_step = ratio(sum_qr + offset * sum_q, sum_qq)  # the offset cannot follow above zero, and so the step does
    whole = np.where(new > 0, clipped(problem, ratio(scale + alone_step, units.d)), whole)
    return Integers(whole, clipped(problem, ratio(-new, units.dmin)))


def fitted_units(problem: Problem, units: Units, at: Integers) -> Units:
    """Least squares in (d, dmin) over all groups, their codes and integers as they are."""
    fit = encode(problem, units, at)
    A, B = at.scale[..., None] * fit.q, -at.least[..., None] * np.ones_like(fit.q)
    weights, r = problem.share[..., None] * problem.H, fit.residual
    a, b, c, u, v = ((weights * x * y).sum(axis=(1, 2)) for x, y in ((A, A), (A, B), (B, B), (A, r), (B, r)))
    determinant = a * c - b * b
    joint = problem.offsets & (determinant > SINGULAR * a * c)
    d = np.where(joint, ratio(c * u - b * v, determinant), ratio(u, a))
    dmin = np.where(joint, ratio(a * v - b * u, determinant), 0.0)
    return Units(half(np.maximum(units.d[:, 0] + d, 0)), half(np.maximum(units.dmin[:, 0] + dmin, 0)))


def encode(problem: Problem, units: Units, at: Integers) -> Fit:
    """Codes at some integers."""
    return fit_at(problem, units.d * at.scale, -units.dmin * at.least)


def fit_at(problem: Problem, scale: Array, offset: Array) -> Fit:
    """Codes at a scale, which may be zero, and an offset."""
    steps = ratio(problem.W - offset[..., None], scale[..., None])
    q = np.clip(np.rint(steps), *problem.codes)
    residual = problem.W - offset[..., None] - scale[..., None] * q
    return Fit(q, residual, (problem.H * residual**2).sum(axis=2))


def mean(problem: Problem, fit: Fit) -> Array:
    """Mean code of each group."""
    weighted: Array = (problem.H * fit.q).sum(axis=2) / problem.H.sum(axis=2)
    return weighted


def clipped(problem: Problem, integers: Array) -> Array:
    """Rounded to whole numbers that are stored."""
    return np.clip(np.rint(integers), *problem.integers)


def half(units: Array) -> Array:
    """Rounded to what float16 holds, as a column."""
    stored = STORED_TYPES["float16"]
    return _reference.round_stored(np.minimum(units, stored.max_scale), "float16")[:, None]


def ratio(x: Array, y: Array) -> Array:
    """The quotient, and 0 where it has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(y != 0, x / y, 0.0)
    return found
