"""What a source's own README.md says in its front matter: YAML that strangers wrote, read as text and nothing else."""

from __future__ import annotations

import re
from typing import Any

from hqq_core.checkpoint import README, Checkpoint

MAX_NBYTES = 1 << 18  # results of evaluations fill some 100 kB of it; the parser needs a second for that
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def front_matter(checkpoint: Checkpoint) -> dict[str, Any]:
    """Its fields by name; every value is a text, or a list or mapping of such. Empty where there is none that can be read.

    Nothing is resolved: no types (`no` is Norwegian, not false), no tags, and an alias or a merge, of which a few lines can
    stand for gigabytes, makes the whole unreadable.
    """
    if not (checkpoint.folder / README).is_file():
        return {}
    return front_matter_in(next(checkpoint.file_pieces(README), b""))


def front_matter_in(raw: bytes) -> dict[str, Any]:
    """As `front_matter`, of a card's first bytes."""
    import yaml

    found = _FRONT_MATTER.match(raw[:MAX_NBYTES].decode(errors="replace"))
    if not found:
        return {}

    class PlainLoader(yaml.BaseLoader):
        """Texts, lists and mappings of them."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    try:
        value = yaml.load(found.group(1), PlainLoader)
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        OverflowError,
    ):  # the last two: of a character that there is not
        return {}
    return value if isinstance(value, dict) else {}
