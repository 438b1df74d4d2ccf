"""The pipeline, live: an edge agent and a cloud server on loopback, and the same prompts three times.

  1. The policy decides for each prompt; the budget has room for what it wants from the cloud.
  2. The same prompts again, until the quota runs out.
  3. The same prompts with the cloud server stopped.

Every prompt is answered every time. Writes the images, a contact sheet, a JSON-lines record and both servers' logs.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

import contact_sheet
from answer import Answer
from board import Board
from cloud_server.settings import STARTER as CLOUD_MODEL
from edge_agent.budget import BudgetState
from edge_agent.client import AgentClient, CallFailed, Received
from edge_agent.errors import RouteT2IError
from edge_agent.image import Progress
from edge_agent.money import dollars
from edge_agent.policy import Decision
from edge_agent.settings import STARTER as BUNDLE
from processes import DidNotStart, Server, own_environment

PRICE_MICRO_USD = 10_000
"""Of a cloud image: one cent."""

SEED = 7
"""Of the first prompt's image; the next has the next. The same in every phase, so that pictures can be compared."""

GALLERY, KIOSK = "gallery", "kiosk"
"""The calling apps. The third phase calls as the kiosk, whose own budget is untouched: only the cloud is missing."""

BROKEN, BAD_INPUT, INTERRUPTED = 1, 2, 130

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK if sys.platform == "win32" else signal.SIGHUP)
"""The last is what a terminal that closes makes of it."""

PICTURE = re.compile(r"[123]-\d{2,}-(edge|cloud)\.png")
"""The names of what a demo draws."""

HERE = Path(__file__).parent


class Refused(Exception):
    """The demo cannot run on this input; the message says what to do."""


@dataclass(frozen=True)
class Phase:
    """One pass over the prompts."""

    number: int
    title: str
    explanation: str
    app: str


