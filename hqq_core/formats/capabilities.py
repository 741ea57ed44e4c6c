"""Capabilities: what a format holds and what loads it, as data; refusals, the API and the docs are drawn from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hqq_core.recipe import Recipe
from hqq_core.spec import QuantSpec, ZeroMode


@dataclass(frozen=True, slots=True)
class Runtime:
    """Software that loads a format.

    Parameters
    ----------
    name, version : str
        The version, or range of them, that was run or whose source was read.
    note : str
        What it needs beside, or which settings alone it takes; empty where there is nothing to say.
    """

    name: str
    version: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one format holds.

    Parameters
    ----------
    zeros : mapping of nbits to tuple of {"float", "offset", "int", "none"}
        By width, the zero modes that it holds; the first is taken unless the recipe says another.
    group_sizes : tuple of int
        Group sizes that are held.
    group_multiple : int or None
        Multiples of this are held too.
    whole_channel : bool
        A whole channel (group size None) is held too.
    axes : tuple of int
    types : tuple of str
        Names that a recipe may give as its `type`.
    typed_settings : tuple of str
        The settings that follow from a type.
    exactness : str
        How the stored numbers come out of what was solved, in a few words.
    runtimes : tuple of Runtime
    lossless : bool
        Weights that are on its grid already are kept as they are and all others refused: nothing is solved, weighed or folded.
    experimental : bool
        Written as its readers' source has it, but never run by them here.
    library : str
        What the Hub calls the library that loads a repository of this format (`library_name` of a model card).
    """

    zeros: Mapping[float, tuple[ZeroMode, ...]]
    exactness: str
    runtimes: tuple[Runtime, ...]
    group_sizes: tuple[int, ...] = ()
    group_multiple: int | None = None
    whole_channel: bool = False
    axes: tuple[int, ...] = (1,)
    types: tuple[str, ...] = ()
    typed_settings: tuple[str, ...] = ()
    lossless: bool = False
    experimental: bool = False
    library: str = "transformers"

    @property
    def nbits(self) -> tuple[float, ...]:
        """Widths that are held."""
        return tuple(self.zeros)

    def spec(self, recipe: Recipe) -> QuantSpec:
        """The recipe's settings, with this format's zero where it leaves that open; `obstacles` says whether they are held."""
        return recipe.spec(self.zeros[recipe.nbits][0] if recipe.nbits in self.zeros else "float")

    def obstacles(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """Settings that cannot be held: name of each, and what could be."""
        spec = self.spec(recipe)
        if recipe.type is not None:
            yield "type", "none"
        if spec.nbits not in self.zeros:
            yield "nbits", _one_of(self.nbits)
        if not self._holds_groups(spec.group_size):
            yield "group_size", self.groups
        if spec.axis not in self.axes:
            yield "axis", _one_of(self.axes)
        if spec.zero not in self.zeros.get(spec.nbits, (spec.zero,)):
            yield "zero", _one_of(self.zeros[spec.nbits])

    def type_of(self, recipe: Recipe) -> str | None:
        """The type that its settings follow from, where there is one."""
        return recipe.type

    def label(self, recipe: Recipe) -> str:
        """What a recipe chose of these settings, for the name of a folder."""
        group = f"g{recipe.group_size}" if recipe.group_size else "channel"
        return f"{recipe.nbits}bit-{group}"

    def _holds_groups(self, size: int | None) -> bool:
        if size is None:
            return self.whole_channel
        return size in self.group_sizes or (self.group_multiple is not None and size % self.group_multiple == 0)

    @property
    def groups(self) -> str:
        """Group sizes in words."""
        sizes = [", ".join(map(str, self.group_sizes))] if self.group_sizes else []
        sizes += [f"multiples of {self.group_multiple}"] if self.group_multiple else []
        return " or ".join([*sizes, *(["a whole channel"] if self.whole_channel else [])])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `zeros` by nbits as text."""
        fields = {**dataclasses.asdict(self), "zeros": {str(nbits): list(zeros) for nbits, zeros in self.zeros.items()}}
        lists = {name: list(fields[name]) for name in ("group_sizes", "axes", "types", "typed_settings", "runtimes")}
        return {"nbits": list(self.nbits), **fields, **lists}

    def words(self) -> dict[str, str]:
        """A row of the table of formats, by column."""
        zeros = dict.fromkeys(zero for held in self.zeros.values() for zero in held)
        return {
            "bits": ", ".join(map(str, self.nbits)),
            "group size": self.groups,
            "axis": ", ".join(map(str, self.axes)),
            "zero": ", ".join(zeros),
            "exact": self.exactness,
            "loads in": "; ".join(map(str, self.runtimes)) + ("; experimental" if self.experimental else ""),
        }


def _one_of(values: tuple[object, ...]) -> str:
    return " or ".join(filter(None, (", ".join(map(repr, values[:-1])), repr(values[-1]))))
