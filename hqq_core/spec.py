"""QuantSpec: how one tensor is quantized."""

from __future__ import annotations

import dataclasses
import reprlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hqq_core.errors import SpecError

ZeroMode = Literal["float", "offset", "int", "none"]
ScaleDtype = Literal["float32", "float16", "bfloat16"]

NBITS = (1, 1.58, 2, 3, 4, 5, 6, 7, 8)
TERNARY = 1.58
ZERO_MODES: tuple[str, ...] = get_args(ZeroMode)
REAL_ZEROS = ("float", "offset")
SCALE_DTYPES: tuple[str, ...] = get_args(ScaleDtype)
VERSION = 1
MAX_GROUP_SIZE = 1 << 31

SUPER_BLOCK = 256  # weights whose scales share one float16
# nbits, group_size, zero and scale_bits of ggml's K types, Q2_K to Q6_K.
K_TYPES = ((2, 16, "offset", 4), (3, 16, "none", 6), (4, 32, "offset", 6), (5, 32, "offset", 6), (6, 16, "none", 8))


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Settings of one tensor's quantization; an invalid one cannot exist.

    Parameters
    ----------
    nbits : int or 1.58
        Bits per code: 1 to 8; 1.58 has three codes, stored as two bits.
    group_size : int or None
        Weights that share one (scale, zero); None takes the whole channel.
    axis : int
        1 groups consecutive inputs of one output row; 0 groups strided rows of one input column, as `hqq` does.
    zero : {"float", "offset", "int", "none"}
        Real zero (HQQ), real zero of which -zero * scale is stored (MLX), integer zero point inside the code range, or a fixed
        middle (symmetric).
    scale_dtype : {"float32", "float16", "bfloat16"}
        What scale and zero, or offset, are stored as; they are rounded to it before the codes are chosen.
    scale_bits : int or None
        Bits of the integers that scales (and offsets) are stored as within a super-block of 256 weights, as multiples of one
        number of `scale_dtype` each; None: each scale is stored by itself. Goes with the settings in K_TYPES alone. Offsets are
        then never positive; without offsets scales are signed.
    signed : bool
        With zero "none": a scale may be negative, so that the longer side of the codes meets the largest weight.
    iters : int
        Least-squares steps; 0 with one start is round to nearest.
    starts : int
        Clipped starts that are tried, each for a step or two; the best goes on for `iters` steps.
    lp_norm : float
        Norm p of the objective sum |w - s(q - z)|^p, 0 < p <= 2. At 2 the shrinkage step is the identity.
    beta, kappa : float
        Half-quadratic penalty, in units of the step, and its growth per iteration; used where p < 2.

    Raises
    ------
    SpecError
        Names the field, what was got and what was wanted.

    Examples
    --------
    >>> QuantSpec(nbits=3).levels
    8
    """

    nbits: float = 4
    group_size: int | None = 64
    axis: int = 1
    zero: ZeroMode = "float"
    scale_dtype: ScaleDtype = "float16"
    scale_bits: int | None = None
    signed: bool = False
    iters: int = 4
    starts: int = 7
    lp_norm: float = 2.0
    beta: float = 10.0
    kappa: float = 1.01
    version: int = VERSION

    def __post_init__(self) -> None:
        require("nbits", self.nbits, _is_nbits(self.nbits), f"one of {NBITS}")
        sized = self.group_size is None or (_is_int(self.group_size) and 1 <= self.group_size <= MAX_GROUP_SIZE)
        require("group_size", self.group_size, sized, f"1 to {MAX_GROUP_SIZE}, or null for the whole channel")
        require("axis", self.axis, _is_int(self.axis) and self.axis in (0, 1), "0 or 1")
        require("zero", self.zero, self.zero in ZERO_MODES, f"one of {ZERO_MODES}")
        require("scale_dtype", self.scale_dtype, self.scale_dtype in SCALE_DTYPES, f"one of {SCALE_DTYPES}")
        self._require_super_blocks()
        signs = isinstance(self.signed, bool) and (not self.signed or (self.zero == "none" and self.scale_bits is None))
        require("signed", self.signed, signs, "false, or true where zero is 'none' and scale_bits is null")
        require("iters", self.iters, _is_int(self.iters) and 0 <= self.iters <= 1000, "an integer from 0 to 1000")
        require("starts", self.starts, _is_int(self.starts) and 1 <= self.starts <= 1000, "an integer from 1 to 1000")
        require("lp_norm", self.lp_norm, _is_real(self.lp_norm) and 0 < self.lp_norm <= 2, "above 0 and at most 2")
        require("beta", self.beta, _is_real(self.beta) and 0 < self.beta < 1e6, "a positive number")
        require("kappa", self.kappa, _is_real(self.kappa) and 1 <= self.kappa <= 10, "from 1 to 10")
        require("version", self.version, self.version == VERSION, f"{VERSION}, the only one so far")

    def _require_super_blocks(self) -> None:
        if self.scale_bits is None:
            return
        for field, wanted in (("axis", 1), ("scale_dtype", "float16"), ("lp_norm", 2)):
            got = getattr(self, field)
            require(field, got, got == wanted, f"{wanted} where scale_bits is set")
        kind = (self.nbits, self.group_size, self.zero, self.scale_bits)
        known = _is_int(self.scale_bits) and kind in K_TYPES
        kinds = ", ".join(f"{bits} with nbits {n}, group_size {g}, zero {z!r}" for n, g, z, bits in K_TYPES)
        require("scale_bits", self.scale_bits, known, f"null, {kinds}")

    @property
    def code_bits(self) -> int:
        """Whole bits that a code is stored in."""
        return 2 if self.nbits == TERNARY else int(self.nbits)

    @property
    def levels(self) -> int:
        """Number of codes, 2 ** nbits."""
        return 3 if self.nbits == TERNARY else 1 << self.code_bits

    @property
    def max_code(self) -> int:
        """Largest code Q = levels - 1."""
        return self.levels - 1

    @property
    def middle(self) -> float:
        """The zero of symmetric mode: levels // 2, as signed integers have it; 0.5 at one bit, for +-scale/2."""
        return 0.5 if self.nbits == 1 else float(self.levels // 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantSpec:
        """Build from `to_dict`'s result; an unknown field is a SpecError."""
        return cls(**known_fields(cls, fields))


def known_fields(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Return `fields` if the dataclass `cls` has them all, else raise a SpecError naming the first stranger."""
    names = {field.name for field in dataclasses.fields(cls)}
    for name in fields:
        require(name, fields[name], name in names, f"no such setting; there are {', '.join(sorted(names))}")
    return fields


def require(field: str, got: object, ok: bool, wanted: str) -> None:
    """Raise a SpecError for `field` unless `ok`."""
    if not ok:
        raise SpecError(field, f"{field} {_short(got)}: wanted {wanted}")


def _short(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        return "of too many digits"


def _is_nbits(value: object) -> bool:
    return value in NBITS and (_is_int(value) or value == TERNARY)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
