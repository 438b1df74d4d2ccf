"""What a stage of the recipe refuses."""

from __future__ import annotations

import zlib
from zipfile import BadZipFile

DAMAGED_NPZ = (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error)
"""What numpy raises for a file that is empty, as a power loss leaves it, cut off, altered or something else."""


class ExportError(Exception):
    """Input a stage cannot use. The message says what is wrong and what to do; the command line exits with 2."""
