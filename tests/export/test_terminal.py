"""Where nobody watches bars, lines tell how far a stage is."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
from rich.console import Console

from export import terminal
from export.terminal import lasting, progress


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "FIRST_LINE_S", 0.05)
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.05)


@pytest.mark.usefixtures("_often")
def test_without_a_terminal_lines_say_how_much_is_done_and_what_is_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also while the first step lasts, and of work that goes on where it was."""
    with progress() as bars:
        task = bars.add_task("states", total=1004, completed=1000)
        for _ in range(4):
            time.sleep(0.2)
            bars.update(task, advance=1, note="loss 0.5")
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines[0] == "states: 1,000 of 1,004 after 0 s"
    assert any(
        re.fullmatch(r"states: 1,00[23] of 1,004 after \d+ s, about \d+ s left; loss 0.5", line)
        for line in lines
    )
    assert re.fullmatch(r"states: 1,004 of 1,004 in \d+ s", last)


def test_what_is_soon_done_needs_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bars:
        assert list(bars.track(range(3), description="states")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_often")
def test_work_that_fails_is_not_said_to_have_ended(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress() as bars:
            bars.add_task("states", total=3)
            time.sleep(0.2)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert {*capsys.readouterr().err.splitlines()} == {"states: 0 of 3 after 0 s"}


@pytest.mark.usefixtures("_often")
def test_a_terminal_has_bars_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=shown, force_terminal=True))
    with progress() as bars:
        for _ in bars.track(range(2), description="states"):
            time.sleep(0.1)
    assert "2/2" in shown.getvalue() and " of " not in shown.getvalue()


@pytest.mark.usefixtures("_often")
def test_lines_that_nobody_reads_end_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Left())
    with progress() as bars:
        assert len([time.sleep(0.1) for _ in bars.track(range(3))]) == 3


def test_times_are_said_in_words() -> None:
    assert [lasting(seconds) for seconds in (0.4, 99, 780, 17_280)] == ["0 s", "99 s", "13 min", "4.8 h"]
