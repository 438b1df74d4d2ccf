"""What a stage shows: progress on a terminal, nothing of it in a pipe."""

from __future__ import annotations

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
