import contextlib
import resource

import pytest


@pytest.fixture
def full_disk():
    """A limit on the size of files: the kernel refuses the bytes as it would on a full disk."""

    @contextlib.contextmanager
    def limited(nbytes: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
