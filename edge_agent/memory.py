"""The process's memory as the C library keeps it. On Linux with glibc; elsewhere nothing needs to be done."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

_M_ARENA_MAX = -8  # of glibc's malloc.h


def share_one_heap() -> None:
    """Have all threads allocate from one heap; to be called before there are others.

    glibc gives each thread a heap of its own, and what a run leaves scattered over a dozen of them stays: the daemon's
    idle memory then grows by 10 MB over its first images. onnxruntime keeps its own store for the large blocks, so
    that threads do not meet at this one. Whoever sets MALLOC_ARENA_MAX knows better.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return free memory to the system, where the C library would keep it."""
    gc.collect()
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_libc(name: str) -> Any:
    """None where it is not there: musl has neither, and keeps less."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
