"""What a stage of the recipe refuses."""

from __future__ import annotations

import zlib
from zipfile import BadZipFile

DAMAGED_NPZ = (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error)
"""What numpy raises for a file that is empty, as a power loss leaves it, cut off, altered or something else."""


LONGEST_REASON = 500
"""Characters of what a library says that are shown: torch puts whole graphs behind its first line."""


class ExportError(Exception):
    """Input a stage cannot use. The message says what is wrong and what to do; the command line exits with 2."""


def reason(error: Exception) -> str:
    """What an error of a library's says: its first line, or the file that cannot be read.

    Its class, which is Python's word and no user's, comes before what says nothing without it: a word, or nothing.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read: {error.strerror}"
    kind = type(error).__name__
    said = next((line.strip()[:LONGEST_REASON] for line in str(error).splitlines() if line.strip()), "")
    if " " in said:
        return said
    return f"{kind}: {said}" if said else kind
