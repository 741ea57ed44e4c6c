"""How to load a result: the snippets of its format, with its place put in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Template
from typing import Any

from hqq_core.card._markdown import fenced
from hqq_core.card._metadata import architecture_of, task_of
from hqq_core.card._runtimes import SNIPPETS, WRITE, Snippet
from hqq_core.errors import SpecError
from hqq_core.formats.base import CheckpointWriter
from hqq_core.formats.capabilities import Runtime
from hqq_core.plan import Plan

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a result will be loaded from.

    Parameters
    ----------
    repo_id : str or None
        A repository on the Hub; None: the folder that the reader stands in.
    folder : str
        Where in the repository it lies; empty: at its root.

    Raises
    ------
    SpecError
        A repo_id that is none.
    """

    repo_id: str | None = None
    folder: str = ""

    def __post_init__(self) -> None:
        if self.repo_id is not None and not re.fullmatch(f"{_NAME}(/{_NAME})?", self.repo_id):
            raise SpecError("repo_id", f"repo_id {self.repo_id!r}: wanted NAME or OWNER/NAME")

    @property
    def local(self) -> bool:
        """Whether runtimes are given a folder: they load repositories themselves, but none of them a folder in one."""
        return self.repo_id is None or bool(self.folder)

    @property
    def path(self) -> str:
        """What a runtime is given."""
        if self.repo_id is None:
            return "."
        return self.folder or self.repo_id

    @property
    def download(self) -> str | None:
        """The command to run before; None where there is nothing to do."""
        if self.repo_id is None or not self.folder:
            return None
        return f'hf download {self.repo_id} --include "{self.folder}/*" --local-dir .'


def usage(plan: Plan, writer: CheckpointWriter, config: dict[str, Any], place: Place) -> str:
    """The section's text: a part for each runtime of the format, as its capabilities have them."""
    parts = [fenced("sh", place.download)] if place.download else []
    writes = task_of(config) == "text-generation"
    for runtime in writer.capabilities.runtimes:
        title = ""
        for snippet in SNIPPETS:
            if not _fits(snippet, plan, runtime, place, writes):
                continue
            if title != (snippet.title or str(runtime)):
                title = snippet.title or str(runtime)
                parts.append(f"### {title}")
            parts.append(fenced(snippet.language, _filled(snippet, runtime, config, place, writes)))
    return "\n\n".join(parts)


def _fits(snippet: Snippet, plan: Plan, runtime: Runtime, place: Place, writes: bool) -> bool:
    return (
        plan.recipe.format in snippet.formats
        and snippet.runtime == runtime.name
        and snippet.local in (None, place.local)
        and (writes or not snippet.writes)
        and snippet.holds(plan.spec)
    )


def _filled(snippet: Snippet, runtime: Runtime, config: dict[str, Any], place: Place, writes: bool) -> str:
    """A snippet's text without its gaps; what is put in are names that were checked."""
    kind = "AutoModelForCausalLM" if writes else architecture_of(config) or "AutoModel"
    gaps = {
        "kind": kind,
        "tokenizer": ", AutoTokenizer" if writes else "",
        "write": WRITE if writes else "",
        "download": "" if place.local else "\nfrom huggingface_hub import snapshot_download",
        "folder": f'"{place.path}"' if place.local else f'snapshot_download("{place.path}")',
        "version": runtime.version,
    }
    return Template(Template(snippet.text).safe_substitute(gaps)).substitute(path=place.path)
