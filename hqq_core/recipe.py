"""Recipe: what a user asks of a whole checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hqq_core.spec import ZERO_MODES, QuantSpec, ZeroMode, known_fields, require

DEFAULT_MAX_SHARD_NBYTES = 5_000_000_000  # what transformers' save_pretrained writes
MIN_MAX_SHARD_NBYTES = 1_000
MAX_MAX_SHARD_NBYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of one conversion; an invalid one cannot exist. What a format can hold, `formats.check_recipe` says.

    Parameters
    ----------
    format : str
        Name of a writer in `hqq_core.formats.FORMATS`.
    nbits, group_size, axis, iters
        As in QuantSpec.
    zero : {"float", "int", "none"} or None
        None takes what the format holds best.
    include_modules : tuple of str
        Modules to quantize although they are copied by default (`lm_head`, ...): full names, or last parts of them.
    skip_modules : tuple of str
        Modules to copy although they are quantized by default; wins over include_modules.
    max_shard_nbytes : int
        No written weight file is larger, in bytes, unless it holds a single weight.

    Raises
    ------
    SpecError
        Names the field, what was got and what was wanted.
    """

    format: str = "compressed-tensors"
    nbits: int = 4
    group_size: int | None = 64
    axis: int = 1
    zero: ZeroMode | None = None
    iters: int = 10
    include_modules: tuple[str, ...] = ()
    skip_modules: tuple[str, ...] = ()
    max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES

    def __post_init__(self) -> None:
        require("format", self.format, isinstance(self.format, str), "the name of a format")
        require("zero", self.zero, self.zero is None or self.zero in ZERO_MODES, f"one of {ZERO_MODES}")
        for field in ("include_modules", "skip_modules"):
            names = getattr(self, field)
            require(
                field, names, isinstance(names, tuple | list) and all(map(_is_name, names)), "a list of module names"
            )
            object.__setattr__(self, field, tuple(names))
        size = self.max_shard_nbytes
        sized = (
            isinstance(size, int)
            and not isinstance(size, bool)
            and MIN_MAX_SHARD_NBYTES <= size <= MAX_MAX_SHARD_NBYTES
        )
        require("max_shard_nbytes", size, sized, f"{MIN_MAX_SHARD_NBYTES} to {MAX_MAX_SHARD_NBYTES} bytes")
        self.spec("float")

    def spec(self, zero: ZeroMode) -> QuantSpec:
        """Settings of one tensor, with `zero` where the recipe leaves it open."""
        return QuantSpec(
            nbits=self.nbits, group_size=self.group_size, axis=self.axis, zero=self.zero or zero, iters=self.iters
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        fields = dataclasses.asdict(self)
        return fields | {name: list(fields[name]) for name in ("include_modules", "skip_modules")}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """Build from `to_dict`'s result; an unknown field is a SpecError."""
        return cls(**known_fields(cls, fields))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 512
