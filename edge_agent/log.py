"""The daemon's log: one line an event on standard error, as text (logfmt) for people or JSON for machines."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import select
import sys
import time
from collections import deque
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, TextIO

MAX_WAITING = 10_000  # lines; some 5 MB
CLOSE_S = 1.0  # what the last lines get to leave at the end
PRIORITIES = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}  # syslog's


class Events(logging.LoggerAdapter):  # type: ignore[type-arg]  # takes an argument from Python 3.11 on only
    """A logger whose keyword arguments are an event's fields: `log.warning("device lost", provider="cuda")`."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Logging's hook: what is none of its own goes to `Lines`."""
        own = {name: kwargs.pop(name) for name in ("exc_info", "stack_info", "stacklevel") if name in kwargs}
        return msg, {**own, "extra": {"fields": {**kwargs}}}


def events(name: str) -> Events:
    """The events of the module of that name, or of the whole package."""
    return Events(logging.getLogger(name), {})


class Lines(logging.Formatter):
    """Writes time, level, event and the record's `fields`; for systemd's journal its priority, as in sd-daemon(3)."""

    def __init__(self, as_json: bool, for_journal: bool = False) -> None:
        super().__init__()
        self._as_json = as_json
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback, where the record has one, follows it (as text) or is a field (as JSON)."""
        if (record.name or "").startswith("grpc."):
            # What it calls errors is of peers, what they sent or that they left, and the event tells it, without what
            # it quotes: a token, perhaps. Faults here are logged where a call ends.
            record = copy.copy(record)
            record.levelname, record.exc_info = "WARNING", None
            record.msg, record.args = str(record.msg).replace("%s", "..."), ()
        text = self._text(record)
        if self._for_journal:
            priority = f"<{PRIORITIES.get(record.levelname, 6)}>"
            return priority + text.replace("\n", f"\n{priority}")
        return text

    def _text(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._as_json:
            return json.dumps(line | ({"traceback": trace} if trace else {}), default=str)
        return " ".join(f"{_key(name)}={_quoted(value)}" for name, value in line.items()) + (
            f"\n{trace}" if trace else ""
        )


class Writer(logging.Handler):
    """Writes lines to a file descriptor as far as it takes them, so that a pipe that nobody reads holds up no request.

    What it does not take waits for the next line. Past `MAX_WAITING` lines are dropped, and later a line says how many.
    Not by a thread: its memory would be a tenth of what an idle daemon holds.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._takes = select.poll()
        self._takes.register(descriptor, select.POLLOUT)
        self._waiting: deque[bytes] = deque()  # pieces that a pipe which takes any takes whole
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Writes what waits and the record's line, or has it wait, too."""
        try:
            line = self.format(record)
        except Exception:  # as logging's own handlers do
            self.handleError(record)
            return
        self._write()
        if len(self._waiting) < MAX_WAITING:
            self._put(line)
            self._write()
        else:
            self._dropped += 1

    def close(self) -> None:
        """Gives the last lines a second to leave."""
        self._write(CLOSE_S)
        self._waiting.clear()  # logging closes what is closed once more
        self._dropped = 0
        super().close()

    def _put(self, line: str) -> None:
        data = f"{line}\n".encode(errors="backslashreplace")
        self._waiting += [data[at : at + select.PIPE_BUF] for at in range(0, len(data), select.PIPE_BUF)]

    def _write(self, patience_s: float = 0.0) -> None:
        until = time.monotonic() + patience_s
        while self._waiting or self._dropped:
            if not self._takes.poll(1e3 * max(0.0, until - time.monotonic())):
                return
            if not self._waiting:
                fields = {
                    "levelname": "WARNING",
                    "msg": "log lines dropped",
                    "fields": {"lines": self._dropped},
                }
                self._put(self.format(logging.makeLogRecord(fields)))
                self._dropped = 0
            piece = self._waiting.popleft()
            with suppress(OSError):  # whoever read it is gone, or the disk is full
                if rest := piece[os.write(self._descriptor, piece) :]:
                    self._waiting.appendleft(rest)


def configure(as_json: bool) -> None:
    """Sends this package's events at INFO, and other libraries' warnings, to standard error."""
    handler: logging.Handler
    if sys.__stderr__ is None:  # it was closed; another file may have its number
        handler = logging.NullHandler()
    elif hasattr(select, "poll"):
        handler = Writer(sys.__stderr__.fileno())
    else:  # on Windows
        handler = logging.StreamHandler()
    handler.setFormatter(Lines(as_json, _is_journal(sys.__stderr__)))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("edge_agent").setLevel(logging.INFO)
    logging.captureWarnings(True)  # of Python's own kind, which would be lines of another form


def _key(name: str) -> str:
    """Logfmt cannot quote a key, and a budget's holds the name of an app."""
    return re.sub(r"[^\w@.-]", "_", name)


def _is_journal(file: TextIO | None) -> bool:
    """Whether systemd's journal reads what is written there; it names the file in the environment."""
    if file is None or "JOURNAL_STREAM" not in os.environ:
        return False
    there = os.fstat(file.fileno())
    return os.environ["JOURNAL_STREAM"] == f"{there.st_dev}:{there.st_ino}"


def _quoted(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and text and not set(' "=') & set(text) else json.dumps(text)
