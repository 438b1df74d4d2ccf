"""The file that a command writes: it replaces what is there whole, or not at all, and never what is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_agent.disk import patiently
from export.errors import ExportError


def check_output(file: Path, *inputs: Path, option: str = "--out") -> None:
    """Make the folder that ``file`` of ``option`` will lie in, before the work whose result it is.

    ExportError when that cannot be, when something else than a file lies in its place, or one of ``inputs``.
    """
    try:
        if file.is_dir():
            raise ExportError(f"{option} {file} is a folder; name a file")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(file)  # not tempfile's, which tries for ever where Windows lets nobody write
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ExportError(
            f"{option} {file}: {file.parent} cannot be made or written to: {error.strerror}"
        ) from error
    if file.exists() and not file.is_file():  # a pipe or a device, which the result would replace
        raise ExportError(f"{option} {file} is no regular file; name one")
    if file.exists() and any(other.exists() and file.samefile(other) for other in inputs):
        raise ExportError(f"{option} {file} is what is read; name another file, or it would be lost")


def default_output(name: str, begins: str) -> Path:
    """The file ``name``, from the folder one works in, where no --out names one.

    ExportError when what it holds does not begin with ``begins``, as all that the command writes does: it is
    somebody's own.
    """
    file, beginning = Path(name), begins.encode()
    if file.is_file():
        with file.open("rb") as held:
            found = held.read(len(beginning))
        if found not in (beginning, b""):
            raise ExportError(
                f"{file} is there and this command did not write it, and it would be lost: name this file or another "
                "with --out"
            )
    return file


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Where to write what then takes the place of ``file``, in one step: whoever reads it finds all of it.

    Until then, and after an error, such as that of a full disk, ``file`` is as it was.
    """
    partial = _beside(file)
    try:
        yield partial
        patiently(os.replace, partial, file.resolve())  # a link stays one
    finally:
        partial.unlink(missing_ok=True)


def _beside(file: Path) -> Path:
    target = file.resolve()
    return target.with_name(f".{os.getpid()}-{target.name}")  # its ending tells some writers the format


def write_output(file: Path, text: str) -> None:
    """Write ``text``, `replacing` what the file holds."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")  # everywhere, as `default_output` reads it


def shown(path: Path) -> str:
    """How a document names ``path``: from the folder one works in, where it lies below that."""
    here = Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()
