"""What a stage shows: progress on a terminal, nothing of it in a pipe."""

from __future__ import annotations

import os
import sys

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

console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
"""For what a stage says. Paths may hold brackets, and a line in a log stays one line."""


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


def progress() -> Progress:
    """A bar a task, its field `note` behind it, gone when done. Shows nothing where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        _Note(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
