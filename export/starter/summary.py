"""What the two starter models are: how large, what an image of theirs costs, and how good it is.

    edge-export starter summary [--out docs/starter.md]

Cost is counted and timed on this machine, both models as diffusers pipelines on torch. Quality is read from the labels:
means over the test prompts, one metric a row, with 95 % bootstraps over scenes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edge_agent.superiority import METRICS
from export.bootstrap import Estimate, Floats, intervals
from export.evaluate import RESAMPLES
from export.markdown import head, row
from export.outcomes import Outcomes
from export.output import check_output, default_output, write_output
from export.painter import Painter, cloud_model
from export.starter.shipped import STARTER_CLOUD, STARTER_EDGE, STARTER_LABELS
from export.terminal import progress

OUT, BEGINS = "docs/starter.md", "# The starter's models"
PARTS = {"text_encoder": "text encoder", "unet": "UNet", "vae": "autoencoder"}
PROMPT = "three red apples on a beach"
TIMED = 15  # images a model, in turns; the first of each is not counted


@dataclass(frozen=True)
class Cost:
    """Of one image."""

    parameters: dict[str, int]
    """By part of the pipeline."""
    steps: int
    guidance_scale: float
    multiply_adds: int
    """Of matrix products, attention and convolutions, which is nearly all there is."""
    milliseconds: float
    """Median."""


def multiply_adds(painter: Painter) -> int:
    """Counted while an image is made."""
    # Attention is counted only where it is made of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        painter.paint([PROMPT], [0])
    return int(counter.get_total_flops()) // 2


def costs(painters: Sequence[Painter]) -> list[Cost]:
    """Of each model, timed in turns so that they meet the same weather."""
    times: list[list[float]] = [[] for _ in painters]
    with progress() as bar:
        for seed in bar.track(range(TIMED + 1), description="images"):
            for painter, series in zip(painters, times, strict=True):
                began = time.perf_counter()
                painter.paint([PROMPT], [seed])
                series.append(1e3 * (time.perf_counter() - began))
    return [
        Cost(
            {part: getattr(painter.pipeline, part).num_parameters() for part in PARTS},
            painter.steps,
            painter.guidance_scale,
            multiply_adds(painter),
            statistics.median(series[1:]),
        )
        for painter, series in zip(painters, times, strict=True)
    ]


def qualities(test: Outcomes, scenes: NDArray[np.int64]) -> dict[str, tuple[Estimate, Estimate, Estimate]]:
    """Metric -> means of the edge's images, of the cloud's, and of the gap; ``scenes`` [N] numbers what prompts say."""
    edge, cloud = test.edge.astype(np.float64), test.cloud.astype(np.float64)

    def means(values: Floats) -> list[Estimate]:
        return intervals(lambda rows: values[rows].mean(0), scenes, RESAMPLES)

    return dict(zip(METRICS, zip(means(edge), means(cloud), means(cloud - edge), strict=True), strict=True))


def report(
    edge: Cost, cloud: Cost, quality: dict[str, tuple[Estimate, Estimate, Estimate]], prompts: int
) -> str:
    """The whole as Markdown."""

    def of_both(what: str, of_edge: float, of_cloud: float, digits: int) -> str:
        return f"| {what} | {of_edge:,.{digits}f} | {of_cloud:,.{digits}f} | {of_cloud / of_edge:.1f} x |"

    lines = [
        BEGINS,
        "",
        "Made by `edge-export starter summary`. Both models draw the same small world and were trained by the same",
        "recipe on the same data; the cloud's is larger and makes more steps. The edge's size was chosen so that",
        "something is left to route; neither was degraded otherwise.",
        "",
        "![The same prompts, edge left, cloud right](images/contact-sheet.png)",
        "",
        "Edge left, cloud right; the prompts are of the test split (`edge-export starter contact-sheet`).",
        "",
        "## What an image costs",
        "",
        f"Both as diffusers pipelines on torch, {torch.get_num_threads()} threads of {platform.machine()}, median of",
        f"{TIMED} images made in turns. Multiply-adds are those of matrix products, attention and convolutions.",
        "",
        "| | edge | cloud | |",
        "|---|---|---|---|",
        *(
            of_both(
                f"parameters of the {name}, million",
                edge.parameters[part] / 1e6,
                cloud.parameters[part] / 1e6,
                2,
            )
            for part, name in PARTS.items()
        ),
        of_both("steps", edge.steps, cloud.steps, 0),
        f"| guidance scale | {edge.guidance_scale:.1f} | {cloud.guidance_scale:.1f} | |",
        of_both("multiply-adds, thousand million", edge.multiply_adds / 1e9, cloud.multiply_adds / 1e9, 2),
        of_both("time, ms", edge.milliseconds, cloud.milliseconds, 0),
        "",
        "## How good it is",
        "",
        f"The starter's judge on the images of {prompts} test prompts: means, with 95 % bootstrap intervals over",
        "scenes. [metrics.md](metrics.md) says how far each metric can be trusted, and [inspector.md](inspector.md)",
        "what an inspector that shares no weights, loss or scenes with the judge finds in the same images.",
        "",
        *head("metric", "edge", "cloud", "cloud - edge"),
        *(row(metric, *map("{:.3f}".format, values)) for metric, values in quality.items()),
        "",
        "The model cards say how each was trained: [edge](../export/starter/weights/README.md),",
        "[cloud](../cloud_server/starter/README.md).",
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; exit code 0."""
    parser = argparse.ArgumentParser(
        prog="edge-export starter summary", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--labels", type=Path, default=STARTER_LABELS, help="default: the starter's")
    parser.add_argument("--out", type=Path, help=f"default: {OUT}")
    options = parser.parse_args(argv)
    out = options.out or default_output(OUT, BEGINS)
    check_output(out, options.labels)
    outcomes = Outcomes.read(options.labels)
    scenes = outcomes.scenes()
    quality = qualities(outcomes.split("test"), scenes[outcomes.splits == "test"])
    edge, cloud = costs([Painter(cloud_model(str(model))) for model in (STARTER_EDGE, STARTER_CLOUD)])
    text = report(edge, cloud, quality, len(outcomes.split("test")))
    write_output(out, text)
    print(f"written to {out}")
    return 0
