"""verify_part(): what became of one shard, before there is a folder around it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hqq_core.checkpoint import FOLDING, Checkpoint
from hqq_core.results import HeldPart, ShardResult
from hqq_core.safetensors_file import artifact_of
from hqq_core.verify._expected import Expected, path_in
from hqq_core.verify._result import SafetensorsResult, tensor_checks
from hqq_core.verify._source import Source
from hqq_core.verify._threads import Work


def verify_part(
    folder: Path,
    result: ShardResult,
    config: dict[str, Any],
    report: list[dict[str, Any]],
    source: Checkpoint,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> HeldPart:
    """Read the files of a shard again and compare them with what was solved and with the source.

    Parameters
    ----------
    folder : Path
        Where they lie.
    result : ShardResult
        Of safetensors files, which stay as they are.
    config : dict
        What config.json will be.
    report : list of dict
        What the report will have of the shard's tensors.
    source : Checkpoint
    threads : int, optional
        Default: one per core.
    progress : callable, optional
        Called several times a second, in this thread; what it raises stops the work.

    Returns
    -------
    HeldPart
        What `verify_folder` takes for done, as long as the files are those of `result` and the factors of folds the same.

    Raises
    ------
    VerificationError
        Names the tensor or file that is not what it should be, with what was got and wanted.
    """
    assert result.final, "files that will become others"
    expected = [Expected.of(tensor) for tensor in report]
    written = SafetensorsResult.of_files([path_in(folder, file.name) for file in result.files], config)
    factors = folder / FOLDING if any({"columns", "rows"} & set(tensor.folded) for tensor in expected) else None
    against = Source.of(source, factors)
    checks = tensor_checks(expected, written, against)
    deviations = Work(threads or os.cpu_count() or 1, progress).run(checks)
    return HeldPart(
        index=result.index,
        files=result.files if factors is None else (*result.files, artifact_of(factors)),
        tensors=tuple(tensor.name for tensor in expected),
        error_deviation=max((d for d in deviations if d is not None), default=None),
    )
