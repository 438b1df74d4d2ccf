"""What the demo shows while it runs: a table that fills on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from answer import Answer, rounded
from contact_sheet import CLOUD, EDGE
from edge_agent.image import Progress
from edge_agent.policy import Decision

STYLES = {"edge": EDGE, "cloud": CLOUD}
FAILED = "red"

COLUMNS = {"prompt": 12, "PRS": 5, "alpha": 5, "route": 12, "reason": 17, "ms": 6, "cost": 5}
"""And the characters that each needs at least."""

LEFT_OUT = ("alpha", "PRS", "reason", "cost")
"""What a narrow terminal does without, the first one first. A figure is shown whole or not at all."""

WIDEST_PROMPT = 60


class Board:
    """The table of one phase. Enter it, then tell it what happens."""

    def __init__(self, console: Console, title: str, prompts: Sequence[str]) -> None:
        self._console = console
        self._title = title
        self._prompts = prompts
        self._rows: list[tuple[Text, ...]] = []
        self._under_way: tuple[Text, ...] | None = None
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=8)

    def __enter__(self) -> Board:
        """Title first: the table, or the lines that stand for it, follow."""
        self._console.print(f"\n{self._title}", style="bold", soft_wrap=True)
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the table as it is."""
        self._under_way = None
        self._live.stop()

    def asked(self, prompt: str) -> None:
        """The prompt is on its way."""
        self._under_way = _row(prompt, "", "", "…", "", "", "")

    def decided(self, prompt: str, decision: Decision, progress: Progress | None = None) -> None:
        """The decision is known; `progress` is how far the image is."""
        steps = f" {progress.step}/{progress.steps}" if progress else ""
        route = Text(f"{decision.route}{steps}", STYLES[decision.route])
        prs, alpha = rounded(decision.prs), rounded(decision.alpha)
        self._under_way = _row(prompt, prs, alpha, route, decision.reason.value, "", "")

    def answered(self, answer: Answer) -> None:
        """The image is there."""
        self._add(
            answer.prompt,
            answer.prs,
            answer.alpha,
            Text(answer.route, STYLES[answer.received.served_by]),
            answer.decision.reason.value,
            f"{answer.received.timings_ms.get('total', 0.0):.0f}",
            answer.cost,
        )

    def failed(self, prompt: str, message: str) -> None:
        """There is no image."""
        self._add(prompt, "", "", Text("none", FAILED), Text(message, FAILED), "", "")

    def _add(self, *cells: str | Text) -> None:
        row = _row(*cells)
        self._rows.append(row)
        self._under_way = None
        if not self._console.is_terminal:
            prompt, prs, alpha, route, reason, ms, cost = (cell.plain for cell in row)
            number = f"{len(self._rows)}/{len(self._prompts)}"
            scores = f"PRS {prs}, alpha {alpha}" if prs else ""
            took = f"{ms} ms" if ms else ""
            print(
                f"{number:>6}  {route:12}  {reason:17}  {scores:23}  {took:>8}  {cost:5}  {prompt}",
                flush=True,
            )

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
        names = shown_columns(self._console.width)
        room = self._console.width - sum(COLUMNS[name] + 1 for name in names if name != "prompt")
        table.add_column("prompt", width=min(WIDEST_PROMPT, max(1, room)), overflow="ellipsis", no_wrap=True)
        for name in names[1:]:
            right = name in ("PRS", "alpha", "ms", "cost")
            table.add_column(name, justify="right" if right else "left", min_width=COLUMNS[name])
        for row in self._rows:
            table.add_row(*_chosen(row, names))
        if self._under_way:
            table.add_row(*_chosen(self._under_way, names), style="bold")
        return table


def shown_columns(width: int) -> list[str]:
    """The columns that fit into so many characters."""
    names = list(COLUMNS)
    for name in LEFT_OUT:
        if sum(COLUMNS[name] + 1 for name in names) > width:
            names.remove(name)
    return names


def _row(*cells: str | Text) -> tuple[Text, ...]:
    """One of the table: a cell for each of COLUMNS."""
    return tuple(cell if isinstance(cell, Text) else Text(cell) for cell in cells)


def _chosen(row: Sequence[Text], names: Sequence[str]) -> Iterator[Text]:
    return (cell for name, cell in zip(COLUMNS, row, strict=True) if name in names)
