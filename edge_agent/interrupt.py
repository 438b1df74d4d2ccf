"""Ctrl-C while nothing is open yet, as while libraries are imported."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def interrupted(*_: object) -> None:
    """Ends the program at once. An exception would be lost where a native library is imported, or come out of it as
    another.
    """
    os._exit(INTERRUPTED)


@contextmanager
def interruptible() -> Iterator[None]:
    """Has Ctrl-C do so in the block, where libraries are imported."""
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
