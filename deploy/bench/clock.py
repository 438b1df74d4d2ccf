"""How long a piece of work took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(series_ms: list[float]) -> Iterator[None]:
    """Appends the milliseconds that passed."""
    began = time.perf_counter()
    yield
    series_ms.append((time.perf_counter() - began) * 1e3)
