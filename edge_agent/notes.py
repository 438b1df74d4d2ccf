"""Notes on disk of what is soon there again: written now and then, at once or not at all, and never waited for."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_agent.log import events

log = events(__name__)

SAVED_EVERY = 20
"""Changes. What a crash loses is soon there again."""


class Notes:
    """A JSON file, and how much of what was to be noted it has. Without a `file` nothing is noted."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        # Each counted by one thread at a time: changes, and how many of them the file has.
        self._changes = self._saved = 0
        self._writing = threading.Lock()

    def read(self) -> Any:
        """What was saved last; None where it cannot be read, which costs no more than some time."""
        try:
            return json.loads(self._file.read_text()) if self._file is not None else None
        except (OSError, ValueError, RecursionError):
            return None

    def changed(self) -> bool:
        """There is something more to note. Returns whether it is time to `save`."""
        self._changes += 1
        return self._file is not None and (self._changes - self._saved) % SAVED_EVERY == 0

    def save(self, document: Callable[[], Any]) -> None:
        """Write `document()` where anything changed since; waits for the disk, in any thread. A disk that takes nothing
        is told of in the log alone: only time is lost.
        """
        with self._writing:
            changes = self._changes
            if self._file is None or changes == self._saved:
                return
            part = self._file.with_name(self._file.name + ".part")
            try:
                part.write_text(json.dumps(document()) + "\n")
                os.replace(part, self._file)
                self._saved = changes
            except OSError as error:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
                failure = f"{self._file} cannot be written: {error.strerror or error}"
                log.warning("recent", error=failure)
