"""What scale and zero are stored as, and how far they may go: one policy for all back-ends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredType:
    """A floating type that scales and zeros are stored in.

    Parameters
    ----------
    mantissa_bits : int
        Bits kept of a normal number's significand, the hidden one included.
    max_scale, min_scale : float
        Bounds of a stored scale. The lower one keeps six significant bits where the type goes subnormal.
    max_zero : float
        The scale of a group with a real zero is at least max|w| / max_zero, so that its zero is stored to a unit or better. Where
        max_scale forbids that, the zero stops at twice this.
    subnormal_below : float
        Smallest normal number where the type's range is narrower than float32's, else 0.
    """

    mantissa_bits: int
    max_scale: float
    min_scale: float
    max_zero: float
    subnormal_below: float


# As max_zero, where the zero is a whole number: no step is so small that weights lose their place or squares overflow.
MAX_STEPS = 2.0**23

# A squared error that is derived from float32 sums counts for this much more, and for this share of what the sum of weights
# contributes: a step must gain more than they lost in rounding.
ROUNDED, NOISE = 1 + 2.0**-20, 2.0**-22

# Codes whose variance is no more than this share of their mean square are all the same, but for rounding: they tell no scale.
FLAT = 2.0**-22

STORED_TYPES = {
    "float32": StoredType(24, 2.0**126, 2.0**-126, 2.0**23, 0.0),
    "bfloat16": StoredType(8, 2.0**126, 2.0**-126, 2.0**8, 0.0),
    "float16": StoredType(11, 65504.0, 2.0**-18, 2.0**11, 2.0**-14),
}
