"""Options that several commands share: a function gathers them, and each command takes what it returns."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

Command = Callable[..., None]


def takes(*gathering: Callable[..., Any]) -> Callable[[Command], Command]:
    """For a command: the options of each function in place of the parameter that has its name."""
    options = {gather.__name__: inspect.signature(gather).parameters for gather in gathering}

    def decorate(command: Command) -> Command:
        merged: dict[str, inspect.Parameter] = {}
        for name, parameter in inspect.signature(command).parameters.items():
            merged |= options.get(name, {name: parameter})

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            gathered = {
                gather.__name__: gather(**{name: values.pop(name) for name in options[gather.__name__]})
                for gather in gathering
            }
            command(**gathered, **values)

        with_options.__signature__ = inspect.Signature(list(merged.values()))  # type: ignore[attr-defined]
        with_options.__annotations__ = {name: parameter.annotation for name, parameter in merged.items()}
        return with_options

    return decorate
