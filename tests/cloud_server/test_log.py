"""The log holds nobody up."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

import cloud_server.log
import edge_agent.log


@pytest.mark.posix
@pytest.mark.parametrize("log", [cloud_server.log, edge_agent.log])
def test_a_pipe_that_nobody_reads_holds_nobody_up_and_whoever_reads_it_later_is_told_what_was_dropped(
    monkeypatch: pytest.MonkeyPatch, log: ModuleType
) -> None:
    monkeypatch.setattr(log, "MAX_WAITING", 100)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"\n")
    os.set_blocking(writing, True)
    writer = log.Writer(writing)
    writer.setFormatter(log.Lines(as_json=True))
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
@pytest.mark.parametrize("log", [cloud_server.log, edge_agent.log])
def test_the_last_lines_get_a_second_and_no_more_to_leave(log: ModuleType) -> None:
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
@pytest.mark.parametrize("log", [cloud_server.log, edge_agent.log])
def test_a_line_longer_than_a_pipe_takes_at_once_arrives_whole(log: ModuleType) -> None:
    reading, writing = os.pipe()
    writer = log.Writer(writing)
    writer.handle(logging.makeLogRecord({"msg": "x" * 20_000}))
    with os.fdopen(reading) as pipe:
        assert "x" * 20_000 in pipe.readline()


@pytest.mark.posix
@pytest.mark.parametrize("package", ["cloud_server", "edge_agent"])
@pytest.mark.parametrize("its", [True, False])
def test_systemds_journal_is_told_the_priority_of_each_line_and_nobody_else_is(
    tmp_path: Path, package: str, its: bool
) -> None:
    code = (
        f"import logging; from {package}.log import configure; configure(False)\n"
        f"log = logging.getLogger('{package}'); log.info('call'); log.warning('advice')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: log.exception('a bug')"
    )
    said = tmp_path / "said"
    with said.open("wb") as file:
        there = os.fstat(file.fileno())
        stream = f"{there.st_dev}:{there.st_ino + (not its)}"  # that of another, as a shell in a unit may inherit it
        environment = os.environ | {"JOURNAL_STREAM": stream}
        subprocess.run([sys.executable, "-c", code], stderr=file, env=environment, check=True)
    begins = [line[:3] for line in said.read_text().splitlines()]
    assert begins[:3] == (["<6>", "<4>", "<3>"] if its else ["tim"] * 3)
    assert len(begins) > 4 and all((begin == "<3>") is its for begin in begins[3:])  # the traceback


@pytest.mark.parametrize("package", ["cloud_server", "edge_agent"])
def test_what_pythons_own_warnings_say_is_a_line_like_any_other(package: str) -> None:
    """As diffusers says that something will go."""
    code = (
        f"import warnings; from {package}.log import configure; configure(True); "
        "warnings.warn('it will go', FutureWarning)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    (line,) = map(json.loads, said.splitlines())
    assert line["level"] == "warning" and "it will go" in json.dumps(line)


@pytest.mark.parametrize("log", [cloud_server.log, edge_agent.log])
@pytest.mark.parametrize(("name", "level"), [("grpc._cython.cygrpc", "warning"), ("edge_agent", "error")])
def test_what_grpc_calls_an_error_of_a_peer_that_left_is_a_warning(
    log: ModuleType, name: str, level: str
) -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        said = "Invalid encoding on %s"
        record = logging.LogRecord(name, logging.ERROR, "", 0, said, ("a token",), sys.exc_info())
    line = json.loads(log.Lines(as_json=True).format(record))
    assert (line["level"], "traceback" in line) == (level, level == "error")
    assert ("token" in line["event"]) == (level == "error")
    assert (
        log.Lines(as_json=False, for_journal=True).format(record)[:3]
        == {"warning": "<4>", "error": "<3>"}[level]
    )
