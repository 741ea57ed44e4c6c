"""Progress in bytes read, and how what it raises gets past code that catches every Exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int], None]


class Stopped(BaseException):
    """Carries what a caller's progress raised."""


def counted(progress: Progress | None) -> Callable[[int], None]:
    """A function that takes the bytes of each piece and tells `progress` their sum; to be called within `stoppable`."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            try:
                progress(done)
            except BaseException as error:
                raise Stopped from error

    return count


@contextmanager
def stoppable() -> Iterator[None]:
    """Where what progress raised comes out as it was."""
    try:
        yield
    except Stopped as stopped:
        raise (stopped.__cause__ or stopped) from None
