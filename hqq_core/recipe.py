"""Recipe: what a user asks of a whole checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hqq_core.spec import ZERO_MODES, QuantSpec, ZeroMode, known_fields, require

Preset = Literal["fast", "balanced", "best"]
EnergyMode = Literal["auto", "synthetic", "analytic", "none"]

ENERGY_MODES: tuple[str, ...] = get_args(EnergyMode)
# iters and starts of a QuantSpec; "balanced" is also its default.
PRESETS: dict[Preset, tuple[int, int]] = {"fast": (2, 3), "balanced": (4, 7), "best": (10, 32)}
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
    nbits, group_size, axis
        As in QuantSpec.
    type : str or None
        Of format `gguf`: a file type as llama.cpp names it, such as Q4_K_M. Bits, group size and zero of each tensor follow from
        it, and the defaults of those give way. None takes the one that `nbits` stands for. Of format `mlx`: a mix of two widths
        as mlx-lm names it, such as mixed_4_6, which the bits of each tensor follow from. None: `nbits` everywhere.
    preset : {"fast", "balanced", "best"}
        How long the solver searches; docs/solver.md has what each costs and gains.
    zero : {"float", "offset", "int", "none"} or None
        None takes what the format holds best.
    energy : {"auto", "synthetic", "analytic", "none"}
        Where the weights of the columns come from: random tokens, the weights alone, or nowhere (h = 1). "auto" takes the
        first of these that can be had, tensor by tensor; the plan and the report say which.
    fold : bool
        Even out the columns of weights, at the expense of norms and of rows before, wherever a profile finds that it cancels.
        Adapters made for the source do not fit the result.
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
    nbits: float = 4
    group_size: int | None = 64
    axis: int = 1
    zero: ZeroMode | None = None
    type: str | None = None
    preset: Preset = "balanced"
    energy: EnergyMode = "auto"
    fold: bool = True
    include_modules: tuple[str, ...] = ()
    skip_modules: tuple[str, ...] = ()
    max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES

    def __post_init__(self) -> None:
        require("format", self.format, isinstance(self.format, str), "the name of a format")
        require("zero", self.zero, self.zero is None or self.zero in ZERO_MODES, f"one of {ZERO_MODES}")
        require("type", self.type, self.type is None or _is_name(self.type), "the name of a file type, or null")
        require("preset", self.preset, self.preset in tuple(PRESETS), f"one of {tuple(PRESETS)}")
        require("energy", self.energy, self.energy in ENERGY_MODES, f"one of {ENERGY_MODES}")
        require("fold", self.fold, isinstance(self.fold, bool), "true or false")
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
        iters, starts = PRESETS[self.preset]
        return QuantSpec(
            nbits=self.nbits,
            group_size=self.group_size,
            axis=self.axis,
            zero=self.zero or zero,
            iters=iters,
            starts=starts,
        )

    @property
    def weighted(self) -> bool:
        """Whether input energies matter: a group along axis 0 lies within one column, which has one weight."""
        return self.energy != "none" and self.axis != 0

    @property
    def correlated(self) -> bool:
        """Whether the solver is to use correlations between inputs, which synthetic energies come with."""
        return self.preset == "best" and self.weighted and self.energy in ("auto", "synthetic")

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
