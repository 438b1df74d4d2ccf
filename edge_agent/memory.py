"""The process's memory as the C library keeps it, and what the machine has left. On Linux, with glibc."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

_M_ARENA_MAX = -8  # of glibc's malloc.h
_MEMINFO = Path("/proc/meminfo")


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


def available_bytes() -> int | None:
    """What processes can still take of the machine's memory and swap; None where the system does not say.

    The limit of a container is not in it.
    """
    try:
        lines = [line.split() for line in _MEMINFO.read_text(encoding="ascii").splitlines()]
        kib = {line[0]: int(line[1]) for line in lines}
        return (kib["MemAvailable:"] + kib["SwapFree:"]) * 1024
    except (OSError, ValueError, LookupError):
        return None


def _of_libc(name: str) -> Any:
    """None where it is not there: musl has neither, and keeps less."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
