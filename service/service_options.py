"""What commands that talk to a service share: its address, a client of it, and ways to say things."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.client import Client

DEFAULT_URL = "http://127.0.0.1:8000"

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Url = Annotated[str, typer.Option(envvar="HALFQUAD_URL", help="Where the service answers.")]
Label = Annotated[list[str] | None, typer.Option(help="key:value; may be given again.")]
Owner = Annotated[str | None, typer.Option(help="Whose job it is: owners take turns.")]
Priority = Annotated[int | None, typer.Option(min=0, max=9, help="Higher runs first; 5 unless given.")]


@contextmanager
def connected(url: str) -> "Iterator[Client]":
    from service.client import Client

    with Client(base_url=url) as client:
        yield client


def labels_of(texts: list[str] | None) -> dict[str, str]:
    return dict(_label(text) for text in texts or ())


def _label(text: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not colon:
        raise typer.BadParameter(f"{text!r} is not key:value", param_hint="--label")
    return key, value
