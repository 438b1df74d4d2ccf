"""The server's log: one line an event on standard error, as text (logfmt) for people or JSON for machines."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from contextlib import suppress
from typing import Any

MAX_WAITING = 10_000  # lines; some 5 MB
CLOSE_S = 1.0  # what the last lines get to leave at the end


class Lines(logging.Formatter):
    """Writes time, level, event and the record's `fields`."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback, where the record has one, follows it (as text) or is a field (as JSON)."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._as_json:
            return json.dumps(line | ({"traceback": trace} if trace else {}), default=str)
        return " ".join(f"{name}={_quoted(value)}" for name, value in line.items()) + (
            f"\n{trace}" if trace else ""
        )


class Writer(logging.Handler):
    """Writes lines to a file descriptor in a thread of its own, so that a pipe that nobody reads holds up no request.

    Lines that find `MAX_WAITING` before them are dropped; once all others are written, a line says how many were.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._dropped = 0  # since the start
        self._patience_s = CLOSE_S
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Formats the record here, as what it holds may change, and leaves the rest to the thread."""
        if self._lines.qsize() >= MAX_WAITING:
            self._dropped += 1
            return
        try:
            self._lines.put(self.format(record))
        except Exception:  # as logging's own handlers do
            self.handleError(record)

    def close(self) -> None:
        """Waits for the last lines to leave, for a second at most."""
        self._lines.put(None)
        self._thread.join(self._patience_s)
        self._patience_s = 0.0  # logging closes what is closed once more
        super().close()

    def _write_all(self) -> None:
        told, line = 0, self._lines.get()
        while line is not None:
            self._write(line)
            if self._lines.empty():
                told = self._tell_dropped(told)
            line = self._lines.get()
        self._tell_dropped(told)

    def _tell_dropped(self, told: int) -> int:
        dropped = self._dropped
        if dropped > told:
            fields = {"levelname": "WARNING", "msg": "log lines dropped", "fields": {"lines": dropped - told}}
            self._write(self.format(logging.makeLogRecord(fields)))
        return dropped

    def _write(self, line: str) -> None:
        # Not to sys.stderr, whose lock the interpreter wants when it ends.
        data = f"{line}\n".encode(errors="backslashreplace")
        with suppress(OSError):  # whoever read it is gone, or the disk is full
            while data:
                data = data[os.write(self._descriptor, data) :]


def configure(as_json: bool) -> None:
    """Sends this package's events at INFO, and other libraries' warnings, to standard error."""
    # Another file may have the number of a standard error that was closed.
    handler = Writer(sys.__stderr__.fileno()) if sys.__stderr__ is not None else logging.NullHandler()
    handler.setFormatter(Lines(as_json))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("cloud_server").setLevel(logging.INFO)


def _quoted(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and text and not set(' "=') & set(text) else json.dumps(text)
