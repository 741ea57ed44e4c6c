"""Where a group's search begins: one policy for all back-ends."""

from __future__ import annotations

from typing import NamedTuple

from hqq_core.spec import QuantSpec

# How many of a grid's steps the smallest start leaves out, and the smallest step there is, of the min-max one. Measured: with
# real energies, which make it pay to clip columns that hardly matter, and most where a grid cannot follow its group.
CLIPPED = {"float": 2.0, "offset": 2.0, "int": 4.0, "none": 6.0}
SMALLEST = 0.2
SHIFTS = (0.0, 1.0, -1.0)  # of the zero, in turn
# Of such a shift, in codes. A real zero's grid repeats after one code, so that half a code is farthest off.
STEP = {"float": 0.5, "offset": 0.5, "int": 1.0, "none": 0.0}


def starts(spec: QuantSpec) -> list[tuple[float, float]]:
    """Factors of the min-max step, and what to add to the zero; the first is round to nearest itself."""
    last = max(spec.starts - 1, 1)
    clipped = min(CLIPPED[spec.zero] / spec.max_code, 1 - SMALLEST)
    return [(1 - clipped * i / last, STEP[spec.zero] * SHIFTS[i % 3]) for i in range(spec.starts)]


def trial_iters(spec: QuantSpec) -> int:
    """Least-squares steps for each of several starts, before the best one gets all of `spec.iters`."""
    return min(2, spec.iters // 2)


class SuperBlockSearch(NamedTuple):
    """How long integers of scales and offsets are searched for.

    Parameters
    ----------
    units : int
        Units (d, dmin) that are tried for the groups' own optima: the largest scale gets the largest integer, the one below it,
        and so on. None are where all is rounded to nearest, which is tried before them.
    steps : int
        Least-squares steps of a group at each.
    radius : int
        Neighbours of a group's integer that are tried, on either side.
    rounds : int
        Least-squares steps of the units, each with a look at the next neighbours.
    """

    units: int
    steps: int
    radius: int
    rounds: int


def super_block_search(spec: QuantSpec) -> SuperBlockSearch:
    """With one start and no iterations nothing is. A neighbour without an offset takes a third of the time of another."""
    if spec.starts == 1 and spec.iters == 0:
        return SuperBlockSearch(0, 0, 0, 0)
    radius = min(spec.starts, 8) * (2 if spec.zero == "none" else 1)
    return SuperBlockSearch(max(1, min(spec.starts // 8, 4)), min(spec.iters, 1), radius, (spec.iters + 1) // 2)
