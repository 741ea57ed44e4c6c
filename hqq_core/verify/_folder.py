"""verify_folder(): a finished result, all of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqq_core.checkpoint import CONFIG, FOLDING, REPORT, Checkpoint
from hqq_core.errors import VerificationError
from hqq_core.results import ArtifactFile, HeldPart, Manifest
from hqq_core.verify._check import Count
from hqq_core.verify._expected import Expected, path_in, read_expected, read_json, read_manifest
from hqq_core.verify._gguf import GGUF, GgufResult
from hqq_core.verify._result import Result, SafetensorsResult, tensor_checks
from hqq_core.verify._source import Source
from hqq_core.verify._threads import Work
from hqq_core.verify._weights import PIECE_NBYTES


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
    held: Sequence[HeldPart] = (),
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
    held : sequence of HeldPart
        What `verify_part` gave: where its files are as they were then, their tensors are only looked for.
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
    for file in manifest.files:
        if file.name in (CONFIG, REPORT):  # what all else is held against
            _check_file(file, files[file.name], lambda nbytes: None)
    expected = read_expected(path_in(folder, REPORT))
    result = _result(folder, files)
    against = Source.of(source, files.get(FOLDING)) if source else None
    if against:
        against.check(expected)
    before = {name for part in held for name in part.tensors}
    total = _work(manifest, [tensor for tensor in expected if tensor.name not in before], against)
    work = Work(threads or os.cpu_count() or 1, (lambda done: progress(done, total)) if progress else None)
    sound = _sound(held, files, work)
    hashed = {file for part in sound for file in part.files}
    before = {name for part in sound for name in part.tensors}
    # tensors first: where a file is not what it was, they say what in it
    checks = [
        *tensor_checks(expected, result, against, before),
        *(_file_check(file, files) for file in manifest.files if file not in hashed),
    ]
    deviations = [*(part.error_deviation for part in sound), *work.run(checks)]
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


def _result(folder: Path, files: dict[str, Path]) -> Result:
    """One GGUF file, or safetensors files as config.json has them."""
    if whole := [path for name, path in files.items() if name.endswith(GGUF)]:
        return GgufResult.of(whole[0])
    return SafetensorsResult.of(folder, files, read_json(path_in(folder, CONFIG)))


def _sound(held: Sequence[HeldPart], files: dict[str, Path], work: Work) -> list[HeldPart]:
    """Those whose files have not changed."""
    named = list(dict.fromkeys(file for part in held for file in part.files if file.name in files))
    digests = work.run([functools.partial(_sha256, files[file.name]) for file in named])
    same = {file for file, digest in zip(named, digests, strict=True) if digest == file.sha256}
    return [part for part in held if same.issuperset(part.files)]


def _file_check(file: ArtifactFile, files: dict[str, Path]) -> Callable[[Count], None]:
    return functools.partial(_check_file, file, files[file.name])


def _check_file(file: ArtifactFile, path: Path, count: Count) -> None:
    if (digest := _sha256(path, count)) != file.sha256:
        raise VerificationError(file.name, f"sha256 {digest}: wanted {file.sha256}")


def _sha256(path: Path, count: Count) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE_NBYTES))
    with path.open("rb", buffering=0) as opened:
        while got := opened.readinto(buffer):
            digest.update(buffer[:got])
            count(got)
    return digest.hexdigest()


def _work(manifest: Manifest, expected: list[Expected], source: Source | None) -> int:
    """What all checks count."""
    quantized = sum(tensor.numel for tensor in expected if tensor.quantized)
    copied = [tensor for tensor in expected if not tensor.quantized]
    nbytes = sum(tensor.nbytes * (2 if source and not tensor.folded else 1) for tensor in copied)
    return sum(file.nbytes for file in manifest.files) + quantized + nbytes
