"""Counter: source bytes that are done, as a job's progress tells them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

Progress = Callable[[int], None]
JobProgress = Callable[[int, int], None]


class Counter:
    """Counts bytes, or exact parts of them, and reports the whole ones."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._done = progress, Fraction(0)

    def add(self, nbytes: int | Fraction) -> None:
        """So many more are done; what the report raises stops the work."""
        self._done += nbytes
        if self._progress:
            self._progress(int(self._done))


def progress_from(before: int, total: int, progress: JobProgress | None) -> Progress | None:
    """Progress of a part that `before` bytes come before."""
    return (lambda done: progress(before + done, total)) if progress else None
