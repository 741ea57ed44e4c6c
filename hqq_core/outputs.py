"""Outputs: the folder of each recipe of a job, which reads its source once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from hqq_core.errors import SpecError
from hqq_core.formats import check_recipe, writer_of
from hqq_core.recipe import Recipe

FIELDS = tuple(Recipe.__dataclass_fields__)


def output_folders(recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """Where below a job's output each recipe's result lies: nowhere further for one alone, else a folder named after it.

    A name has format, bits and group size, and what else was chosen of axis, zero, preset and fold.

    Raises
    ------
    FormatError, SpecError
        A setting that its format cannot hold; an energy other than an earlier recipe's, for the source is profiled once; two
        recipes for one folder. `recipe` says which of them is meant.

    Examples
    --------
    >>> output_folders([Recipe(format="mlx"), Recipe(format="hqq", nbits=3, preset="best")])
    ('mlx-4bit-g64', 'hqq-3bit-g64-best')
    """
    if not recipes:
        raise SpecError("recipes", "no recipe: wanted one or more")
    names: list[str] = []
    for index, recipe in enumerate(recipes):
        try:
            check_recipe(recipe)
            _check_energy(recipe, recipes[:index])
            names.append(_name(recipe))
            _check_name(names, recipe, recipes)
        except SpecError as error:
            error.recipe = index
            raise
    return tuple(names) if len(names) > 1 else ("",)


def _name(recipe: Recipe) -> str:
    """Deterministic, and safe as a path: the format is one of ours."""
    chosen = [
        recipe.format,
        writer_of(recipe).capabilities.label(recipe),
        f"axis{recipe.axis}" if recipe.axis != 1 else "",
        recipe.zero or "",
        recipe.preset if recipe.preset != "balanced" else "",
        "" if recipe.fold or _lossless(recipe) else "unfolded",
    ]
    return "-".join(filter(None, chosen))


def _check_energy(recipe: Recipe, before: Sequence[Recipe]) -> None:
    wanted = next((other.energy for other in before if not _lossless(other)), recipe.energy)
    if recipe.energy != wanted and not _lossless(recipe):
        raise SpecError("energy", f"energy {recipe.energy!r}: wanted {wanted!r}, as a recipe before has it")


def _lossless(recipe: Recipe) -> bool:
    """Whether weights are kept as they are, so that energy and fold are none of its business: see `formats.settled`."""
    return writer_of(recipe).capabilities.lossless


def _check_name(names: Sequence[str], recipe: Recipe, recipes: Sequence[Recipe]) -> None:
    *before, name = names
    if name in before:
        other = recipes[before.index(name)]
        differing = [field for field in FIELDS if getattr(recipe, field) != getattr(other, field)]
        field = differing[0] if differing else "format"
        apart = f"differs in {', '.join(differing)} alone" if differing else "is the same"
        raise SpecError(field, f"{field}: folder {name} is another recipe's, which {apart}: wanted a job of its own")
