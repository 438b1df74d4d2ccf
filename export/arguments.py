"""What the stages' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from export.errors import ExportError


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, of ``least`` or more."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number


def check_output(file: Path) -> None:
    """Make the folder that ``file`` of --out will lie in, before the work whose result it is.

    ExportError when that cannot be, or a folder lies in the file's place.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"--out {file}: {file.parent} cannot be made: {error.strerror}") from error
    if file.is_dir():
        raise ExportError(f"--out {file} is a folder; name a file")
