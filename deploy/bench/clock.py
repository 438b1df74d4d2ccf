"""How long a piece of work took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SPINNING_S = 0.15
"""Three times as long as threads of onnxruntime, where nobody tells it otherwise, go on spinning after a call."""


def settle() -> None:
    """Wait until whoever took its turn has let go of the cores that the next one is measured on."""
    time.sleep(SPINNING_S)


@contextmanager
def timed(series_ms: list[float]) -> Iterator[None]:
    """Appends the milliseconds that passed."""
    began = time.perf_counter()
    yield
    series_ms.append((time.perf_counter() - began) * 1e3)
