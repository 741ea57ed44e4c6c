"""The verifying phase: a result read again, and held against its source, before its manifest is written."""

from collections.abc import Callable
from pathlib import Path

import structlog

from hqq_core.checkpoint import Checkpoint
from hqq_core.results import Manifest
from hqq_core.verify import verify_folder

logger = structlog.get_logger(__name__)


def verification(
    checkpoint: Checkpoint, nbytes: int, *, threads: int | None, progress: Callable[[int], None]
) -> Callable[[Path, Manifest], None]:
    """The check that `finish_checkpoint` takes; all of it counts for `nbytes`."""

    def check(folder: Path, manifest: Manifest) -> None:
        def report(done: int, total: int) -> None:
            progress(nbytes * done // total)

        found = verify_folder(folder, checkpoint, manifest=manifest, threads=threads, progress=report)
        logger.info("What was written is what was solved.", action="result_verified", **found.to_dict())

    return check
