"""A process that does not outlive the one that started it."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel signal this process when its parent dies; Linux only."""
    # The signal follows the thread that forked: start children from a thread that lives as long as the process.
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, int(number))
