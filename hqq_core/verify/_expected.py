"""What a result says of itself: its files, and what became of every tensor."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hqq_core.checkpoint import MANIFEST
from hqq_core.errors import CheckpointError, VerificationError
from hqq_core.results import Manifest
from hqq_core.safetensors_file import DTYPES, tensor_nbytes

MAX_JSON_NBYTES = 1 << 30  # a report has some 700 bytes a tensor


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor of the source, and what it became.

    Parameters
    ----------
    name, dtype : str
        As in the source; dtype in safetensors' words.
    shape : tuple of int
    quantized : bool
    folded : tuple of {"columns", "rows", "values"}
        What a fold did to it.
    digest : str
        Of what was solved, or of the bytes that were copied.
    squared_error, squared_norm : float or None
        As the solver had them; None: copied.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    quantized: bool
    folded: tuple[str, ...]
    digest: str
    squared_error: float | None
    squared_norm: float | None

    @property
    def module(self) -> str:
        """The module whose weight this is."""
        return self.name.rpartition(".")[0]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the source."""
        return tensor_nbytes(self.dtype, self.shape)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Expected:
        """One entry of a report."""
        quantized = fields["spec"] is not None
        if fields["dtype"] not in DTYPES:
            raise ValueError(f"{fields['name']}: dtype {fields['dtype']!r}: wanted one of {', '.join(DTYPES)}")
        errors = (float(fields[key]) if quantized else None for key in ("squared_error", "squared_norm"))
        return cls(
            str(fields["name"]), str(fields["dtype"]), tuple(map(int, fields["shape"])), quantized,
            tuple(fields["folded"]), str(fields["digest"]), *errors,
        )  # fmt: skip


def read_manifest(folder: Path) -> Manifest:
    """The folder's own; a CheckpointError where it has none, or another version's."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder.name}: no such folder")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"no {MANIFEST} in the folder: wanted a finished result of Halfquad")
    fields = read_json(folder / MANIFEST)
    try:
        manifest = Manifest.from_dict(fields)
        if not all(isinstance(file.name, str) for file in manifest.files):
            raise TypeError("a file's name is no text")
        return manifest
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST}: no manifest: {type(error).__name__}: {error}") from error


def read_expected(path: Path) -> list[Expected]:
    """What a report says of every tensor."""
    try:
        return [Expected.of(fields) for fields in read_json(path)["tensors"]]
    except (LookupError, TypeError, ValueError) as error:
        wanted = "wanted one with digests, which results have from version 2 of the manifest on"
        raise CheckpointError(f"{path.name}: no report: {type(error).__name__}: {error}: {wanted}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a VerificationError where the file is none."""
    if path.stat().st_size > MAX_JSON_NBYTES:
        raise VerificationError(path.name, f"{path.stat().st_size} bytes: wanted at most {MAX_JSON_NBYTES}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise VerificationError(path.name, f"no JSON text: {error}") from error
    if not isinstance(value, dict):
        raise VerificationError(path.name, f"a JSON {type(value).__name__}: wanted an object")
    return value


def path_in(folder: Path, name: str) -> Path:
    """Where a manifest's file lies: inside the folder, and there."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not (folder / name).is_file():
        raise VerificationError(name, "no such file in the folder")
    return folder / name
