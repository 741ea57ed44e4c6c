"""Line: one runtime beside the reference, in figures; and the table of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hqq_core import FORMATS, Recipe
from tests.interop.reference import Reference, Source, perplexity
from tests.interop.runtime import Answered, Runtime

SETTINGS = ("runtime", "model", "format", "bits", "group", "zero")
FIGURES = ("largest Δ", "mean Δ", "by rounding", "perplexity", "greedy", "s")
COLUMNS = (*SETTINGS, *FIGURES)
BEGIN, END = "<!-- interop: begin -->", "<!-- interop: end -->"


@dataclass(frozen=True)
class Line:
    """What one runtime made of one result.

    Parameters
    ----------
    runtime, model : str
    recipe : Recipe
    agreed : bool
        Whether the largest difference is within what the runtime's arithmetic explains, and it loaded every layer.
    cells : tuple of str
        As `FIGURES`.
    note : str
        Why it did not agree, or what ran the layers.
    versions : dict
    """

    runtime: str
    model: str
    recipe: Recipe
    agreed: bool
    cells: tuple[str, ...]
    note: str
    versions: dict[str, str]

    @classmethod
    def of_json(cls, text: str) -> Line:
        """The inverse of `json`."""
        fields = json.loads(text)
        return cls(**fields | {"recipe": Recipe.from_dict(fields["recipe"]), "cells": tuple(fields["cells"])})

    @property
    def json(self) -> str:
        """For a journal."""
        return json.dumps(dataclasses.asdict(self) | {"recipe": self.recipe.to_dict()})

    @property
    def key(self) -> tuple[str, str, Recipe]:
        """What was asked."""
        return self.runtime, self.model, self.recipe

    @property
    def row(self) -> str:
        """As a line of a Markdown table."""
        recipe = self.recipe
        include = f" with {', '.join(recipe.include_modules)}" if recipe.include_modules else ""
        axis = ", axis 0" if recipe.axis == 0 else ""
        how = {"nbits": f"{recipe.nbits:g}", "group_size": str(recipe.group_size), "zero": f"{recipe.zero or ''}{axis}"}
        if recipe.type:
            how |= {name: "" for name in FORMATS[recipe.format].capabilities.typed_settings if name in how}
        settings = (self.runtime, self.model, f"{recipe.format} {recipe.type or ''}{include}".strip(), *how.values())
        return f"| {' | '.join([*settings, *self.cells])} |"


def failed(runtime: Runtime, source: Source, recipe: Recipe, reason: str) -> Line:
    """A runtime that gave no figures."""
    said = " ".join(reason.replace("|", "/").split())[:300]
    cells = (f"**failed**: {said}", *[""] * (len(FIGURES) - 1))
    return Line(runtime.name, source.name, recipe, False, cells, said, {})


def compared(
    runtime: Runtime, source: Source, recipe: Recipe, reference: Reference, answer: Answered, seconds: float
) -> Line:
    """An answer beside the reference in the runtime's own arithmetic."""
    arithmetic = runtime.arithmetic.of(source.dtype)
    wanted, rounded = reference.logits(arithmetic.without_rounding), reference.logits(arithmetic)
    got_logprobs = np.array(answer.logprobs) if answer.logits is None else source.logprobs(answer.logits)
    if answer.logits is None:
        got, wanted_too, rounded = got_logprobs, source.logprobs(wanted), source.logprobs(rounded)
    else:
        got, wanted_too = answer.logits, wanted
    largest, mean = difference(got, wanted_too)
    rounding = difference(rounded, wanted_too)[0] if answer.rounding is None else answer.rounding
    agreed = largest <= runtime.tolerated(rounding)
    said = tuple(map(perplexity, (source.logprobs(wanted), got_logprobs)))
    cells = (
        f"{largest:.1e}" + ("" if agreed else " **differs**"), f"{mean:.1e}", f"{rounding:.1e}" if rounding else "–",
        f"{source.perplexity:.4g} → {said[0]:.4g}, {said[1]:.4g}" if source.real else "–",
        same_until(answer.greedy, reference.greedy(arithmetic)), f"{seconds:.0f}",
    )  # fmt: skip
    return Line(runtime.name, source.name, recipe, agreed, cells, answer.layers, answer.versions)


def difference(got: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Largest and mean absolute difference, over the largest absolute value wanted."""
    off, unit = np.abs(got - wanted), np.abs(wanted).max()
    return float(off.max() / unit), float(off.mean() / unit)


def same_until(got: list[int], wanted: list[int]) -> str:
    """How far two continuations are the same."""
    n = next((i for i, (one, other) in enumerate(zip(got, wanted, strict=True)) if one != other), len(wanted))
    return "same" if n == len(wanted) else f"{n} of {len(wanted)}"


def table(lines: Iterable[Line]) -> str:
    """All lines, in Markdown, by runtime, under what was run."""
    lines = sorted(lines, key=lambda line: (line.runtime, line.model, line.recipe.format))
    versions = {line.runtime: line.versions for line in lines if line.versions}
    layers = {line.runtime: line.note for line in reversed(lines) if line.agreed}
    said = [
        f"- {name}: {', '.join(f'{package} {version}' for package, version in found.items())}; {layers.get(name, '')}"
        for name, found in versions.items()
    ]
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    return "\n".join([*said, "", head, *(line.row for line in lines)])


def between_marks(page: str, text: str) -> str:
    """The page with a new text between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"
