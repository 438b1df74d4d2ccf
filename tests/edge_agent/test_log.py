"""One line an event, which people and machines can read whatever a field holds."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time
from contextlib import suppress
from itertools import islice

import pytest

from edge_agent import log
from edge_agent.log import Lines

FIELDS = {"reason": "pareto_edge", "error": 'it said "no"\nand = left', "prs": 0.5, "empty": ""}


def record(exc_info: bool = False) -> logging.LogRecord:
    made = logging.LogRecord(
        "edge_agent", logging.INFO, "", 0, "call", (), sys.exc_info() if exc_info else None
    )
    made.fields = FIELDS
    return made


def test_text_is_logfmt_on_one_line() -> None:
    line = Lines(as_json=False).format(record())
    assert "\n" not in line
    assert (
        ' level=info event=call reason=pareto_edge error="it said \\"no\\"\\nand = left" prs=0.5 empty=""'
        in line
    )


def test_a_key_has_no_space_and_no_equals_sign() -> None:
    made = record()
    made.fields = {"day@my app=1_left_micro_usd": 5}  # type: ignore[attr-defined]
    assert Lines(as_json=False).format(made).endswith(" day@my_app_1_left_micro_usd=5")


def test_json_is_one_object_on_one_line() -> None:
    line = Lines(as_json=True).format(record())
    assert "\n" not in line
    assert json.loads(line).items() >= {"level": "info", "event": "call", **FIELDS}.items()


def test_a_traceback_is_kept() -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        assert (
            "ZeroDivisionError" in json.loads(Lines(as_json=True).format(record(exc_info=True)))["traceback"]
        )
        assert "ZeroDivisionError" in Lines(as_json=False).format(record(exc_info=True))


@pytest.mark.posix
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
    with os.fdopen(reading) as pipe:
        while os.read(reading, 4_096).strip() == b"" and select.select([reading], [], [], 0)[0]:
            pass
        writer.handle(logging.makeLogRecord({"msg": "last"}))
        *calls, told, last = [json.loads(line) for line in islice(pipe, 102)]
    assert [call["number"] for call in calls] == list(range(100))
    assert (told["event"], told["level"], told["lines"]) == ("log lines dropped", "warning", 1_900)
    assert last["event"] == "last"


@pytest.mark.posix
def test_the_last_lines_get_a_second_and_no_more_to_leave() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"\n")
    writer = log.Writer(writing)
    writer.handle(logging.makeLogRecord({"msg": "last"}))
    began = time.monotonic()
    writer.close()
    writer.close()
    assert log.CLOSE_S <= time.monotonic() - began < 2 * log.CLOSE_S
    os.close(reading)


@pytest.mark.posix
def test_a_line_longer_than_a_pipe_takes_at_once_arrives_whole() -> None:
    reading, writing = os.pipe()
    writer = log.Writer(writing)
    writer.handle(logging.makeLogRecord({"msg": "x" * 20_000}))
    with os.fdopen(reading) as pipe:
        assert "x" * 20_000 in pipe.readline()
