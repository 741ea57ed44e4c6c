"""The matrix: which settings each runtime is shown. Adding a format or a runtime is a line."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hqq_core import FORMATS, Recipe
from hqq_core.formats.gguf.file_types import MAIN_TYPES
from hqq_core.formats.gptq import FAMILIES
from hqq_core.formats.mlx.mixes import WIDTHS

SMOLLM2 = "smollm2-135m"
TERNARY = "smollm2-135m, made ternary"
GROUPS = (64, 32, 128)  # of 128 SmolLM2's 576 inputs are no multiple: there its down projections alone are quantized
TINY = tuple(f"{family}, {dtype}" for family in FAMILIES for dtype in ("float16", "bfloat16"))


@dataclass(frozen=True)
class Cells:
    """Settings of one format, each for the same models and runtimes.

    Parameters
    ----------
    format : str
    runtimes : tuple of str
        Names in `RUNTIMES`.
    nbits : tuple or None
        None: all widths that the format holds, 4 first.
    group_sizes : tuple
    every_zero : bool
        All zeros that the format holds at a width, or the one that it takes unless told.
    types : tuple of str
        File types of `gguf`, which say all of that, or mixes of `mlx`.
    models : tuple of str
        A name in `tests.models.MODELS`, or "family, dtype" for a tiny random model of `tests.families`.
    more : dict
        Other fields of the recipe.
    """

    format: str
    runtimes: tuple[str, ...]
    nbits: tuple[float, ...] | None = None
    group_sizes: tuple[int | None, ...] = GROUPS
    every_zero: bool = False
    types: tuple[str, ...] = ()
    models: tuple[str, ...] = (SMOLLM2,)
    more: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Recipe]]:
        for model, settings in itertools.product(self.models, self._settings()):
            yield model, Recipe(format=self.format, preset="fast", energy="analytic", **settings, **self.more)

    def _settings(self) -> Iterator[dict[str, Any]]:
        if self.types:
            yield from ({"type": name} for name in self.types)
            return
        held = FORMATS[self.format].capabilities.zeros
        widths = self.nbits or sorted(held, key=lambda nbits: (nbits != 4, nbits))
        for nbits, size in itertools.product(widths, self.group_sizes):
            for zero in held[nbits] if self.every_zero else held[nbits][:1]:
                yield {"nbits": nbits, "group_size": size, "zero": zero}


MATRIX = (
    Cells("compressed-tensors", ("transformers",), every_zero=True),
    Cells("compressed-tensors", ("vLLM",), (4,), every_zero=True),
    Cells("mlx", ("mlx-lm",)),
    Cells("mlx", ("mlx-lm",), (4,), (64,), more={"include_modules": ("embed_tokens",)}),
    Cells("mlx", ("mlx-lm",), types=tuple(WIDTHS)),
    Cells("metal", ("transformers (metal)",)),
    Cells("hqq", ("hqq",)),
    Cells("hqq", ("hqq",), (4,), (64,), every_zero=True),
    Cells("hqq", ("hqq",), group_sizes=(64,), more={"axis": 0}),
    Cells("hqq", ("transformers 4",), group_sizes=(64,)),
    Cells("awq", ("vLLM", "mlx-lm (awq)", "gptqmodel"), group_sizes=(64, 128)),
    Cells("gptq", ("gptqmodel",), group_sizes=(64, 32)),  # it wants all layers
    Cells("gguf", ("transformers (gguf)", "llama.cpp"), types=tuple(MAIN_TYPES)),
    Cells("bitnet", ("transformers (bitnet)",), group_sizes=(None,), models=(TERNARY,)),
    Cells("gguf", ("transformers (gguf)", "llama.cpp"), types=("TQ2_0",), models=(TERNARY,)),
    Cells("awq", ("gptqmodel",), group_sizes=(64, 128), models=TINY),
    Cells("gptq", ("gptqmodel",), models=TINY),
)


@dataclass(frozen=True)
class Cell:
    """One result, and the runtimes that it is shown."""

    model: str
    recipe: Recipe
    runtimes: tuple[str, ...]


def selected(matrix: Iterable[Cells], words: list[str], done: Container[tuple[str, str, Recipe]]) -> list[Cell]:
    """Each result once, with those of its runtimes that a word names, or all if one names its format; without words, all."""
    found: dict[tuple[str, Recipe], list[str]] = {}
    for cells in matrix:
        named = [name for name in cells.runtimes if not words or {name, cells.format} & set(words)]
        for model, recipe in cells:
            todo = [name for name in named if (name, model, recipe) not in done]
            names = found.setdefault((model, recipe), [])
            names.extend(name for name in todo if name not in names)
    return [Cell(model, recipe, tuple(names)) for (model, recipe), names in found.items() if names]


def first_of_each(cells: Iterable[Cell]) -> Iterator[Cell]:
    """One cell for each format in a runtime."""
    seen: set[tuple[str, str]] = set()
    for cell in cells:
        names = tuple(name for name in cell.runtimes if (name, cell.recipe.format) not in seen)
        seen |= {(name, cell.recipe.format) for name in names}
        if names:
            yield dataclasses.replace(cell, runtimes=names)
