"""`make aarch64` and `make webgpu`: the edge on an emulated machine beside the one here, on the same prompts.

Both are daemons of their own with the starter; the same client asks both. Before each image another is given up,
and while it is made a decision is asked for. What they decide and draw has to agree: processors and versions
of onnxruntime round differently, so a picture may differ by what rounding makes of that.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

import aarch64
import webgpu
from edge_agent.client import AgentClient, Received
from edge_agent.errors import RouteT2IError
from edge_agent.policy import Decision
from edge_agent.settings import STARTER
from machine import ROOT, CannotPrepare, Machine, new

PROMPTS = ("a red apple on a beach", "three owls left of a tiny guitar at night")
SEED = 7
START_S = 300.0
"""How long a daemon may take to start: emulated, importing alone takes most of a minute on a busy machine."""

MACHINES: dict[str, Callable[[Path], Machine]] = {"aarch64": aarch64.prepare, "webgpu": webgpu.prepare}

MOST_PIXEL = 2
"""Of 255: the largest difference of a pixel that is rounding's."""

MOST_PRS = 1e-3


@dataclass(frozen=True)
class Drawn:
    """What a daemon decided on a prompt and drew for it."""

    decision: Decision
    pixels: NDArray[np.uint8]  # [H, W, 3]
    seconds: float


def main() -> int:
    """Exit code 1 where the two differ, 2 where they could not be compared."""
    parser = argparse.ArgumentParser(prog="python deploy/elsewhere", description=__doc__)
    parser.add_argument("machine", choices=sorted(MACHINES), help="beside this one")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="instead of two of the project's own")
    parser.add_argument(
        "--folder", type=Path, help="where downloads are kept; build/aarch64 or build/webgpu if left out"
    )
    options = parser.parse_args()
    prompts = tuple(options.prompts) or PROMPTS
    folder = options.folder or ROOT / "build" / options.machine
    try:
        other = MACHINES[options.machine](new(folder.absolute()))
        here = _drawn(Machine(f"{platform.machine()}, here", (sys.executable,)), prompts)
        there = _drawn(other, prompts)
    except (CannotPrepare, RouteT2IError) as error:
        print(f"make {options.machine}: {error}", file=sys.stderr)
        return 2
    return max(_compare(prompt, here[prompt], there[prompt]) for prompt in prompts)


def _drawn(machine: Machine, prompts: Sequence[str]) -> dict[str, Drawn]:
    with tempfile.TemporaryDirectory(prefix="edge-") as folder:
        began = time.monotonic()
        with _daemon(machine, Path(folder)) as client:
            print(f"{machine.name}: serves after {time.monotonic() - began:.1f} s", flush=True)
            found = {}
            for prompt in prompts:
                found[prompt] = _draw(client, prompt)
                print(f"{machine.name}: {prompt!r} drawn in {found[prompt].seconds:.2f} s", flush=True)
            return found


@contextmanager
def _daemon(machine: Machine, folder: Path) -> Iterator[AgentClient]:
    address, log = f"unix:{folder / 'agent.sock'}", folder / "log"
    serve = ("-m", "edge_agent", "serve", "--listen", address, "--state", str(folder), "--threads", "1")
    models = ("--bundle", str(STARTER), "--cache", str(folder / "cache"))
    command = [*machine.command, *serve, *models, *machine.flags]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_AGENT_")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=ROOT, env=inherited | dict(machine.environment)
        )
    try:
        client = AgentClient(address, START_S)
        end = time.monotonic() + START_S
        while "event=serving" not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise CannotPrepare(f"{' '.join(command)} does not serve:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        try:
            yield client
        except RouteT2IError as error:
            with suppress(subprocess.TimeoutExpired):  # a daemon that crashed is gone in a moment
                process.wait(1)
                raise CannotPrepare(
                    f"{' '.join(command)} ended by itself:\n{log.read_text()[-3000:]}"
                ) from error
            raise
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _draw(client: AgentClient, prompt: str) -> Drawn:
    image = {"prompt": prompt, "seed": SEED}
    given_up = client.generate(**image)
    next(given_up)  # its decision, by when it is being made
    given_up.close()
    decision, received, asked = None, None, None
    began = time.monotonic()
    for event in client.generate(**image):
        if isinstance(event, Decision):
            decision, asked = event, client.route(prompt)
        elif isinstance(event, Received):
            received = event
    if decision is None or received is None or asked is None:
        raise CannotPrepare(f"the daemon at {client.address} sent an image without its decision")
    if asked.prs != decision.prs:
        raise CannotPrepare(f"PRS is {decision.prs}, and {asked.prs} while the image is made")
    pixels = np.asarray(PIL.Image.open(io.BytesIO(received.png)).convert("RGB"))
    return Drawn(decision, pixels, time.monotonic() - began)


def _compare(prompt: str, here: Drawn, there: Drawn) -> int:
    pixel = int(np.abs(here.pixels.astype(int) - there.pixels.astype(int)).max())
    other = float((here.pixels != there.pixels).mean())
    prs = abs((here.decision.prs or 0.0) - (there.decision.prs or 0.0))
    agree = pixel <= MOST_PIXEL and prs <= MOST_PRS and here.decision.reason == there.decision.reason
    print(
        f"{prompt!r}: {here.decision.reason.value} and {there.decision.reason.value}, PRS {here.decision.prs:.6f}, "
        f"differing by {prs:.1e}; pixels differ by {pixel}/255 at most, {other:.2%} of them at all: "
        f"{'agree' if agree else 'DIFFER'}"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
