"""Markdown, in which names that strangers chose stay text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MAX_LENGTH = 200
_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#!|~&$:@.])")


def plain(value: object) -> str:
    """One line of text, with nothing in it that is markup, HTML or a link."""
    return _SPECIAL.sub(r"\\\1", _line(value))


def code(value: object) -> str:
    """One line in a code span, also within a table."""
    return f"`{_line(value).replace('`', chr(0x27)).replace('|', '¦')}`"


def fenced(language: str, text: str) -> str:
    """A block of code of our own."""
    return f"```{language}\n{text.strip()}\n```"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(value: object) -> str:
    """Printable, in one line, not empty, and no longer than a name should be."""
    text = "".join(character if character.isprintable() else " " for character in str(value)).strip()
    return text[:MAX_LENGTH] + "…" * (len(text) > MAX_LENGTH) or "?"
