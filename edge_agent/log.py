"""The daemon's log: one line an event on standard error, as text (logfmt) for people or JSON for machines."""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any


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
        return " ".join(f"{_key(name)}={_quoted(value)}" for name, value in line.items()) + (
            f"\n{trace}" if trace else ""
        )


def configure(as_json: bool) -> None:
    """Sends this package's events at INFO, and other libraries' warnings, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(as_json))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("edge_agent").setLevel(logging.INFO)


def _key(name: str) -> str:
    """Logfmt cannot quote a key, and a budget's holds the name of an app."""
    return re.sub(r"[^\w@.-]", "_", name)


def _quoted(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and text and not set(' "=') & set(text) else json.dumps(text)
