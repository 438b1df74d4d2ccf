"""`make bench`: the project's numbers, as ratios measured in one run.

    python deploy/bench [--only ROW] [--bundle DIR] [--model DIR] [--out bench-out] [--quick] [--full-size]
        [--providers LIST]

Ours and theirs take turns, each in a process that is alive all the while, and every ratio is one of a pair measured
one right after the other: what else the machine does then weighs on both alike. No number here is a test.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import grpc
from rich.console import Console

import attention
import cancellation
import decision
import headroom
import idle
import images
import imports
import installed
import machine
import operators
import overhead
import report
import runtime
from child import asked
from edge_agent.bundle import Bundle
from edge_agent.diffusion.providers import CPU
from edge_agent.errors import BundleError, StartRefused
from edge_agent.settings import STARTER, resolve
from errors import BenchError
from plan import Plan, cores
from row import Row

ROOT = Path(__file__).resolve().parents[2]
STARTER_WEIGHTS = ROOT / "export" / "starter" / "weights" / "edge"
PIPE_WIDTH = 180  # characters, where no terminal says how many there are

GROUPS: dict[str, Callable[[Plan], list[Row]]] = {
    images.PROVIDER: images.against_cpu,
    images.FULL_SIZE_PROVIDER: images.full_size_against_cpu,
    images.HALF: images.half_against_single,
    decision.GROUP: decision.rows,
    overhead.GROUP: overhead.rows,
    idle.GROUP: idle.rows,
    images.OPTIMUM: images.against_optimum,
    images.DIFFUSERS: images.against_diffusers,
    images.FULL_SIZE: images.full_size_against_optimum,
    images.FULL_SIZE_DIFFUSERS: images.full_size_against_diffusers,
    attention.GROUP: attention.rows,
    attention.HALF_GROUP: attention.half_rows,
    operators.GROUP: operators.rows,
    installed.GROUP: installed.rows,
    imports.GROUP: imports.rows,
    cancellation.GROUP: cancellation.rows,
    runtime.GROUP: runtime.rows,
    runtime.FULL_SIZE_GROUP: runtime.full_size_rows,
    headroom.GROUP: headroom.rows,
}
"""The rows that are measured together, by the name that --only takes."""

ELSEWHERE = (images.PROVIDER, images.FULL_SIZE_PROVIDER, images.HALF, attention.HALF_GROUP)
"""Those that are about other providers than the CPU, and on the CPU measured only when they are asked for."""

ON_CPU = {
    decision.GROUP: "it is compared with bare calls on one core",
    installed.GROUP: "it is the same whatever the models run on",
    imports.GROUP: "it is the same whatever the models run on",
    headroom.GROUP: "it is the same whatever the models run on",
}
"""Those that are about the CPU alone, and why."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was measured that was asked for, met or not; 1 when a row could not be; 2 on bad usage."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only",
        action="append",
        choices=GROUPS,
        metavar="ROW",
        help=f"one of {', '.join(GROUPS)}; may repeat",
    )
    parser.add_argument("--bundle", type=Path, default=STARTER, metavar="DIR", help="default: the starter")
    parser.add_argument(
        "--model",
        type=Path,
        default=STARTER_WEIGHTS,
        metavar="DIR",
        help="diffusers folder with the bundle's weights; default: the starter's",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        default=STARTER_WEIGHTS.parent / "evaluation.json",
        metavar="FILE",
        help="what `edge-export evaluate` wrote; default: the starter's",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench-out"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions: tries the machinery")
    parser.add_argument(
        "--full-size",
        action="store_true",
        help="also measure random weights of Stable Diffusion 1.5's size: half an hour and 13 GB of memory",
    )
    parser.add_argument(
        "--full-size-models",
        type=Path,
        default=ROOT / "runs" / "bench" / "full-size",
        metavar="DIR",
        help="where they are made and kept, 9 GB; default: runs/bench/full-size",
    )
    parser.add_argument(
        "--providers",
        default=CPU,
        metavar="LIST",
        help="what ours runs on, as `edge-agent serve --providers` takes it, such as cuda,cpu; default: the CPU",
    )
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the daemons are stopped then, too
    try:
        return run(options)
    except (BundleError, BenchError, StartRefused, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(options: argparse.Namespace) -> int:
    """Measures, and writes after each group what there is. Raises BundleError, StartRefused for what is no list of
    providers, BenchError where they do not run the models, and OSError where nothing can be written.
    """
    options.out.mkdir(parents=True, exist_ok=True)  # before what takes minutes
    bundle = Bundle.open(options.bundle)

    # What is installed has its bytecode. Here the first process writes it, unless this says no.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    providers = ",".join(resolve({"providers": options.providers}, {}).providers) or CPU
    folders = (options.bundle, options.model, options.evaluation, options.full_size_models)
    plan = Plan(*folders, cores(), providers)
    if options.quick:
        plan = plan.quick
    facts = {"machine": machine.facts(), "bundle": _bundle_facts(bundle), "quick": options.quick}
    if not plan.on_cpu:
        opened = asked(plan.threads, "opening.py", plan.bundle, plan.threads, plan.providers)
        facts["providers"] = {"names": plan.providers, "opened_s": opened["opened_s"]}
    progress = Console(stderr=True)
    rows: list[Row] = []
    failed = False
    wanted = options.only or [
        name
        for name in GROUPS
        if (options.full_size or not name.startswith(images.FULL_SIZE))
        and not (plan.on_cpu and name in ELSEWHERE)
    ]
    for name in wanted:
        with progress.status(f"measuring {name}"):
            try:
                rows += _measured(name, plan)
            except (BenchError, subprocess.SubprocessError, grpc.RpcError) as error:
                failed = True
                rows.append(Row.missing(name, name, str(error)))
        # Each time, so that a run that is broken off leaves what it found.
        written = report.write(options.out, rows, facts)
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(report.table(rows))
    print(f"written to {', '.join(map(str, written))}")
    return 1 if failed else 0


def _measured(name: str, plan: Plan) -> list[Row]:
    """The rows of that name. Elsewhere than on the CPU they have no targets, which are the CPU's."""
    if plan.on_cpu:
        return GROUPS[name](plan)
    if name in ON_CPU:
        return [Row.missing(name, name, ON_CPU[name])]
    return [replace(row, target="", met=None) for row in GROUPS[name](plan)]


def _bundle_facts(bundle: Bundle) -> dict[str, object]:
    manifest = asdict(bundle.manifest)
    kept = {name: manifest[name] for name in ("name", "width", "height", "text_tokens", "text_hidden")}
    defaults = {"steps": bundle.manifest.default_steps, "guidance": bundle.manifest.default_guidance}
    return {**kept, **defaults, "model_digest": bundle.model_digest}


if __name__ == "__main__":
    sys.exit(main())
