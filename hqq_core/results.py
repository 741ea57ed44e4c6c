"""What a conversion gives: files and errors of a shard, and the manifest of the whole."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hqq_core.provenance import Provenance

MANIFEST = "halfquad_manifest.json"  # the file of a Manifest


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """One written file."""

    name: str
    nbytes: int
    sha256: str

    @property
    def final(self) -> bool:
        """Whether a shard's file is what readers look for: those of a format in one file are joined at the end."""
        return self.name.endswith(".safetensors")


@dataclass(frozen=True, slots=True)
class TensorResult:
    """How well one tensor was quantized.

    Parameters
    ----------
    name : str
    numel : int
    squared_error, squared_norm : float
        As in QuantizedTensor.
    digest : str
        QuantizedTensor.digest() of what was solved.
    """

    name: str
    numel: int
    squared_error: float
    squared_norm: float
    digest: str


@dataclass(frozen=True, slots=True)
class CopiedTensor:
    """A tensor that was not quantized; `digest` is the hex SHA-256 of what was written for it."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What one input shard became."""

    index: int
    files: tuple[ArtifactFile, ...]
    tensors: tuple[TensorResult, ...]
    copied: tuple[CopiedTensor, ...]

    @property
    def final(self) -> bool:
        """Whether all its files are."""
        return all(file.final for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ShardResult:
        """Build from `to_dict`'s result, also after a trip through JSON."""
        return cls(
            fields["index"],
            tuple(ArtifactFile(**file) for file in fields["files"]),
            tuple(TensorResult(**tensor) for tensor in fields["tensors"]),
            tuple(CopiedTensor(**tensor) for tensor in fields["copied"]),
        )


@dataclass(frozen=True, slots=True)
class HeldPart:
    """A shard's files that were found to hold what was solved of the source.

    Parameters
    ----------
    index : int
        The shard's.
    files : tuple of ArtifactFile
        As they were then; with them that of the factors, where any are folded.
    tensors : tuple of str
        Of the source; what became of them lies in these files and nowhere else.
    error_deviation : float or None
        Largest difference between a tensor's reported relative error and the one found; None: no tensor was quantized.
    """

    index: int
    files: tuple[ArtifactFile, ...]
    tensors: tuple[str, ...]
    error_deviation: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> HeldPart:
        """Build from `to_dict`'s result, also after a trip through JSON."""
        files = tuple(ArtifactFile(**file) for file in fields["files"])
        return cls(fields["index"], files, tuple(fields["tensors"]), fields["error_deviation"])


@dataclass(frozen=True, slots=True)
class Manifest:
    """A finished folder: every file but the manifest itself, the figures of the whole, and where it comes from.

    `provenance` is None in manifests that were written before there was one.
    """

    files: tuple[ArtifactFile, ...]
    metrics: dict[str, Any]
    version: int = 2
    provenance: Provenance | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        files = [dataclasses.asdict(file) for file in self.files]
        provenance = self.provenance.to_dict() if self.provenance else None
        return {"files": files, "metrics": self.metrics, "version": self.version, "provenance": provenance}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Manifest:
        """Build from `to_dict`'s result, also after a trip through JSON."""
        files, origin = tuple(ArtifactFile(**file) for file in fields["files"]), fields.get("provenance")
        return cls(files, fields["metrics"], fields["version"], Provenance.from_dict(origin) if origin else None)
