"""What options may be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def at_least(least: int, most: float = math.inf) -> Callable[[str], int]:
    """The type of an option that is a whole number, of ``least`` to ``most``."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {value}")
        return value

    return number
