"""File types: the names by which llama.cpp calls what a GGUF file is quantized to, and what a recipe must say for each."""

from __future__ import annotations

from collections.abc import Iterator

from hqq_core.formats.gguf.blocks import BLOCK_TYPES
from hqq_core.recipe import Recipe

# Main block type of each.
MAIN_TYPES = {
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0", "TQ2_0": "TQ2_0", "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
}  # fmt: skip
_SHORT = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama.cpp's short names
_BY_NBITS = {1.58: "TQ2_0", 2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K", 8: "Q8_0"}
_DEFAULTS = Recipe()


def file_type_of(recipe: Recipe) -> str | None:
    """The file type that a recipe names by its full name, or the one that its bits stand for; None: there is no such."""
    if recipe.type is None:
        return _BY_NBITS.get(recipe.nbits)
    name = _SHORT.get(recipe.type, recipe.type)
    return name if name in MAIN_TYPES else None


def main_type(file_type: str) -> str:
    """The block type that most matrices get."""
    return MAIN_TYPES[file_type]


def obstacles(recipe: Recipe, file_type: str | None) -> Iterator[tuple[str, str]]:
    """Settings of a recipe that contradict its file type: name of each, and what could be; defaults give way."""
    if file_type is None:
        by_type, known = recipe.type is not None, ", ".join(MAIN_TYPES)
        yield ("type", f"one of {known}") if by_type else ("nbits", f"one of {', '.join(map(str, _BY_NBITS))}")
        return
    settings = BLOCK_TYPES[main_type(file_type)].settings
    for field in ("nbits", "group_size", "zero"):
        if getattr(recipe, field) not in (getattr(_DEFAULTS, field), settings[field]):
            yield field, f"{settings[field]!r} in type {file_type}"
    if recipe.axis != 1:
        yield "axis", "1"
