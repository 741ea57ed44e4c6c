"""Where a result comes from: its source, the software that made it, and its settings. No times: the same again is the same."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MATTER = ("halfquad", "torch", "numba", "numpy")  # what the last bit of a weight may hang on


def versions() -> dict[str, str]:
    """Of the software that decides what is written, as far as it is installed."""
    found = {}
    for package in MATTER:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from its source alone
            continue
    return found


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a result comes from.

    Parameters
    ----------
    repo_id, commit : str or None
        The source's repository on the Hub and the full commit that was read; None: a local folder.
    folder : str or None
        The local folder's name, never its path; None for a repository.
    job_id : str or None
        The service's job; None: the library was called.
    recipe : mapping or None
        `Recipe.to_dict()`; `finish_checkpoint` puts in that of its plan.
    versions : mapping of str to str
        By package; default: those of this process.
    """

    repo_id: str | None = None
    commit: str | None = None
    folder: str | None = None
    job_id: str | None = None
    recipe: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def name(self) -> str:
        """What the source is called, without its owner."""
        return (self.repo_id or self.folder or "model").rpartition("/")[2] or "model"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        fields = {key: getattr(self, key) for key in ("repo_id", "commit", "folder", "job_id")}
        recipe = None if self.recipe is None else dict(self.recipe)
        return {**fields, "recipe": recipe, "versions": dict(self.versions)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Provenance:
        """Build from `to_dict`'s result, also after a trip through JSON; a TypeError where a field is of another type."""
        texts = {key: fields.get(key) for key in ("repo_id", "commit", "folder", "job_id")}
        found, recipe = fields.get("versions", {}), fields.get("recipe")
        for key, value, kind in (("versions", found, dict), ("recipe", recipe, dict | None)):
            if not isinstance(value, kind):
                raise TypeError(f"provenance: {key} is {type(value).__name__}: wanted an object")
        for key, value in {**texts, **found}.items():
            if not isinstance(value, str | None):
                raise TypeError(f"provenance: {key} is {type(value).__name__}: wanted a text")
        return cls(**texts, recipe=recipe, versions=found)
