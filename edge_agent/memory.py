"""The process's memory as the C library keeps it, and what the system has left for it. On Linux, with glibc."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from pathlib import Path
from typing import Any

_M_ARENA_MAX = -8  # of glibc's malloc.h
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_OWN_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")  # control groups, version 2


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


def peak_bytes() -> int | None:
    """The most that this process has held. None where the system does not say."""
    try:
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    except (OSError, ValueError):
        return None
    return int(line.split()[1]) * 1024


def available_bytes() -> int | None:
    """What this process can still take of memory and swap: what the machine has left, or less where a limit of its unit
    or container leaves less. None where the system does not say.
    """
    try:
        machine = _table(_MEMINFO)
        free, swap = machine["MemAvailable:"] * 1024, machine["SwapFree:"] * 1024
    except (OSError, ValueError, LookupError):
        return None
    return int(min([free + swap, *(_left_by(group, swap) for group in _groups())]))


def _groups() -> list[Path]:
    """The control groups that this process is in, from its own outwards."""
    try:
        names = [line[4:] for line in _OWN_GROUP.read_text().splitlines() if line.startswith("0::/")]
    except OSError:
        return []
    # A container may see its groups' names as they are outside it, and of the groups only its own, as the outermost.
    return [_GROUPS / parent for name in names for parent in (Path(name), *Path(name).parents)]


def _left_by(group: Path, swap: int) -> float:
    """How many bytes a group's limits leave, where the machine has so many of `swap`; infinity where it has none."""
    try:
        used = _table(group / "memory.stat")
        # Above the lower of both a group is not ended, but slowed down until it may as well be.
        most = min(
            float((group / f"memory.{limit}").read_text().replace("max", "inf")) for limit in ("high", "max")
        )
        left = most - _number(group / "memory.current")
        left += used["active_file"] + used["inactive_file"]  # cached files, which make room
    except (OSError, ValueError, LookupError):
        return math.inf
    try:
        swap = min(swap, max(0, _number(group / "memory.swap.max") - _number(group / "memory.swap.current")))
    except (OSError, ValueError):  # swap is not counted, or is not limited
        pass
    return left + swap


def _number(file: Path) -> int:
    return int(file.read_text())


def _table(file: Path) -> dict[str, int]:
    """The numbers of a file of the kernel's with a name and one of them in each line."""
    rows = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    return {row[0]: int(row[1]) for row in rows}


def _of_libc(name: str) -> Any:
    """None where it is not there: musl has neither, and keeps less."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