@dataclass
class Demo:
    """What the phases share, and what they have gathered."""

    console: Console
    agent: AgentClient
    prompts: Sequence[str]
    out: Path
    answers: list[Answer] = field(default_factory=list)
    unanswered: int = 0

    def run(self, phase: Phase) -> None:
        """Sends every prompt, one after the other."""
        with Board(
            self.console, f"{phase.number}. {phase.title}: {phase.explanation}", self.prompts
        ) as board:
            for number, prompt in enumerate(self.prompts, 1):
                board.asked(prompt)
                try:
                    answer = self._ask(phase, number, prompt, board)
                except CallFailed as error:
                    self.unanswered += 1
                    board.failed(prompt, error.message)
                    continue
                self.answers.append(answer)
                with (self.out / "record.jsonl").open("a", encoding="utf-8") as record:
                    record.write(answer.to_json() + "\n")
                board.answered(answer)

    def sheet(self, phases: Sequence[Phase]) -> Path:
        """Draws the contact sheet."""
        found = {(answer.phase, answer.number): answer for answer in self.answers}
        numbers = range(1, len(self.prompts) + 1)
        sections = [
            contact_sheet.Section(
                f"{phase.number}  {phase.title}",
                phase.explanation,
                [self._tile(found.get((phase.number, number))) for number in numbers],
            )
            for phase in phases
        ]
        file = self.out / "contact-sheet.png"
        heading = f"{len(self.prompts)} prompts, routed between edge and cloud"
        contact_sheet.draw(heading, self.prompts, sections).save(file, optimize=True)
        return file

    def _ask(self, phase: Phase, number: int, prompt: str, board: Board) -> Answer:
        decision: Decision | None = None
        for event in self.agent.generate(prompt=prompt, app=phase.app, seed=SEED + number - 1):
            if isinstance(event, Decision):
                decision = event
                board.decided(prompt, decision)
            elif isinstance(event, Progress) and decision:
                board.decided(prompt, decision, event)
            elif isinstance(event, Received) and decision:
                file = f"images/{phase.number}-{number:02d}-{event.served_by}.png"
                (self.out / file).write_bytes(event.png)
                return Answer(phase.number, number, prompt, phase.app, decision, event, file)
        raise CallFailed("the daemon sent no image", BROKEN)

    def _tile(self, answer: Answer | None) -> contact_sheet.Tile | None:
        if answer is None:
            return None
        figures = [f"PRS {answer.prs}" if answer.prs else "", answer.cost or "$0"]
        note = answer.decision.reason.value
        if answer.received.fallback_error:
            note = "cloud failed"
        return contact_sheet.Tile(
            self.out / answer.file, answer.received.served_by, note, "  ".join(filter(None, figures))
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of characters that its encoding lacks
    options = parser().parse_args(arguments)
    console = Console(highlight=False, markup=False)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)  # so that the servers are stopped then, too
    try:
        return run(options, console)
    except Refused as error:
        print(f"demo: {error}", file=sys.stderr)
        return BAD_INPUT
    except (DidNotStart, RouteT2IError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return BROKEN
    except KeyboardInterrupt:
        print("demo: stopped; both servers are down", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--prompts", type=Path, metavar="FILE", default=HERE / "prompts.txt", help="one a line")
    top.add_argument(
        "--bundle", type=Path, metavar="DIR", default=BUNDLE, help="edge model (default: the starter)"
    )
    top.add_argument(
        "--model", metavar="DIR", default=str(CLOUD_MODEL), help="cloud model (default: the starter)"
    )
    top.add_argument(
        "--routing-rate", metavar="RHO", default="0.5", help="wanted share in the cloud (default: 0.5)"
    )
    top.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("demo-out"),
        help="folder to write (default: demo-out)",
    )
    return top


def run(options: argparse.Namespace, console: Console) -> int:
    """Start, three phases, stop, and the account of it."""
    began = time.monotonic()
    prompts = read_prompts(options.prompts)
    out: Path = options.out
    make_room(out)
    servers: list[Server] = []
    with tempfile.TemporaryDirectory(prefix="demo-") as folder, ExitStack() as stack:
        stack.callback(stop, console, servers)
        state = Path(folder)
        with waiting(console, f"predicting with {options.bundle}"):
            wanted = cloud_worthy(options, prompts)
        with waiting(console, f"starting cloud-server with {options.model}"):
            cloud = start_cloud(options, state)
            servers.append(cloud)
            cloud_address = cloud.address()
        spare = wanted // 2
        with waiting(console, f"starting edge-agent with {options.bundle}"):
            edge = start_edge(options, state, cloud_address, wanted + spare, wanted)
            servers.append(edge)
            edge.wait_until_serving()
        with waiting(console, "waiting for the cloud model"):
            cloud.wait_until_serving()
        demo = Demo(console, AgentClient(edge.address()), prompts, out)
        phases = plan(wanted, spare)
        for phase in phases:
            if phase.number == 3:
                with waiting(console, "stopping cloud-server"):
                    cloud.stop()
            demo.run(phase)
        if not edge.running:
            raise DidNotStart(f"edge-agent ended. The end of {edge.log_file}:\n{edge.tail()}")
        notes = demo.agent.status()["advice"]
        if not wanted:
            notes = [
                f"no prompt went to the cloud at a routing rate of {options.routing_rate}: take harder prompts "
                "(--prompts), or a higher rate (--routing-rate)"
            ]
        budgets, _ = demo.agent.quota()
    sheet = demo.sheet(phases)
    account(console, demo, budgets, notes, sheet, time.monotonic() - began)
    return BROKEN if demo.unanswered else 0


def plan(wanted: int, spare: int) -> tuple[Phase, ...]:
    """The three phases, where `wanted` prompts are worth the cloud and the budget holds `spare` images more."""
    return (
        Phase(
            1, "Routed by the policy", f"the budget has room for {_images(wanted)} from the cloud", GALLERY
        ),
        Phase(2, "The quota runs out", f"{_images(spare)} left in the same budget", GALLERY),
        Phase(3, "The cloud server is stopped", "quota is left, but nobody answers", KIOSK),
    )


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: one a line; empty lines and lines that start with # do not count. Raises Refused."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"cannot read the prompts in {file}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise Refused(f"{file} has no prompts; write one a line")
    return prompts


def make_room(out: Path) -> None:
    """Makes the folder, and removes what an earlier demo wrote there; whatever else lies in it stays."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    pictures = [image for image in images.iterdir() if PICTURE.fullmatch(image.name)]
    for old in (*pictures, out / "record.jsonl", out / "contact-sheet.png"):
        old.unlink(missing_ok=True)


def start_cloud(options: argparse.Namespace, state: Path) -> Server:
    """Starts the cloud server."""
    choices = {"model": options.model, "price-micro-usd": PRICE_MICRO_USD, "state": state / "cloud"}
    return Server("cloud_server", choices, options.out / "cloud-server.log")


def start_edge(options: argparse.Namespace, state: Path, cloud: str, gallery: int, kiosk: int) -> Server:
    """Starts the edge agent with budgets for so many cloud images of each app."""
    price = PRICE_MICRO_USD / 1e6
    choices = {
        "bundle": options.bundle,
        "cloud": cloud,
        "routing-rate": options.routing_rate,
        "budget": ",".join(
            [
                f"{(gallery + kiosk) * price:.6f}/total",
                f"{gallery * price:.6f}/total@{GALLERY}",
                f"{kiosk * price:.6f}/total@{KIOSK}",
            ]
        ),
        "max-price": f"{price:.6f}",
        "state": state / "edge",
    }
    return Server("edge_agent", choices, options.out / "edge-agent.log")


def stop(console: Console, servers: Sequence[Server]) -> None:
    """Ends them all, undisturbed by a second Ctrl-C, and also where the terminal has gone and takes no word more."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for server in servers:
        server.terminate()
    try:
        with waiting(console, "stopping the servers"):
            for server in servers:
                server.stop()
    finally:
        for server in servers:
            server.stop()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)


