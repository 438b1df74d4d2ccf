"""A folder that a stage writes: it appears whole, in one step, or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import safetensors

from edge_agent.disk import DISK_FULL, lock_file, patiently, unlock_file
from edge_agent.errors import RouteT2IError
from export.errors import ExportError, reason
from export.terminal import Report

_MAKE_ROOM = "make room, or name a folder on another disk"


def refuse_unusable(target: Path, becomes: str) -> None:
    """Raises ExportError where `target` is no path in UTF-8, or the folder one is in; it is to hold `becomes`."""
    try:
        str(target).encode()
    except UnicodeEncodeError as error:  # torch and onnxruntime take no other paths
        raise ExportError(f"{str(target)!r} is not a path in UTF-8; name one that is") from error
    if target == Path.cwd():
        raise ExportError(f"{target} is the folder you are in; name a new folder, which {becomes} becomes")


@contextmanager
def beside(target: Path, report: Report) -> Iterator[Path]:
    """A new folder beside `target`, so that the move at the end is one rename on one disk; gone when done.

    Only one export of `target` has it at a time. Raises ExportError when another has, it cannot be written, or the
    block raises an OSError, whose file is named.
    """
    lock = target.with_name(f".{target.name}.lock")
    with ExitStack() as held:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            held.callback(unlock_file, lock, lock_file(lock, wait=False), remove=True)
            _remove_dead(target, report)
            partial = Path(tempfile.mkdtemp(prefix=_partial(target), dir=target.parent))
            held.callback(shutil.rmtree, partial, ignore_errors=True)
            yield partial
        except BlockingIOError:
            raise ExportError(
                f"another export of {target} is under way; wait for it, or name another folder"
            ) from None
        except OSError as error:
            raise ExportError(_explained(error, target)) from error
        except RouteT2IError as error:
            raise ExportError(error.message) from error
        except safetensors.SafetensorError as error:  # of weights that found no room; it is no OSError
            raise ExportError(f"{partial} cannot be written: {reason(error)}; {_MAKE_ROOM}") from error


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside `target` for what an export of it needs for a while: gone when done, or where files in it are
    still mapped, which Windows does not remove, at the next export.
    """
    beside = {"prefix": _partial(target), "dir": target.parent}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True, **beside) as folder:
        yield Path(folder)


def _partial(target: Path) -> str:
    """How the names of folders begin in which an export of `target` is under way."""
    return f".{target.name}.partial-"


def _remove_dead(target: Path, report: Report) -> None:
    """What exports left that were killed: whoever has the lock knows that none of them lives."""
    # Eight characters, as mkdtemp draws them: "a.partial-x" may be another's name.
    left = re.compile(re.escape(f".{target.name}.") + r"(partial|old)-[a-z0-9_]{8}")
    for folder in sorted(target.parent.iterdir()):
        found = left.fullmatch(folder.name)
        # Killed between its two renames, one left the bundle that was there before under the second name.
        if not found or (found[1] == "old" and not target.exists()):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        report(
            f"{'could not remove' if folder.exists() else 'removed'} {folder}, left by an export that was killed"
        )


def _explained(error: OSError, target: Path) -> str:
    if error.filename is not None and error.errno not in DISK_FULL:
        at = Path(str(error.filename))
        if at not in target.parents and target.parent not in at.parents:
            return f"{at}: {error.strerror}"  # nothing that an export writes
    place = next(path for path in target.parents if path.exists())
    if not place.is_dir():
        return f"{target} cannot be made, for {place} is a file; name another folder"
    where = error.filename or target.parent
    cure = _MAKE_ROOM if error.errno in DISK_FULL else "name another folder"
    return f"{where} cannot be written: {error.strerror or error}; {cure}"


def open_to_all(folder: Path) -> None:
    """A daemon may run as another user, and mkdtemp and onnx's files of weights are for their owner alone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def move(partial: Path, target: Path) -> None:
    """Windows moves nothing to where a folder is, be it empty."""
    if not target.exists():
        patiently(os.replace, partial, target)
    elif not any(target.iterdir()):
        target.rmdir()
        patiently(os.replace, partial, target)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        old.rmdir()
        patiently(os.replace, target, old)
        try:
            patiently(os.replace, partial, target)
        except BaseException:  # Ctrl-C among them
            if not target.exists():
                patiently(os.replace, old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
