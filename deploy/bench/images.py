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
from edge_agent.manifest import Size
from errors import BenchError
from estimate import Estimate, calm_ratio, quantile, ratio
from plan import PROMPTS, Plan
from row import Row

EDGE, OPTIMUM, DIFFUSERS = "edge", "optimum", "diffusers"  # kinds of pipelines, as painter.py calls them
ON_CPU, SINGLE = "cpu", "single"  # the edge's as well
FULL_SIZE, FULL_SIZE_DIFFUSERS, HALF = "full-size", "full-size-diffusers", "full-size-half"
PROVIDER, FULL_SIZE_PROVIDER = "provider", "full-size-provider"
NOT_THE_DEVICES = "what a process holds is not the memory of a GPU"
TIME_RATIO, COLD_RATIO, MEMORY_RATIO, PIXELS = 0.9, 0.2, 0.4, 1e-3  # targets of the starter
FULL_TIME_RATIO, FULL_MEMORY_RATIO = 1.02, 0.4  # targets at Stable Diffusion's size, memory above the weights
_WHOSE = {
    OPTIMUM: "optimum's",
    DIFFUSERS: "diffusers'",
    ON_CPU: "the CPU's",
    SINGLE: "those in single precision",
}
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
    if alone := _alone(plan, OPTIMUM):
        return alone
    pairs = measure(plan, OPTIMUM, plan.bundle)
    rows = [
        pairs.row(OPTIMUM, "time of an image ÷ optimum's", "image_s", TIME_RATIO),
        pairs.row(OPTIMUM, "time of a step ÷ optimum's", "step_s"),
        pairs.row(OPTIMUM, "cold start to first image ÷ optimum's", "start_s", COLD_RATIO),
        pairs.row(OPTIMUM, "peak memory to first image ÷ optimum's", "peak_mb", MEMORY_RATIO),
        pairs.row(OPTIMUM, "memory held after an image ÷ optimum's", "held_mb"),
        _pixels(OPTIMUM, pairs),
    ]
    return _told(plan, rows)


def against_diffusers(plan: Plan) -> list[Row]:
    """Pixels; and time and memory, which have no target."""
    if alone := _alone(plan, DIFFUSERS):
        return alone
    if not (plan.model / "model_index.json").is_file():
        raise BenchError(
            f"no diffusers folder at {plan.model}; name one that has the bundle's weights with --model"
        )
    pairs = measure(plan, DIFFUSERS, plan.model)
    rows = [
        _pixels(DIFFUSERS, pairs),
        pairs.row(DIFFUSERS, "time of an image ÷ diffusers' on torch", "image_s"),
        pairs.row(DIFFUSERS, "time of a step ÷ diffusers' on torch", "step_s"),
        pairs.row(DIFFUSERS, "cold start to first image ÷ diffusers'", "start_s"),
        pairs.row(DIFFUSERS, "peak memory to first image ÷ diffusers'", "peak_mb"),
        pairs.row(DIFFUSERS, "memory held after an image ÷ diffusers'", "held_mb"),
    ]
    return _told(plan, rows)


def full_size_against_optimum(plan: Plan) -> list[Row]:
    """Random weights in the shape of Stable Diffusion 1.5, made and exported where they are not there yet.

    One process at a time holds such weights: each pair is two fresh processes, one after the other.
    """
    if alone := _alone(plan, FULL_SIZE):
        return alone
    _, bundle = full_size_folders(plan)
    weights_mb = _weights_mb(bundle)
    pairs = measure_apart(plan, OPTIMUM, bundle, bundle)
    above = f"memory above the weights ({weights_mb:.0f} MB) ÷ optimum's"
    rows = [
        pairs.row(FULL_SIZE, "full size: time of an image ÷ optimum's", "image_s", FULL_TIME_RATIO),
        pairs.row(FULL_SIZE, "full size: time of a step ÷ optimum's", "step_s"),
        pairs.row(FULL_SIZE, "full size: cold start to first image ÷ optimum's", "start_s"),
        pairs.row(FULL_SIZE, f"full size: peak {above}", "peak_mb", FULL_MEMORY_RATIO, less=weights_mb),
        pairs.row(FULL_SIZE, "full size: memory held after an image ÷ optimum's", "held_mb"),
        _pixels(FULL_SIZE, pairs, "full size: "),
    ]
    return _told(plan, rows)


