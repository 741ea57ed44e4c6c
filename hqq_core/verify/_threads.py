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


def run(
    checks: Iterable[Callable[[Callable[[int], None]], T]], threads: int, progress: Callable[[int], None] | None
) -> list[T]:
    """Results of checks, each of which gets a function to count what it has done; the first error ends all of them.

    Parameters
    ----------
    checks : iterable of callable
    threads : int
    progress : callable, optional
        Gets the sum of what was counted, several times a second; what it raises stops the checks.
    """
    counted, lock, stop = [0], threading.Lock(), threading.Event()

    def count(n: int) -> None:
        with lock:
            counted[0] += n
        if stop.is_set():
            raise _Stopped

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        futures = [pool.submit(check, count) for check in checks]
        try:
            results = []
            for future in futures:
                while not wait([future], LOOK_S).done:
                    if progress:
                        progress(counted[0])
                results.append(future.result())
                if progress:
                    progress(counted[0])
            return results
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
