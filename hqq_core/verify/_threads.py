"""Checks on a few threads; progress is told, and stopping asked for, in the caller's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
LOOK_S = 0.2


class _Stopped(Exception):
    """Another check failed, or the caller has had enough."""


class Work:
    """Runs checks, each of which gets a function to count what it has done.

    Parameters
    ----------
    threads : int
    progress : callable, optional
        Gets the sum of what was counted so far, several times a second; what it raises stops the checks.
    """

    def __init__(self, threads: int, progress: Callable[[int], None] | None) -> None:
        self._threads, self._progress = threads, progress
        self._counted, self._lock = 0, threading.Lock()

    def run(self, checks: Iterable[Callable[[Callable[[int], None]], T]]) -> list[T]:
        """Their results; the first error ends all of them."""
        stop = threading.Event()

        def count(n: int) -> None:
            with self._lock:
                self._counted += n
            if stop.is_set():
                raise _Stopped

        with ThreadPoolExecutor(self._threads, thread_name_prefix="verify") as pool:
            futures = [pool.submit(check, count) for check in checks]
            try:
                results = []
                for future in futures:
                    while not wait([future], LOOK_S).done:
                        self._tell()
                    results.append(future.result())
                    self._tell()
                return results
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _tell(self) -> None:
        if self._progress:
            self._progress(self._counted)
