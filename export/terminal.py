"""What a stage shows: bars on a terminal, a line now and then in a pipe or a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)

FIRST_LINE_S, LINE_EVERY_S = 10.0, 60.0
"""When the first line is due, without a terminal, and then the others. What takes less than the first has none."""

console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
"""For what a stage says. Paths may hold brackets, and a line in a log stays one line."""


Report = Callable[[str], None]
"""Gets a line for each thing that a user is to hear of work under way."""


def silent(_line: str) -> None:
    """A `Report` of which nobody hears."""


def say(line: str) -> None:
    """A line on standard output, where it takes one: progress that cannot be shown ends no work."""
    try:
        print(line, flush=True)
    except OSError:  # whoever read it has left, or a disk is full
        # Also for what is still in its buffer when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Note(ProgressColumn):
    def render(self, task: Task) -> str:
        return str(task.fields.get("note", ""))


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar a task, its field `note` behind it, gone when done; lines on stderr where that is no terminal."""
    shown = console.is_terminal
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        _Note(),
        console=console,
        transient=True,
        auto_refresh=shown,  # else `track` counts in a thread that ends where nothing is shown
        speed_estimate_period=30.0 if shown else float("inf"),  # a step may take longer
        disable=not shown,
    ) as bars:
        if shown:
            yield bars
            return
        ended = Event()
        lines = Thread(target=_tell, args=(bars, ended), daemon=True)  # it tells of long steps, too
        lines.start()
        try:
            yield bars
        finally:
            ended.set()
            lines.join()


def _tell(bars: Progress, ended: Event) -> None:
    """Say how far the tasks are until `ended` is set, and of each that has come to its end how long it took."""
    told: set[int] = set()  # tasks whose end was seen
    wait, over = FIRST_LINE_S, False
    while not over:
        over = ended.wait(wait)
        wait = LINE_EVERY_S
        for task in bars.tasks:
            if task.id in told or (over and not task.finished):
                continue
            if task.finished_time is not None:
                told.add(task.id)
                if task.finished_time < FIRST_LINE_S:
                    continue
            with suppress(OSError, ValueError):  # who read it has left, or it is closed: that ends no work
                print(_line(task), file=console.file, flush=True)


def _line(task: Task) -> str:
    """How much of how much is done, and what is left."""
    done = f"{task.description}: {task.completed:,.0f}"
    if task.total is not None:
        done += f" of {task.total:,.0f}"
    if task.finished_time is not None:
        return f"{done} in {lasting(task.finished_time)}"
    left = f", about {lasting(task.time_remaining)} left" if task.time_remaining else ""
    note = f"; {task.fields['note']}" if task.fields.get("note") else ""
    return f"{done} after {lasting(task.elapsed or 0.0)}{left}{note}"


def lasting(seconds: float) -> str:
    """A time in words, to two digits or so."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