def cloud_worthy(options: argparse.Namespace, prompts: Sequence[str]) -> int:
    """How many of the prompts the policy wants in the cloud: what `edge-agent route` predicts. Raises Refused."""
    command = [sys.executable, "-m", "edge_agent", "route", "-", "--json", "--bundle", str(options.bundle)]
    routed = subprocess.run(
        [*command, "--routing-rate", options.routing_rate],
        input="\n".join(prompts),
        capture_output=True,
        encoding="utf-8",
        env=own_environment(),
        check=False,
    )
    if routed.returncode:
        *_, said = routed.stderr.splitlines() or [f"`edge-agent route` ended with {routed.returncode}"]
        raise Refused(said.removeprefix("edge-agent: "))
    return sum(json.loads(line)["route"] == "cloud" for line in routed.stdout.splitlines())


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """A spinner on a terminal, a line anywhere else."""
    if console.is_terminal:
        with console.status(Text(f"{what} …")):
            yield
    else:
        print(f"{what} ...", flush=True)
        yield


def account(
    console: Console,
    demo: Demo,
    budgets: Sequence[BudgetState],
    notes: Sequence[str],
    sheet: Path,
    seconds: float,
) -> None:
    """What was spent, who made how many, and where the pictures are."""
    makers = [answer.received.served_by for answer in demo.answers]
    lines = [
        f"{len(makers)} images in {seconds:.0f} s: {makers.count('edge')} made on the edge, "
        f"{makers.count('cloud')} in the cloud; prompts without an image: {demo.unanswered}",
        *(
            f"{budget.app} spent {dollars(budget.spent_micro_usd)} of its {dollars(budget.cap_micro_usd)}"
            for budget in budgets
            if budget.app
        ),
        f"contact sheet  {sheet}",
        f"images         {demo.out / 'images'}",
        f"record         {demo.out / 'record.jsonl'}",
        f"logs           {demo.out / 'edge-agent.log'}, {demo.out / 'cloud-server.log'}",
    ]
    console.print()
    for line in [*lines, *(f"note: {note}" for note in notes)]:
        console.print(line, soft_wrap=True)


def _images(number: int) -> str:
    return f"{number} image" if number == 1 else f"{number} images"


if __name__ == "__main__":
    sys.exit(main())
