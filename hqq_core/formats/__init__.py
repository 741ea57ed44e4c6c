"""Formats by name. Adding one is a file here, a line below and a section in docs/formats.md."""

from __future__ import annotations

from hqq_core.errors import FormatError
from hqq_core.formats.awq import AwqWriter
from hqq_core.formats.base import CheckpointWriter, refuse
from hqq_core.formats.compressed_tensors import CompressedTensorsWriter
from hqq_core.formats.gguf import GgufWriter
from hqq_core.formats.gptq import GptqWriter
from hqq_core.formats.hqq import HqqWriter
from hqq_core.formats.metal import MetalWriter
from hqq_core.formats.mlx import MlxWriter
from hqq_core.recipe import Recipe
from hqq_core.spec import QuantSpec

FORMATS: dict[str, CheckpointWriter] = {
    writer.name: writer
    for writer in (
        CompressedTensorsWriter(),
        HqqWriter(),
        MlxWriter(),
        AwqWriter(),
        GptqWriter(),
        MetalWriter(),
        GgufWriter(),
    )
}


def check_recipe(recipe: Recipe) -> QuantSpec:
    """The recipe's settings as its format holds them; a FormatError names the setting that it cannot hold."""
    writer = writer_of(recipe)
    if recipe.type is not None and not writer.typed:
        typed = ", ".join(repr(name) for name, other in FORMATS.items() if other.typed)
        raise refuse(writer, "type", recipe.type, f"no file types; format {typed} does")
    return writer.check(recipe)


def writer_of(recipe: Recipe) -> CheckpointWriter:
    """The writer that the recipe names; a FormatError lists those there are."""
    if recipe.format not in FORMATS:
        raise FormatError("format", f"format {recipe.format!r}: wanted one of {', '.join(FORMATS)}")
    return FORMATS[recipe.format].of_recipe(recipe)
