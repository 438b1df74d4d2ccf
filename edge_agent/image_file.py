"""The file that an image is written to: checked before anything is paid for, then written at once or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from edge_agent.client import Received
from edge_agent.disk import patiently
from edge_agent.errors import InvalidRequest

STANDARD_OUTPUT = Path("-")
"""This very object: an equal path, as of ./-, is a file."""


def checked(output: str | None) -> Path | None:
    """Where the image that is to go to `output` goes; None where its name depends on it. Raises InvalidRequest."""
    if output == "-":
        if sys.stdout is None:
            raise InvalidRequest("standard output is closed; name a file with -o")
        return STANDARD_OUTPUT
    file = None if output is None else _regular(output)
    folder = (Path() if file is None else file.parent).absolute()  # which fails where it is relative to none
    if not _takes_files(folder):
        raise InvalidRequest(f"nothing can be written into the folder {folder}; choose another with -o")
    room = shutil.disk_usage(folder)
    if room.total and not room.free:  # some file systems state neither
        raise InvalidRequest(f"the disk of {folder} is full; make room, or choose another with -o")
    return file


def write(received: Received, target: Path | None) -> str:
    """Writes the image at once or not at all; returns the file's name."""
    if target is STANDARD_OUTPUT:
        sys.stdout.buffer.write(received.png)
        sys.stdout.buffer.flush()
        return "-"
    target = target or Path(f"{received.request_id}.png")
    part = None
    try:
        # A name of its own: the target's may be as long as the file system takes.
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".edge-agent-", delete=False) as part:
            part.write(received.png)
        os.chmod(part.name, _mode(target))  # noqa: PTH101
        patiently(os.replace, part.name, target)
    except BaseException as error:
        if part is not None:
            Path(part.name).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise _cannot_be_written(target, error) from error
    return str(target)


def _regular(output: str) -> Path:
    """The regular file that `output` names, be it one that is still to be made. Raises InvalidRequest."""
    file = Path(output)
    # With a colon, which a request id may have, it would be a stream in another file.
    if os.name == "nt" and (":" in file.name or len(file.name) > 255):
        raise InvalidRequest(f"{file.name} is no name of a file on Windows; choose another with -o")
    try:
        found = file.stat()
        if _is_output(found):  # /dev/stdout, or the file it was sent to
            raise InvalidRequest(f"{output} is standard output; write to it with -o -")
        mode = found.st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as error:  # a name too long, a folder that one may not enter, a loop of links
        raise _cannot_be_written(file, error) from error
    if stat.S_ISDIR(mode) or output.endswith(("/", os.sep)):
        raise InvalidRequest(f"{file} is a folder; name a file in it with -o")
    if not stat.S_ISREG(mode):  # a pipe or a device, which the image would replace
        raise InvalidRequest(f"{file} is no regular file; name one with -o, or write to a pipe with -o -")
    # What a link leads to is written, and the link stays.
    return Path(os.path.realpath(file)) if file.is_symlink() else file


def _takes_files(folder: Path) -> bool:
    """Whether a file can be put into the folder. On Windows os.access knows of no permissions, so one is."""
    if os.name == "posix":
        return folder.is_dir() and os.access(folder, os.W_OK)
    probe = folder / f".edge-agent-{secrets.token_hex(8)}"  # tempfile would try for ever where it may not
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def _is_output(found: os.stat_result) -> bool:
    """Whether this is the file that standard output goes to, which the image would replace."""
    with suppress(OSError, AttributeError):  # closed, or none of the system's
        return stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.fstat(sys.stdout.fileno()))
    return False


def _mode(target: Path) -> int:
    """Who may read and write it: as before, or as open() would have it."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _cannot_be_written(target: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest(f"{target} cannot be written: {error.strerror}; choose another with -o")