def full_size_against_diffusers(plan: Plan) -> list[Row]:
    """The same beside torch."""
    if alone := _alone(plan, FULL_SIZE_DIFFUSERS):
        return alone
    model, bundle = full_size_folders(plan)
    pairs = measure_apart(plan, DIFFUSERS, bundle, model)
    rows = [
        _pixels(FULL_SIZE_DIFFUSERS, pairs, "full size: "),
        pairs.row(FULL_SIZE_DIFFUSERS, "full size: time of an image ÷ diffusers' on torch", "image_s"),
        pairs.row(FULL_SIZE_DIFFUSERS, "full size: time of a step ÷ diffusers' on torch", "step_s"),
        pairs.row(FULL_SIZE_DIFFUSERS, "full size: cold start to first image ÷ diffusers'", "start_s"),
        pairs.row(FULL_SIZE_DIFFUSERS, "full size: peak memory to first image ÷ diffusers'", "peak_mb"),
    ]
    return _told(plan, rows)


def against_cpu(plan: Plan) -> list[Row]:
    """The provider's images beside the CPU's of the same bundle, in each of its sizes."""
    return [
        row
        for size in _sizes(plan, plan.bundle)
        for row in _beside_cpu(PROVIDER, "", size, measure(plan, ON_CPU, plan.bundle, size))
    ]


def full_size_against_cpu(plan: Plan) -> list[Row]:
    """The same at Stable Diffusion 1.5's size."""
    _, bundle = full_size_folders(plan)
    return [
        row
        for size in _sizes(plan, bundle)
        for row in _beside_cpu(
            FULL_SIZE_PROVIDER, "full size: ", size, measure_apart(plan, ON_CPU, bundle, bundle, size)
        )
    ]


def half_against_single(plan: Plan) -> list[Row]:
    """Half precision beside single precision, both on the provider."""
    _, bundle = full_size_folders(plan)
    pairs = measure_apart(plan, SINGLE, half_folder(plan), bundle)
    return [
        pairs.row(HALF, "full size: time of an image, in half precision ÷ in single", "image_s"),
        pairs.row(HALF, "full size: cold start to first image, in half precision ÷ in single", "start_s"),
        _pixels(HALF, pairs, "full size: "),
    ]


def _sizes(plan: Plan, bundle: Path) -> tuple[Size, ...]:
    """Those that the bundle's images have there."""
    if plan.on_cpu:
        raise BenchError("name another provider than the CPU with --providers")
    return Bundle.open(bundle, verify=False).manifest.sizes[: 1 if plan.compiled else None]


def _beside_cpu(group: str, prefix: str, size: Size, pairs: Pairs) -> list[Row]:
    prefix += "{} x {}: ".format(*size)
    return [
        pairs.row(group, f"{prefix}time of an image ÷ the CPU's", "image_s"),
        pairs.row(group, f"{prefix}cold start to first image ÷ the CPU's", "start_s"),
        _pixels(group, pairs, prefix),
    ]


def _alone(plan: Plan, group: str) -> list[Row]:
    """The row that stands for all where there is nobody to compare with."""
    if plan.on_cpu or plan.on_cuda:
        return []
    reason = f"optimum and torch are compared with on the CPU and on CUDA, and not on {plan.providers}"
    return [Row.missing(group, group, reason)]


def _told(plan: Plan, rows: Sequence[Row]) -> list[Row]:
    """The rows, without those of memory where that is not all the memory that is taken."""
    return [
        Row.missing(row.group, row.what, NOT_THE_DEVICES) if "memory" in row.what and not plan.on_cpu else row
        for row in rows
    ]


