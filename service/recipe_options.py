"""The recipe's options, for every command that takes them: one parameter of `recipes` each."""

from typing import Annotated, Any

import typer


def recipes(
    nbits: Annotated[float | None, typer.Option(help="Bits per weight: 1 to 8, or 1.58.")] = None,
    group_size: Annotated[
        str | None, typer.Option(help='Weights that share one scale, or "none" for a whole channel.')
    ] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="Format of the result; may be given again, for a folder of each.")
    ] = None,
    axis: Annotated[int | None, typer.Option(help="Axis that is grouped, 0 or 1.")] = None,
    zero: Annotated[str | None, typer.Option(help="float, offset, int or none; the format's own unless given.")] = None,
    type: Annotated[
        list[str] | None,
        typer.Option(
            help="What gguf or mlx is to be by name: a file type of llama.cpp's (Q4_K_M, Q8_0, ...) or a mix of mlx-lm's "
            "(mixed_4_6, ...); may be given again."
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="How long to search: fast, balanced or best.")] = None,
    energy: Annotated[
        str | None, typer.Option(help="What weights the columns: auto, synthetic, analytic or none.")
    ] = None,
    fold: Annotated[bool | None, typer.Option(help="Even out the columns of weights where that cancels.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Module to quantize although it is copied by default.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Module to leave alone.")] = None,
    max_shard_nbytes: Annotated[
        int | None, typer.Option(help="Size limit of one file of the result, in bytes.")
    ] = None,
) -> list[dict[str, Any]]:
    """A recipe for each format, with only what was given: defaults are the recipe's business."""
    given = {
        "nbits": int(nbits) if nbits is not None and nbits.is_integer() else nbits,
        "axis": axis,
        "zero": zero,
        "preset": preset,
        "energy": energy,
        "fold": fold,
        "include_modules": include or None,
        "skip_modules": skip or None,
        "max_shard_nbytes": max_shard_nbytes,
    }
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if group_size is not None:
        fields["group_size"] = None if group_size == "none" else _integer(group_size)
    names: list[dict[str, Any]] = [{"format": name} for name in format or ()] or [{}]
    return [{**fields, **name, **typed} for name in names for typed in _types(name, names, type)]


def fields_of(recipes: list[dict[str, Any]]) -> dict[str, Any]:
    """The field that a client's call gives them in."""
    return {"recipe": recipes[0]} if len(recipes) == 1 else {"recipes": recipes}


def _types(name: dict[str, Any], names: list[dict[str, Any]], types: list[str] | None) -> list[dict[str, Any]]:
    """The types that are meant for one of several formats: not those of another one among them."""
    homes = [(each, {"format": "mlx" if each.startswith("mixed_") else "gguf"}) for each in types or ()]
    return [{"type": each} for each, home in homes if home == name or home not in names] or [{}]


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f'{text!r} is neither a number nor "none"', param_hint="--group-size") from None
