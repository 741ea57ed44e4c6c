"""Mixes of two widths by the names and rules of mlx-lm 0.32 (convert.py, mixed_quant_predicate_builder).

Most matrices get the low width; values and down projections of some layers, and the output head where it is quantized, the high.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hqq_core.formats.capabilities import Capabilities
from hqq_core.formats.depth import more_bits
from hqq_core.recipe import Recipe
from hqq_core.spec import QuantSpec

WIDTHS = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}  # low and high, in bits
_VALUES = ("v_proj", "v_a_proj", "v_b_proj")  # parts of names
_DOWN = re.compile(r"down_proj|\.experts\.\d+\.w2\b")  # the latter is Mixtral's


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix in one model.

    Parameters
    ----------
    low, high : int
        Widths in bits.
    n_layers : int
    """

    low: int
    high: int
    n_layers: int

    def nbits(self, module: str) -> int:
        """The width of a module's weight, by its name in the source."""
        told_apart = _DOWN.search(module) or any(part in module for part in _VALUES)
        some = told_apart and more_bits(_layer(module), self.n_layers)
        return self.high if some or "lm_head" in module else self.low


def mixable(modules: Iterable[str]) -> bool:
    """Whether a model has the projections that a mix tells apart; mlx-lm wants them too."""
    return any(_DOWN.search(module) for module in modules)


class Mixes(Capabilities):
    """Capabilities whose width may be a mix of two, which a recipe's type names."""

    def spec(self, recipe: Recipe) -> QuantSpec:
        """Settings at the low width."""
        return super().spec(_at_low_width(recipe))

    def obstacles(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """A type that is no mix, a width that contradicts it, and what any width of this format cannot hold."""
        if recipe.type is not None and recipe.type not in WIDTHS:
            yield "type", f"one of {', '.join(WIDTHS)}, or none"
            return
        plain = _at_low_width(recipe)
        if recipe.type is not None and recipe.nbits not in (Recipe().nbits, plain.nbits):
            yield "nbits", f"{plain.nbits!r} in type {recipe.type}"
        yield from super().obstacles(plain)

    def label(self, recipe: Recipe) -> str:
        """The mix in place of the width."""
        plain = super().label(recipe)
        return plain if recipe.type is None else f"{recipe.type}-{plain.partition('-')[2]}"


def _at_low_width(recipe: Recipe) -> Recipe:
    low = WIDTHS[recipe.type][0] if recipe.type in WIDTHS else recipe.nbits
    return dataclasses.replace(recipe, type=None, nbits=low)


def _layer(module: str) -> int:
    """The first number in a module's name; 0 outside the layers, as mlx-lm has it."""
    return next((int(part) for part in module.split(".") if part.isdigit()), 0)
