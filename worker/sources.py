"""The one door to a job's source: a folder below an allowed root. No other code of ours opens what a user names."""

import errno
from typing import Any

from hqq_core.checkpoint import Checkpoint
from service.common.errors import SourceNotFound
from service.common.roots import SourceRoots

UNREADABLE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG})


def open_source(source: dict[str, Any], roots: SourceRoots) -> Checkpoint:
    """The source, its config and index read; every file of it, now and later, is opened by the roots."""
    folder = roots.resolve(source["path"])
    try:
        if not folder.is_dir():
            raise SourceNotFound(f"{folder.name}: no such folder")
        return Checkpoint.open(folder, opener=roots.open)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise SourceNotFound(f"{folder.name}: cannot be read: {error.strerror}") from error
