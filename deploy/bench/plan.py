"""What a run of the benchmark measures, and how often."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROMPTS = (
    "a cat",
    "two dogs on a beach",
    "a red apple left of a tiny guitar",
    "three owls above a boat at night",
    "a big moon, a small house and two trees in the snow",
    "four bananas right of a bicycle under a rainbow, seen from far away",
)


@dataclass(frozen=True)
class Plan:
    """`threads` is what every pipeline gets. The counts are of pairs: ours and theirs, one right after the other."""

    bundle: Path
    model: Path  # a diffusers folder with the same weights
    evaluation: Path
    threads: int
    decisions: int
    images: int
    answers: int  # of the daemon, whose share in an image is small beside the weather
    starts: int  # fresh processes
    cancellations: int
    unloads: int  # of the daemon's models
    full_size: Path  # where the models of full size are kept, or will be
    full_size_pairs: int

    @classmethod
    def of(cls, bundle: Path, model: Path, evaluation: Path, full_size: Path, *, quick: bool) -> Plan:
        """`quick` measures so little that only the machinery is tried."""
        decisions, images, answers, starts = (24, 3, 3, 1) if quick else (600, 30, 90, 5)
        cancellations, unloads, pairs = (40, 2, 1) if quick else (1000, 200, 3)
        return cls(
            bundle,
            model,
            evaluation,
            cores(),
            decisions,
            images,
            answers,
            starts,
            cancellations,
            unloads,
            full_size,
            pairs,
        )


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
