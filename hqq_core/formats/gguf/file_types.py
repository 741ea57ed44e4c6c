"""File types: the names by which llama.cpp calls what a GGUF file is quantized to, and what a recipe must say for each."""

from __future__ import annotations

from collections.abc import Iterator

from hqq_core.formats.capabilities import Capabilities, Runtime
from hqq_core.formats.gguf.blocks import BLOCK_TYPES
from hqq_core.recipe import Recipe
from hqq_core.spec import QuantSpec, ZeroMode

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


class FileTypes(Capabilities):
    """Capabilities whose settings follow from a file type."""

    def spec(self, recipe: Recipe) -> QuantSpec:
        """Settings of the main block type."""
        file_type = file_type_of(recipe)
        return BLOCK_TYPES[main_type(file_type)].spec(recipe.preset) if file_type else recipe.spec("offset")

    def obstacles(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """Settings that contradict the file type; defaults give way to it."""
        file_type = file_type_of(recipe)
        if recipe.axis != 1:
            yield "axis", "1"
        if file_type is None:
            named = ("type", self.types) if recipe.type is not None else ("nbits", tuple(_BY_NBITS))
            yield named[0], f"one of {', '.join(map(str, named[1]))}"
            return
        settings = BLOCK_TYPES[main_type(file_type)].settings
        for field in ("nbits", "group_size", "zero"):
            if getattr(recipe, field) not in (getattr(_DEFAULTS, field), settings[field]):
                yield field, f"{settings[field]!r} in type {file_type}"

    def type_of(self, recipe: Recipe) -> str | None:
        """The file type, named or by its bits."""
        return file_type_of(recipe)

    def label(self, recipe: Recipe) -> str:
        """The file type, which is what all else follows from."""
        return file_type_of(recipe) or super().label(recipe)


def _zeros() -> dict[float, tuple[ZeroMode, ...]]:
    """Zero modes of the block types by width; first that of the file type which the width stands for."""
    zeros: dict[float, tuple[ZeroMode, ...]] = {}
    for nbits, file_type in _BY_NBITS.items():
        first = BLOCK_TYPES[main_type(file_type)].settings["zero"]
        held = [kind.settings["zero"] for kind in BLOCK_TYPES.values() if kind.settings["nbits"] == nbits]
        zeros[nbits] = tuple(dict.fromkeys([first, *held]))
    return zeros


CAPABILITIES = FileTypes(
    zeros=_zeros(),
    group_sizes=tuple(sorted({kind.settings["group_size"] for kind in BLOCK_TYPES.values()})),
    types=tuple(MAIN_TYPES),
    typed_settings=("nbits", "group_size", "axis", "zero"),
    exactness="as solved: scales in half precision, or integers of super-blocks",
    runtimes=(
        Runtime("llama.cpp", "0.5", "by node-llama-cpp 3.22"),
        Runtime("transformers", "5.23", "dequantized; no first Gemma"),
    ),
    library="gguf",
)
