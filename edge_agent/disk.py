"""Files that last: written at once or not at all, and locked against other processes, on Windows as well."""

from __future__ import annotations

import errno
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")

READ_BYTES = 1 << 20
"""How much of a file is read at a time."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_PATIENCE_S = 1.0  # with other programs, on Windows


def write_durably(path: Path, text: str) -> None:
    """Writes the file at once or not at all, also when the power goes."""
    part = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    try:
        # Not tempfile's, which its owner alone may read: the daemon may be another user's.
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            settle(file.fileno())
        patiently(os.replace, part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def settle(descriptor: int) -> None:
    """Returns once what was written to the file lies on the disk: macOS' `fsync` leaves it in the drive's cache."""
    if sys.platform == "darwin":
        with suppress(OSError):  # of a file system that cannot
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def patiently(work: Callable[..., Found], *arguments: Any, **named: Any) -> Found:
    """What `work` returns. Windows keeps it from what another program reads, replaces or scans for viruses, which takes
    moments: it is tried again there.
    """
    until = time.monotonic() + _PATIENCE_S
    while os.name == "nt" and time.monotonic() < until:
        with suppress(PermissionError):
            return work(*arguments, **named)
        time.sleep(0.01)
    return work(*arguments, **named)


def sync(folder: Path) -> None:
    """Makes what was put into the folder, or renamed in it, last. Windows does so by itself."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        settle(descriptor)
    finally:
        os.close(descriptor)


def lock_file(path: Path, *, wait: bool) -> int:
    """A descriptor of the file, locked; the end of the process, however it comes, unlocks it.

    Raises BlockingIOError when another process has the lock and `wait` is false.
    """
    while True:
        descriptor = patiently(os.open, path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_descriptor(descriptor, wait)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder took the file away: lock the new one


def unlock_file(path: Path, descriptor: int, *, remove: bool) -> None:
    """Gives up the lock of `lock_file`, and takes the file away with it where it is to be removed.

    That is done under the lock: whoever opened the file before sees in `lock_file` that it is gone, and locks the new
    one. Windows removes no file that somebody has open, us included.
    """
    if os.name == "nt":
        os.close(descriptor)
    with suppress(OSError):  # a file that stays harms nobody, and must not hide what went wrong
        if remove:
            path.unlink(missing_ok=True)
    if os.name != "nt":
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    _LOCK_S = 10.0

    def _lock_descriptor(descriptor: int, wait: bool) -> None:
        # Nothing holds a lock that is waited for nearly as long. LK_LOCK would look but once a second.
        until = time.monotonic() + (_LOCK_S if wait else 0.0)
        while time.monotonic() < until:
            with suppress(OSError):
                return msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            time.sleep(0.01)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
else:
    import fcntl

    def _lock_descriptor(descriptor: int, wait: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
