"""What worker processes of a DataLoader need beyond what torch gives them."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int, worker: int) -> None:
    """A DataLoader's worker_init_fn (with `parent` bound to os.getpid()): end when the parent is killed.

    Left to itself, a worker whose parent is gone may wait forever for somebody to read its results.
    """
    with suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # killed before that
        os._exit(1)
