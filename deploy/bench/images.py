"""The edge's local image beside optimum's on the same files, and beside diffusers' on the same weights."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import full_size
from child import Child, Reply
from clock import settle
from edge_agent.bundle import Bundle
from errors import BenchError
from estimate import Estimate, calm_ratio, quantile, ratio
from plan import PROMPTS, Plan
from row import Row

EDGE, OPTIMUM, DIFFUSERS = "edge", "optimum", "diffusers"  # kinds of pipelines, as painter.py calls them
FULL_SIZE, FULL_SIZE_DIFFUSERS = "full-size", "full-size-diffusers"
TIME_RATIO, COLD_RATIO, MEMORY_RATIO, PIXELS = 0.9, 0.2, 0.4, 1e-3  # targets of the starter
FULL_TIME_RATIO, FULL_MEMORY_RATIO = 1.02, 0.4  # targets at Stable Diffusion's size, memory above the weights
_MB = 1e6


@dataclass
class Side:
    """What one pipeline took. Starts and memory are of fresh processes, images and steps of warm ones."""

    image_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)  # the median of one image's steps
    start_s: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    held_mb: list[float] = field(default_factory=list)  # after an image

    def started(self, painter: Child, first: Reply) -> None:
        """Note what the first image of a fresh process took."""
        self.start_s.append(time.perf_counter() - painter.started)
        self.peak_mb.append(first["peak_bytes"] / _MB)
        self.held_mb.append(first["held_bytes"] / _MB)

    def painted(self, found: Reply) -> None:
        """Note what an image of a warm process took."""
        self.image_s.append(found["seconds"])
        if found["step_seconds"]:
            self.step_s.append(float(np.median(found["step_seconds"])))


@dataclass
class Pairs:
    """The edge and another pipeline, measured in turns."""

    other: str
    ours: Side = field(default_factory=Side)
    theirs: Side = field(default_factory=Side)
    differences: list[float] = field(default_factory=list)  # an image's largest, in 0..1 before rounding

    @property
    def sides(self) -> tuple[Side, Side]:
        """Ours first."""
        return self.ours, self.theirs

    def row(self, group: str, what: str, name: str, limit: float | None = None, less: float = 0.0) -> Row:
        """The ratio of the series called `name`; `less` is taken off both first. Without a limit there is no target."""
        ours, theirs = ([value - less for value in getattr(side, name)] for side in self.sides)
        unit = "MB" if name.endswith("_mb") else "s"
        found = ratio(ours, theirs)
        more = {
            "note": f"{quantile(ours).value:.3g} over {quantile(theirs).value:.3g} {unit}",
            "calm": calm_ratio(ours, theirs) if name in ("image_s", "step_s") else None,
            "details": {EDGE: ours, self.other: theirs},
        }
        if limit is None:
            return Row.untargeted(group, what, found, "x", **more)
        return Row.at_most(group, what, found, "x", limit, **more)


def against_optimum(plan: Plan) -> list[Row]:
    """Time, cold start and memory."""
    pairs = measure(plan, OPTIMUM, plan.bundle)
    return [
        pairs.row(OPTIMUM, "time of an image ÷ optimum's", "image_s", TIME_RATIO),
        pairs.row(OPTIMUM, "time of a step ÷ optimum's", "step_s"),
        pairs.row(OPTIMUM, "cold start to first image ÷ optimum's", "start_s", COLD_RATIO),
        pairs.row(OPTIMUM, "peak memory to first image ÷ optimum's", "peak_mb", MEMORY_RATIO),
        pairs.row(OPTIMUM, "memory held after an image ÷ optimum's", "held_mb"),
        _pixels(OPTIMUM, pairs),
    ]


def against_diffusers(plan: Plan) -> list[Row]:
    """Pixels; and time and memory, which have no target."""
    if not (plan.model / "model_index.json").is_file():
        raise BenchError(
            f"no diffusers folder at {plan.model}; name one that has the bundle's weights with --model"
        )
    pairs = measure(plan, DIFFUSERS, plan.model)
    return [
        _pixels(DIFFUSERS, pairs),
        pairs.row(DIFFUSERS, "time of an image ÷ diffusers' on torch", "image_s"),
        pairs.row(DIFFUSERS, "time of a step ÷ diffusers' on torch", "step_s"),
        pairs.row(DIFFUSERS, "cold start to first image ÷ diffusers'", "start_s"),
        pairs.row(DIFFUSERS, "peak memory to first image ÷ diffusers'", "peak_mb"),
        pairs.row(DIFFUSERS, "memory held after an image ÷ diffusers'", "held_mb"),
    ]


def full_size_against_optimum(plan: Plan) -> list[Row]:
    """Random weights in the shape of Stable Diffusion 1.5, made and exported where they are not there yet.

    One process at a time holds such weights: each pair is two fresh processes, one after the other.
    """
    _, bundle = full_size_folders(plan)
    weights_mb = _weights_mb(bundle)
    pairs = measure_apart(plan, OPTIMUM, bundle, bundle)
    above = f"memory above the weights ({weights_mb:.0f} MB) ÷ optimum's"
    return [
        pairs.row(FULL_SIZE, "full size: time of an image ÷ optimum's", "image_s", FULL_TIME_RATIO),
        pairs.row(FULL_SIZE, "full size: time of a step ÷ optimum's", "step_s"),
        pairs.row(FULL_SIZE, "full size: cold start to first image ÷ optimum's", "start_s"),
        pairs.row(FULL_SIZE, f"full size: peak {above}", "peak_mb", FULL_MEMORY_RATIO, less=weights_mb),
        pairs.row(FULL_SIZE, "full size: memory held after an image ÷ optimum's", "held_mb"),
        _pixels(FULL_SIZE, pairs, "full size: "),
    ]


def full_size_against_diffusers(plan: Plan) -> list[Row]:
    """The same beside torch."""
    model, bundle = full_size_folders(plan)
    pairs = measure_apart(plan, DIFFUSERS, bundle, model)
    return [
        _pixels(FULL_SIZE_DIFFUSERS, pairs, "full size: "),
        pairs.row(FULL_SIZE_DIFFUSERS, "full size: time of an image ÷ diffusers' on torch", "image_s"),
        pairs.row(FULL_SIZE_DIFFUSERS, "full size: time of a step ÷ diffusers' on torch", "step_s"),
        pairs.row(FULL_SIZE_DIFFUSERS, "full size: cold start to first image ÷ diffusers'", "start_s"),
        pairs.row(FULL_SIZE_DIFFUSERS, "full size: peak memory to first image ÷ diffusers'", "peak_mb"),
    ]


def full_size_folders(plan: Plan) -> tuple[Path, Path]:
    """The diffusers folder and the bundle, made where they are not there yet."""
    script = str(Path(full_size.__file__))
    finished = subprocess.run([sys.executable, script, str(plan.full_size)], stdout=sys.stderr, check=False)
    if finished.returncode:
        raise BenchError("the models of full size could not be made; what the export said stands above")
    return full_size.folders(plan.full_size)


def measure(plan: Plan, other: str, folder: Path) -> Pairs:
    """Fresh processes first; the last pair of them then paints in turns."""
    pairs = Pairs(other)
    with ExitStack() as alive, tempfile.TemporaryDirectory() as kept:
        painters: list[Child] = []
        for number in range(plan.starts):
            last = number == plan.starts - 1
            for kind, model, noted in zip((EDGE, other), (plan.bundle, folder), pairs.sides, strict=True):
                painter = _start(plan, kind, model, plan.bundle)
                with ExitStack() if last else painter:
                    if last:
                        painters.append(alive.enter_context(painter))
                    noted.started(painter, painter.ask(prompt=PROMPTS[0], seed=0))
        for number in range(plan.images):
            files = [Path(kept) / f"{side}.npy" for side in (0, 1)]
            for side in (0, 1) if number % 2 else (1, 0):
                prompt = PROMPTS[number % len(PROMPTS)]
                settle()
                found: Reply = painters[side].ask(prompt=prompt, seed=number, keep=str(files[side]))
                pairs.sides[side].painted(found)
            pairs.differences.append(_difference(files))
    return pairs


def measure_apart(plan: Plan, other: str, bundle: Path, folder: Path) -> Pairs:
    """The same in processes that are never alive together: a first image, then one that counts."""
    pairs = Pairs(other)
    with tempfile.TemporaryDirectory() as kept:
        for number in range(plan.full_size_pairs):
            files = [Path(kept) / f"{side}.npy" for side in (0, 1)]
            for side in (0, 1) if number % 2 else (1, 0):
                with _start(plan, (EDGE, other)[side], (bundle, folder)[side], bundle) as painter:
                    pairs.sides[side].started(painter, painter.ask(prompt=PROMPTS[0], seed=0))
                    found = painter.ask(prompt=PROMPTS[1], seed=number, keep=str(files[side]))
                    pairs.sides[side].painted(found)
            pairs.differences.append(_difference(files))
    return pairs


def _start(plan: Plan, kind: str, folder: Path, bundle: Path) -> Child:
    """A process with that `kind` of pipeline, of what lies in `folder`, at the defaults of `bundle`."""
    facts = Bundle.open(bundle, verify=False).manifest
    arguments = (str(folder), str(plan.threads), str(facts.default_steps), str(facts.default_guidance))
    return Child("painter.py", kind, *arguments, threads=plan.threads, edge=kind == EDGE)


def _difference(files: Sequence[Path]) -> float:
    ours, theirs = map(np.load, files)
    return float(np.abs(ours - theirs).max())


def _pixels(group: str, pairs: Pairs, prefix: str = "") -> Row:
    count = len(pairs.differences)
    return Row.at_most(
        group,
        f"{prefix}pixels, largest difference from {pairs.other}'{'' if pairs.other.endswith('s') else 's'}",
        Estimate.exact(max(pairs.differences), count),
        "",
        PIXELS,
        note=f"colours in 0..1 before rounding, {count} image{'s' if count > 1 else ''}",
    )


def _weights_mb(bundle: Path) -> float:
    """Of the graphs that make an image, as files."""
    files = Bundle.open(bundle, verify=False).manifest.files
    return sum(entry.bytes for name, entry in files.items() if ".onnx" in name) / _MB
