"""What a stage of the recipe refuses."""

from __future__ import annotations

import re
import zlib
from zipfile import BadZipFile

DAMAGED_NPZ = (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error)
"""What numpy raises for a file that is empty, as a power loss leaves it, cut off, altered or something else."""


LONGEST_REASON = 500
"""Characters of what a library says that are shown: torch puts whole graphs behind its first line."""


class ExportError(Exception):
    """Input a stage cannot use. The message says what is wrong and what to do; the command line exits with 2."""


def reason(error: Exception) -> str:
    """What an error of a library's says: its first line, with the next where that ends in a colon, or the file that
    cannot be read.

    Its class, which is Python's word and no user's, comes before what says nothing without it: a word, or nothing.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read: {error.strerror}"
    kind = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:LONGEST_REASON]
    if " " in said:
        return said
    return f"{kind}: {said}" if said else kind


_OTHER_SIZE = re.compile(r"(?:because|size mismatch for) (\S+?):? (?:expected shape|copying a param)")


def misfit(error: Exception) -> str:
    """What keeps weights out of a model, which torch and diffusers say at length; else `reason`."""
    if isinstance(error, NotImplementedError):  # of torch, which cannot copy what is not there
        return "weights are missing"
    found = _OTHER_SIZE.search(str(error))
    return f"{found[1]} has another size" if found else reason(error)
