"""The edge's local image beside optimum's on the same files, and beside diffusers' on the same weights."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from child import Child, Reply
from edge_agent.bundle import Bundle
from errors import BenchError
from estimate import Estimate, calm_ratio, quantile, ratio
from plan import PROMPTS, Plan
from row import Row

OPTIMUM, DIFFUSERS = "optimum", "diffusers"
TIME_RATIO, COLD_RATIO, MEMORY_RATIO, PIXELS = 0.9, 0.2, 0.4, 1e-3  # targets of the starter


@dataclass(frozen=True)
class Pairs:
    """What both pipelines took, the edge's first. Seconds an image; seconds and bytes of fresh processes."""

    image_s: tuple[list[float], list[float]]
    start_s: tuple[list[float], list[float]]
    peak_bytes: tuple[list[float], list[float]]
    differences: list[float]  # an image's largest, of any colour in 0..1 before rounding


def against_optimum(plan: Plan) -> list[Row]:
    """Time, cold start and memory."""
    pairs = measure(plan, OPTIMUM, plan.bundle)
    pixels = f"pixels differ by at most {max(pairs.differences):.1e}"
    memory = [[size / 1e6 for size in sizes] for sizes in pairs.peak_bytes]
    return [
        Row.at_most(
            OPTIMUM,
            "time of an image ÷ optimum's",
            ratio(*pairs.image_s),
            "x",
            TIME_RATIO,
            note=f"{_medians(*pairs.image_s)} s; {pixels}",
            calm=calm_ratio(*pairs.image_s),
            details={"edge_s": pairs.image_s[0], "optimum_s": pairs.image_s[1]},
        ),
        Row.at_most(
            OPTIMUM,
            "cold start to first image ÷ optimum's",
            ratio(*pairs.start_s),
            "x",
            COLD_RATIO,
            note=f"{_medians(*pairs.start_s)} s",
            details={"edge_s": pairs.start_s[0], "optimum_s": pairs.start_s[1]},
        ),
        Row.at_most(
            OPTIMUM,
            "peak memory to first image ÷ optimum's",
            ratio(*memory),
            "x",
            MEMORY_RATIO,
            note=f"{_medians(*memory)} MB",
            details={"edge_mb": memory[0], "optimum_mb": memory[1]},
        ),
    ]


def against_diffusers(plan: Plan) -> list[Row]:
    """Pixels; and time, which has no target."""
    if not (plan.model / "model_index.json").is_file():
        raise BenchError(
            f"no diffusers folder at {plan.model}; name one that has the bundle's weights with --model"
        )
    pairs = measure(plan, DIFFUSERS, plan.model)
    return [
        Row.at_most(
            DIFFUSERS,
            "pixels, largest difference from diffusers'",
            Estimate.exact(max(pairs.differences), plan.images),
            "",
            PIXELS,
            note=f"colours in 0..1 before rounding, {plan.images} images",
        ),
        Row(
            DIFFUSERS,
            "time of an image ÷ diffusers' on torch",
            "x",
            "",
            ratio(*pairs.image_s),
            None,
            note=f"{_medians(*pairs.image_s)} s",
            calm=calm_ratio(*pairs.image_s),
            details={"edge_s": pairs.image_s[0], "diffusers_s": pairs.image_s[1]},
        ),
    ]


def measure(plan: Plan, other: str, folder: Path) -> Pairs:
    """Fresh processes first; the last pair of them then paints in turns."""
    pairs = Pairs(([], []), ([], []), ([], []), [])
    manifest = Bundle.open(plan.bundle, verify=False).manifest
    more = [str(plan.threads), str(manifest.default_steps), str(manifest.default_guidance)]

    def start(side: int) -> Child:
        kind, path = (("edge", plan.bundle), (other, folder))[side]
        return Child("painter.py", kind, str(path), *more, threads=plan.threads, edge=side == 0)

    starts = plan.starts if other == OPTIMUM else 1  # only optimum's cold start is compared
    with ExitStack() as alive, tempfile.TemporaryDirectory() as kept:
        painters: list[Child] = []
        for number in range(starts):
            last = number == starts - 1
            for side in (0, 1):
                painter = start(side)
                with ExitStack() if last else painter:
                    if last:
                        painters.append(alive.enter_context(painter))
                    first = painter.ask(prompt=PROMPTS[0], seed=0)
                    pairs.start_s[side].append(time.perf_counter() - painter.started)
                    pairs.peak_bytes[side].append(first["peak_bytes"])
        for number in range(plan.images):
            files = [Path(kept) / f"{side}.npy" for side in (0, 1)]
            for side in (0, 1) if number % 2 else (1, 0):
                prompt = PROMPTS[number % len(PROMPTS)]
                found: Reply = painters[side].ask(prompt=prompt, seed=number, keep=str(files[side]))
                pairs.image_s[side].append(found["seconds"])
            ours, theirs = map(np.load, files)
            pairs.differences.append(float(np.abs(ours - theirs).max()))
    return pairs


def _medians(ours: list[float], theirs: list[float]) -> str:
    return f"{quantile(ours).value:.3g} over {quantile(theirs).value:.3g}"
