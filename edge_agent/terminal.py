"""What all commands share: how one is added, how it finds the daemon, and how it prints."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from edge_agent import settings
from edge_agent.client import AgentClient
from edge_agent.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_COLUMNS = 10_000

LONGEST_TIMEOUT_S = 365 * 86_400.0
"""gRPC takes longer ones, from some 10^9 s on, for a deadline that has passed."""


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    does: str,
    epilog: str,
    *,
    client: bool = True,
) -> argparse.ArgumentParser:
    """Adds a command; one that is a `client` takes --agent and --json."""
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=does,
        description=f"{does[0].upper()}{does[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run)
    if client:
        added.add_argument(
            "--agent",
            metavar="ADDRESS",
            help="the daemon: unix:PATH or HOST:PORT (default: EDGE_AGENT_ADDRESS, or the default socket)",
        )
        added.add_argument("--json", action="store_true", help="print JSON, one object a line")
    return added


def add_app(command: argparse.ArgumentParser) -> None:
    """Adds --app, for commands that ask in an app's name."""
    command.add_argument(
        "--app", default="default", metavar="NAME", help="in whose name to ask (default: default)"
    )


def add_timeout(command: argparse.ArgumentParser) -> None:
    """Adds --timeout, which `client` heeds."""
    command.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up after so long (default: never)"
    )


def add_image_options(command: argparse.ArgumentParser) -> None:
    """Adds what models differ in: --steps, --guidance-scale, --width and --height; None where it is not said."""
    command.add_argument(
        "--steps", type=whole_number(2**32 - 1), metavar="N", help="denoising steps; default: the model's"
    )
    command.add_argument("--guidance-scale", type=float, metavar="X", help="default: the model's")
    for side in ("width", "height"):
        command.add_argument(
            f"--{side}",
            type=whole_number(2**32 - 1),
            metavar="PIXELS",
            help="one that the model makes (`edge-agent models show edge`); default: its first",
        )


MAX_DIGITS = 1000  # of a number; Python reads none of thousands


def whole_number(maximum: int) -> Callable[[str], int]:
    """What an option takes: a number from 0 to `maximum`."""

    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > MAX_DIGITS or int(text) > maximum:
            raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {maximum}, not {text[:40]!r}")
        return int(text)

    return number


def client(options: argparse.Namespace) -> AgentClient:
    """The daemon that the options, else the environment, name. Raises InvalidRequest or StartRefused."""
    address = options.agent or os.environ.get(settings.ADDRESS_VARIABLE) or ""
    if address.startswith("unix:"):
        try:
            address = settings.socket_address(address.removeprefix("unix:"))
        except ValueError as error:
            raise InvalidRequest(f"{address} is no address: {error}") from error
    timeout_s = getattr(options, "timeout", None)
    if timeout_s is not None and not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        raise InvalidRequest(
            "--timeout must be a number of seconds above 0 and at most a year; leave it out to wait as long as it takes"
        )
    return AgentClient(address or settings.default_address(), timeout_s)


def print_facts(facts: dict[str, Any]) -> None:
    """One object for people, a fact a line."""
    width = max(map(len, facts))
    for name, value in facts.items():
        texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
        lines = value if texts else [value]
        for line in lines:
            shown = round(line, 3) if isinstance(line, float) else line
            print(f"{name.replace('_', ' '):{width}}  {'' if shown is None else shown}")


def print_json(facts: dict[str, Any]) -> None:
    """One object on one line, in ASCII where standard output takes less than Unicode."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    print(json.dumps(facts, ensure_ascii=codecs.lookup(encoding).name != "utf-8"), flush=True)


def on_terminal(stream: TextIO | None) -> bool:
    """Whether somebody watches it: Python has None in place of a stream that was closed before it began (`2>&-`)."""
    return stream is not None and stream.isatty()


def remark(message: str) -> None:
    """A line on standard error, where it takes one; `print` would take a closed one's None for standard output."""
    if sys.stderr is not None:
        with suppress(OSError):  # the exit code says it, too
            print(f"edge-agent: {message}", file=sys.stderr)


@contextmanager
def spinner(what: str) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal what is done and since when, and nothing in a pipe; the function says what is done now."""
    if not on_terminal(sys.stderr):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda now: shown.update(task, description=now)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as the terminal allows. Where a row cannot be had, those before it are printed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # In a pipe, where programs look for names, no name is folded, whatever COLUMNS says.
    wide = shutil.get_terminal_size((PIPE_COLUMNS, 0)).columns if on_terminal(sys.stdout) else 0
    console = Console(width=wide or PIPE_COLUMNS)
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")  # nothing is cut off
    try:
        for row in rows:
            table.add_row(*map(Text, row))  # Text: a prompt's [brackets] are no markup
    except BaseException:
        if table.row_count:
            _print(console, table)
        raise
    _print(console, table)


def _print(console: Console, table: Table) -> None:
    with console.capture() as text:
        console.print(table)
    print(text.get(), end="")  # rich itself ends the program where a pipe has been closed
