"""Formats by name. Adding one is a file here, a line below and a section in docs/formats.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hqq_core.architectures import Role
from hqq_core.checkpoint import Checkpoint
from hqq_core.errors import CheckpointError, FormatError
from hqq_core.formats.awq import AwqWriter
from hqq_core.formats.base import CheckpointWriter, refuse
from hqq_core.formats.bitnet import BitnetWriter
from hqq_core.formats.compressed_tensors import CompressedTensorsWriter
from hqq_core.formats.gguf import GgufWriter
from hqq_core.formats.gptq import GptqWriter
from hqq_core.formats.hqq import HqqWriter
from hqq_core.formats.humming import HummingWriter
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
        BitnetWriter(),
        HummingWriter(),
    )
}


def described() -> list[dict[str, Any]]:
    """Every format and what it holds, as plain JSON types."""
    default = Recipe().format
    return [
        {"name": name, "default": name == default, **writer.capabilities.to_dict()} for name, writer in FORMATS.items()
    ]


def writer_of(recipe: Recipe) -> CheckpointWriter:
    """The writer that the recipe names; a FormatError lists those there are."""
    if recipe.format not in FORMATS:
        raise FormatError("format", f"format {recipe.format!r}: wanted one of {', '.join(FORMATS)}")
    return FORMATS[recipe.format].of_recipe(recipe)


def settled(recipe: Recipe) -> Recipe:
    """The recipe as its format goes by it: with no input energy and no folds where weights are kept as they are."""
    if writer_of(recipe).capabilities.lossless:
        return dataclasses.replace(recipe, energy="none", fold=False)
    return recipe


def check_recipe(recipe: Recipe) -> QuantSpec:
    """The recipe's settings as its format holds them; a FormatError names what it cannot hold, and formats that could."""
    writer = writer_of(recipe)
    for field, wanted in writer.capabilities.obstacles(recipe):
        raise refuse(writer, field, getattr(recipe, field), f"{wanted}; {_holders(recipe)}")
    return writer.capabilities.spec(recipe)


def writer_for(recipe: Recipe, checkpoint: Checkpoint) -> CheckpointWriter:
    """`writer_of` a recipe for this source; a FormatError names formats that hold such a model where this one does not."""
    try:
        return writer_of(recipe).of_model(checkpoint)
    except FormatError as error:
        raise FormatError(error.field, f"{error}; {_holders(recipe)}") from None


def check_model(
    writer: CheckpointWriter, recipe: Recipe, quantized: set[Role], copied: set[Role], config: dict[str, Any]
) -> None:
    """FormatError where no reader of the recipe's format takes such a model; it names formats whose readers do."""

    def takes(writer: CheckpointWriter, recipe: Recipe) -> bool:
        try:
            writer.check_model(writer.capabilities.spec(recipe), quantized, copied, config)
        except (CheckpointError, FormatError):  # a config that this one cannot make sense of
            return False
        return True

    try:
        writer.check_model(writer.capabilities.spec(recipe), quantized, copied, config)
    except FormatError as error:
        raise FormatError(error.field, f"{error}; {_holders(recipe, takes)}") from None


def _holders(recipe: Recipe, takes: Callable[[CheckpointWriter, Recipe], bool] = lambda *_: True) -> str:
    """Which other formats hold these settings, in words; those never run here, or for few models, are nobody's way out."""
    names = []
    for name, writer in FORMATS.items():
        other = dataclasses.replace(recipe, format=name)
        held = not any(writer.capabilities.obstacles(other))
        usual = not writer.capabilities.experimental and not writer.capabilities.lossless
        if name != recipe.format and usual and held and takes(writer, other):
            names.append(repr(name))
    if not names:
        return "no other format holds all that is asked"
    return f"format{'s' * (len(names) > 1)} {', '.join(names)} {'hold' if len(names) > 1 else 'holds'} it"
