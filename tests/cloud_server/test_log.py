"""The log holds nobody up."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from itertools import islice

import pytest

from cloud_server import log
from cloud_server.log import Lines


def test_a_pipe_that_nobody_reads_holds_nobody_up_and_whoever_reads_it_later_is_told_what_was_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "MAX_WAITING", 100)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"\n")
    os.set_blocking(writing, True)
    writer = log.Writer(writing)
    writer.setFormatter(Lines(as_json=True))
    for number in range(2_000):
        writer.handle(logging.makeLogRecord({"msg": "call", "fields": {"number": number}}))
    began = time.monotonic()
    writer.close()
    writer.close()
    assert time.monotonic() - began < 2 * log.CLOSE_S
    with os.fdopen(reading) as pipe:
        lines = [json.loads(line) for line in islice(filter(str.strip, pipe), 102)]
    *calls, last = lines
    assert [call["number"] for call in calls[:100]] == list(range(100))
    # One more waits for the pipe itself.
    assert (last["event"], last["level"], last["lines"]) == ("log lines dropped", "warning", 1_899)
