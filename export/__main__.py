"""`edge-export STAGE ...`: one command for every stage of making and measuring what the edge runs."""

from __future__ import annotations

import importlib
import io
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from edge_agent.errors import RouteT2IError
from export.errors import ExportError
from export.terminal import console, say

STAGES = {
    "starter": ("export.starter.chain", "make the starter world's models"),
    "convert": (
        "export.convert",
        "make a diffusers folder of a single file, or of a model and LoRAs, embeddings, a denoiser",
    ),
    "diffusion": ("export.diffusion_onnx", "write a diffusers pipeline as a bundle"),
    "precision": (
        "export.precision_table",
        "compare half precision and eight bits with float32: size, time, memory, quality",
    ),
    "label": ("export.label", "measure both models' images: prompts x models x seeds x metrics"),
    "inspect": ("export.inspection", "look whether what was asked for is in the pictures"),
    "validity": (
        "export.validity",
        "measure what the metrics are worth: own and foreign damage, reliability",
    ),
    "train": ("export.train", "train the quality predictor on those labels"),
    "predictor": ("export.predictor_onnx", "write the predictor into the bundle"),
    "calibrate": (
        "export.calibrate",
        "score the calibration prompts, so that a routing rate has a threshold",
    ),
    "evaluate": ("export.evaluate", "measure the routing on held-out prompts"),
    "budget": ("export.budget", "simulate what a month's budget buys, as prompts come and paced"),
    "routerbench": ("export.routerbench.comparison", "compare routers on the same outcomes"),
}
"""Stage -> module with `main(argv) -> exit code`, and what it does, in the order they are run. Modules are imported
when their stage is asked for: torch takes seconds."""

BAD_INPUT = 2
INTERRUPTED = 130


def usage() -> str:
    """What is printed for `--help`."""
    lines = [f"  {name:<12} {purpose}" for name, (_, purpose) in STAGES.items()]
    return "\n".join(
        ["usage: edge-export STAGE ...", "", *lines, "", "edge-export STAGE --help explains a stage."]
    )


def run(stage: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a stage's `main`; what it refuses becomes one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of characters that its encoding lacks
    try:
        with _ended_cleanly():
            return stage(argv)
    except (ExportError, RouteT2IError) as error:
        console.print(f"error: {error}", style="red")
        return BAD_INPUT
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        console.print(f"error: {said}", style="red")
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


@contextmanager
def _ended_cleanly() -> Iterator[None]:
    """Whoever ends the process, or closes its terminal, is obeyed as Ctrl-C is: nothing half-made stays behind."""
    before = {
        number: signal.getsignal(number)
        for name in ("SIGTERM", "SIGHUP")  # Windows has the first alone
        if (number := getattr(signal, name, None))
        and signal.getsignal(number) != signal.SIG_IGN  # as under nohup
    }
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage that `argv` (the process's own arguments when None) names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        say(usage())
        return 0
    if not arguments or arguments[0] not in STAGES:
        named = f"there is no stage {arguments[0]!r}\n\n" if arguments else ""
        print(named + usage(), file=sys.stderr)
        return BAD_INPUT
    # Imported in there: it takes seconds, in which Ctrl-C ends the stage as it does later on.
    return run(lambda argv: importlib.import_module(STAGES[arguments[0]][0]).main(argv), arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
