"""What is published: files of a job's result, by the names that they get."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hqq_core.results import MANIFEST


@dataclass(frozen=True)
class PushFile:
    """A file on this machine and the name under which it is to be found at the target."""

    name: str
    path: str
    nbytes: int
    sha256: str

    @property
    def is_manifest(self) -> bool:
        return PurePosixPath(self.name).name == MANIFEST

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "PushFile":
        return cls(fields["name"], fields["path"], fields["nbytes"], fields["sha256"])

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "path": self.path, "nbytes": self.nbytes, "sha256": self.sha256}


def files_of(folder: Path, artifacts: Iterable[dict[str, Any]]) -> list[PushFile]:
    """The artifacts of a job whose results lie in `folder`."""
    return [PushFile(file["name"], str(folder / file["name"]), file["nbytes"], file["sha256"]) for file in artifacts]


def named_by(manifest_name: str, manifest: Any) -> set[str]:
    """What an earlier result's manifest says to be its own, the manifest included; anything else was written by others.

    A manifest at a target is somebody's file: names that lead out of its folder are left alone.
    """
    folder = PurePosixPath(manifest_name).parent
    listed = manifest.get("files", ()) if isinstance(manifest, dict) else ()
    names = {entry.get("name") for entry in listed if isinstance(entry, dict)} if isinstance(listed, list) else set()
    safe = {name for name in names if isinstance(name, str) and _stays_below(name)}
    return {manifest_name, *(str(folder / name) for name in safe)}


def _stays_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