def full_size_folders(plan: Plan, *more: str) -> tuple[Path, Path]:
    """The diffusers folder and the bundle, made where they are not there yet."""
    script = [sys.executable, str(Path(full_size.__file__)), str(plan.full_size), *more]
    finished = subprocess.run(script, stdout=sys.stderr, check=False)
    if finished.returncode:
        raise BenchError("the models of full size could not be made; what the export said stands above")
    return full_size.folders(plan.full_size)


def half_folder(plan: Plan) -> Path:
    """The bundle in half precision, likewise."""
    full_size_folders(plan, "--half")
    return full_size.half_folder(plan.full_size)


def measure(plan: Plan, other: str, folder: Path, size: Size | None = None) -> Pairs:
    """Fresh processes first; the last pair of them then paints in turns."""
    pairs, sized = Pairs(other), {"size": size} if size else {}
    with ExitStack() as alive, tempfile.TemporaryDirectory() as kept:
        painters: list[Child] = []
        for number in range(plan.starts):
            last = number == plan.starts - 1
            for kind, model, noted in zip((EDGE, other), (plan.bundle, folder), pairs.sides, strict=True):
                painter = _start(plan, kind, model, plan.bundle)
                with ExitStack() if last else painter:
                    if last:
                        painters.append(alive.enter_context(painter))
                    noted.started(painter, painter.ask(prompt=PROMPTS[0], seed=0, **sized))
        for number in range(plan.images):
            files = [Path(kept) / f"{side}.npy" for side in (0, 1)]
            for side in (0, 1) if number % 2 else (1, 0):
                prompt = PROMPTS[number % len(PROMPTS)]
                settle()
                found: Reply = painters[side].ask(prompt=prompt, seed=number, keep=str(files[side]), **sized)
                pairs.sides[side].painted(found)
            pairs.differences.append(_difference(files))
    return pairs


def measure_apart(plan: Plan, other: str, bundle: Path, folder: Path, size: Size | None = None) -> Pairs:
    """The same in processes that are never alive together: a first image, then one that counts."""
    pairs, sized = Pairs(other), {"size": size} if size else {}
    with tempfile.TemporaryDirectory() as kept:
        for number in range(plan.full_size_pairs):
            files = [Path(kept) / f"{side}.npy" for side in (0, 1)]
            for side in (0, 1) if number % 2 else (1, 0):
                with _start(plan, (EDGE, other)[side], (bundle, folder)[side], bundle) as painter:
                    pairs.sides[side].started(painter, painter.ask(prompt=PROMPTS[0], seed=0, **sized))
                    found = painter.ask(prompt=PROMPTS[1], seed=number, keep=str(files[side]), **sized)
                    pairs.sides[side].painted(found)
            pairs.differences.append(_difference(files))
    return pairs


def _start(plan: Plan, kind: str, folder: Path, bundle: Path) -> Child:
    """A process with that `kind` of pipeline, of what lies in `folder`, at the defaults of `bundle`."""
    facts = Bundle.open(bundle, verify=False).manifest
    defaults = (str(facts.default_steps), str(facts.default_guidance))
    arguments = (str(folder), str(plan.threads), *defaults, plan.providers)
    edge = kind in (EDGE, ON_CPU, SINGLE)
    return Child("painter.py", kind, *arguments, threads=plan.threads, edge=edge)


def _difference(files: Sequence[Path]) -> float:
    ours, theirs = map(np.load, files)
    return float(np.abs(ours - theirs).max())


def _pixels(group: str, pairs: Pairs, prefix: str = "") -> Row:
    count = len(pairs.differences)
    return Row.at_most(
        group,
        f"{prefix}pixels, largest difference from {_WHOSE[pairs.other]}",
        Estimate.exact(max(pairs.differences), count),
        "",
        PIXELS,
        note=f"colours in 0..1 before rounding, {count} image{'s' if count > 1 else ''}",
    )


def _weights_mb(bundle: Path) -> float:
    """Of the graphs that make an image, as files."""
    files = Bundle.open(bundle, verify=False).manifest.files
    return sum(entry.bytes for name, entry in files.items() if ".onnx" in name) / _MB
