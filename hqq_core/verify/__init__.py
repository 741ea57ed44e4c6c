"""verify_folder(): a result read again, from its files alone, by readers that share no code with what wrote it.

Three questions: are the files those of the manifest; does a reader of the format find what was solved, tensor by tensor, to the
last stored bit; and, with the source, is the error of each tensor the reported one and each copy a copy? A thread looks at one
tensor, a few rows at a time, so that memory does not grow with the model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqq_core.checkpoint import CONFIG, FOLDING, INDEX, REPORT, SINGLE, Checkpoint
from hqq_core.errors import VerificationError
from hqq_core.results import ArtifactFile, Manifest
from hqq_core.verify._check import Count, check_copied, check_quantized
from hqq_core.verify._expected import Expected, path_in, read_expected, read_json, read_manifest
from hqq_core.verify._source import Source
from hqq_core.verify._threads import run
from hqq_core.verify._weights import PIECE_NBYTES, StoredTensor, read_tensors
from hqq_core.verify.readers import Module, Reader, reader_of

WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class Verified:
    """A sound result, in figures.

    Parameters
    ----------
    files, nbytes : int
        Of the manifest.
    tensors_quantized, tensors_copied, weights_quantized : int
    against_source : bool
    error_deviation : float or None
        Largest difference between a tensor's reported relative error and the one found against the source; None without one.
    """

    files: int
    nbytes: int
    tensors_quantized: int
    tensors_copied: int
    weights_quantized: int
    against_source: bool
    error_deviation: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def verify_folder(
    folder: Path,
    source: Checkpoint | None = None,
    *,
    manifest: Manifest | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Read a result again and compare it with what was solved and, where it is given, with its source.

    Parameters
    ----------
    folder : Path
        A result of `quantize_checkpoint`, or of a job.
    source : Checkpoint, optional
        What it was made of.
    manifest : Manifest, optional
        Default: the folder's own.
    threads : int, optional
        Default: one per core.
    progress : callable, optional
        Gets steps done and in total (bytes of files, and quantized weights); called in this thread, and what it raises stops
        the work.

    Returns
    -------
    Verified

    Raises
    ------
    VerificationError
        Names the tensor or file that is not what it should be, with what was got and wanted.
    CheckpointError
        No result, or a source that cannot be read.
    """
    manifest = manifest or read_manifest(folder)
    files = {file.name: path_in(folder, file.name) for file in manifest.files}
    for file in manifest.files:
        if (nbytes := files[file.name].stat().st_size) != file.nbytes:
            raise VerificationError(file.name, f"{nbytes} bytes: wanted {file.nbytes}")
    expected = read_expected(path_in(folder, REPORT))
    stored = _stored_tensors(folder, files)
    reader = reader_of(read_json(path_in(folder, CONFIG)))
    against = Source.of(source, files.get(FOLDING)) if source else None
    if against:
        against.check(expected)
    # tensors first: where a file is not what it was, they say what in it
    checks = [
        *_tensor_checks(expected, stored, reader, against),
        *(_file_check(file, files) for file in manifest.files),
    ]
    total = _work(manifest, expected, against)
    deviations = run(checks, threads or os.cpu_count() or 1, (lambda done: progress(done, total)) if progress else None)
    quantized = [tensor for tensor in expected if tensor.quantized]
    return Verified(
        files=len(manifest.files),
        nbytes=sum(file.nbytes for file in manifest.files),
        tensors_quantized=len(quantized),
        tensors_copied=len(expected) - len(quantized),
        weights_quantized=sum(tensor.numel for tensor in quantized),
        against_source=source is not None,
        error_deviation=max((d for d in deviations if d is not None), default=None),
    )


def _stored_tensors(folder: Path, files: dict[str, Path]) -> dict[str, StoredTensor]:
    """All tensors of the weight files, where readers would look for them."""
    for path in folder.glob(f"*{WEIGHTS}"):
        if path.name not in files:
            raise VerificationError(path.name, "weights that the manifest does not have: readers may load them")
    stored: dict[str, StoredTensor] = {}
    for name in sorted(name for name in files if name.endswith(WEIGHTS)):
        for tensor in read_tensors(files[name]).values():
            if tensor.name in stored:
                raise VerificationError(tensor.name, f"in {name} and in {stored[tensor.name].path.name}")
            stored[tensor.name] = tensor
    found = {name: tensor.path.name for name, tensor in stored.items()}
    wanted = read_json(files[INDEX]).get("weight_map") if INDEX in files else dict.fromkeys(found, SINGLE)
    if found != wanted:
        places = wanted if isinstance(wanted, dict) else {}
        name = min(name for name in found.keys() | places.keys() if found.get(name) != places.get(name))
        raise VerificationError(name, f"in {found.get(name)}: readers look for it in {places.get(name)}")
    return stored


def _tensor_checks(
    expected: list[Expected], stored: dict[str, StoredTensor], reader: Reader, source: Source | None
) -> list[Callable[[Count], float | None]]:
    """One check for each tensor of the source; every stored tensor belongs to one of them."""
    checks: list[Callable[[Count], float | None]] = []
    left = dict(stored)
    for tensor in expected:
        if not tensor.quantized:
            (copied,) = _take(left, [tensor.name])
            checks.append(functools.partial(check_copied, copied, tensor, source))
            continue
        found = _take(left, [f"{tensor.module}.{part}" for part in reader.parts])
        module = Module(tensor.module, dict(zip(reader.parts, found, strict=True)))
        checks.append(functools.partial(_check_module, reader, module, tensor, source))
    if left:
        raise VerificationError(min(left), f"in {left[min(left)].path.name}: no tensor of the source becomes it")
    return checks


def _take(left: dict[str, StoredTensor], names: list[str]) -> list[StoredTensor]:
    for name in names:
        if name not in left:
            raise VerificationError(name, "not in the weight files")
    return [left.pop(name) for name in names]


def _check_module(
    reader: Reader, module: Module, expected: Expected, source: Source | None, count: Count
) -> float | None:
    return check_quantized(reader.read(module), expected, source, count)


def _file_check(file: ArtifactFile, files: dict[str, Path]) -> Callable[[Count], None]:
    return functools.partial(_check_file, file, files[file.name])


def _check_file(file: ArtifactFile, path: Path, count: Count) -> None:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE_NBYTES))
    with path.open("rb", buffering=0) as opened:
        while got := opened.readinto(buffer):
            digest.update(buffer[:got])
            count(got)
    if digest.hexdigest() != file.sha256:
        raise VerificationError(file.name, f"sha256 {digest.hexdigest()}: wanted {file.sha256}")


def _work(manifest: Manifest, expected: list[Expected], source: Source | None) -> int:
    """What all checks count."""
    quantized = sum(tensor.numel for tensor in expected if tensor.quantized)
    copied = [tensor for tensor in expected if not tensor.quantized]
    nbytes = sum(tensor.nbytes * (2 if source and not tensor.folded else 1) for tensor in copied)
    return sum(file.nbytes for file in manifest.files) + quantized + nbytes
