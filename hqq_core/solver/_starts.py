"""Where a group's search begins: one policy for all back-ends."""

from __future__ import annotations

from hqq_core.spec import QuantSpec

SMALLEST = 0.6  # of the min-max step; below it only 2 bit groups gain
SHIFTS = (0.0, 1.0, -1.0)  # of the zero, in turn
# Of such a shift, in codes. A real zero's grid repeats after one code, so that half a code is farthest off.
STEP = {"float": 0.5, "offset": 0.5, "int": 1.0, "none": 0.0}


def starts(spec: QuantSpec) -> list[tuple[float, float]]:
    """Factors of the min-max step, and what to add to the zero; the first is round to nearest itself."""
    last = max(spec.starts - 1, 1)
    return [(1 - (1 - SMALLEST) * i / last, STEP[spec.zero] * SHIFTS[i % 3]) for i in range(spec.starts)]


def trial_iters(spec: QuantSpec) -> int:
    """Least-squares steps for each of several starts, before the best one gets all of `spec.iters`."""
    return min(2, spec.iters // 2)
