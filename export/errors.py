"""What a stage of the recipe refuses."""

from __future__ import annotations


class ExportError(Exception):
    """Input a stage cannot use. The message says what is wrong and what to do; the command line exits with 2."""
