"""Server-sent events, read line by line."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; `seq` counts without gaps, but for old ones that were dropped."""

    seq: int
    type: str
    data: dict[str, Any]


def parse(lines: Iterable[str]) -> Iterator[Event]:
    """Events of a stream; comments, pings and the retry hint are passed over."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")  # ours never spread one field over lines
            continue
        if "data" in fields and "id" in fields:
            yield Event(int(fields["id"]), fields.get("event", "message"), json.loads(fields["data"]))
        fields = {}
