"""What SIGHUP does to the processes that a test starts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hanging_up(disposition: Any) -> Iterator[None]:
    """What SIGHUP does to processes that are started meanwhile; else it is what whoever runs the tests has it do."""
    before = signal.signal(signal.SIGHUP, disposition)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
