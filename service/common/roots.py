"""Which local folders a source may come from, and the only way their files are opened."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from service.common.errors import SourceNotAllowed


class SourceRoots:
    """The allow-listed roots; nothing outside them is opened, or told of."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self._roots = tuple(roots)
        self._real_roots = tuple(Path(os.path.realpath(root)) for root in self._roots)

    def resolve(self, path: str) -> Path:
        """The folder's real path, in which no link is left; whether it exists is for the worker to see.

        Both the path as written and the path it leads to lie below a root: a link outside is never followed, so the
        answer tells nothing about what is outside.
        """
        written = Path(path)
        if "\0" in path or not written.is_absolute() or ".." in written.parts:
            raise SourceNotAllowed('the source must be an absolute path without ".."')
        if not _below(written, self._roots + self._real_roots):
            raise SourceNotAllowed("the source is not in a folder that this service may read")
        real = Path(os.path.realpath(written))
        if not _below(real, self._real_roots):
            raise SourceNotAllowed("the source is not in a folder that this service may read")
        return real

    def open(self, path: Path) -> int:
        """A read-only descriptor of a regular file below a root, checked on the descriptor itself."""
        refusal = SourceNotAllowed(f"{path.name} is not a plain file below an allowed folder")
        real = Path(os.path.realpath(path))
        if not _below(real, self._real_roots):
            raise refusal
        # O_NONBLOCK: opening a pipe must not wait for its writer
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # a folder on the way may have become a link since realpath looked
            opened = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            status = os.fstat(descriptor)
            if not _below(opened, self._real_roots) or not stat.S_ISREG(status.st_mode):
                raise refusal
            # a hard link can bring in what its maker could not read
            if status.st_nlink > 1 and status.st_uid != real.parent.stat().st_uid:
                raise SourceNotAllowed(f"{path.name} is a hard link to another owner's file")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _below(path: Path, roots: Iterable[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)
