"""What a run of the benchmark measures, and how often."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.diffusion.providers import CPU, QUICK_TO_OPEN

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
    full_size: Path  # where the models of full size are kept, or will be
    threads: int
    providers: str = CPU  # what ours runs on, as `edge-agent serve --providers` takes it
    decisions: int = 600
    images: int = 30
    answers: int = 90  # of the daemon, whose share in an image is small beside the weather
    starts: int = 5  # fresh processes
    cancellations: int = 1000
    unloads: int = 200  # of the daemon's models
    full_size_pairs: int = 3
    attention_pixels: tuple[int, ...] = (512, 768)  # of a side
    full_size_cancellations: int = 30  # on another provider than the CPU, which takes too long

    @property
    def quick(self) -> Plan:
        """The same with so few of all that only the machinery is tried."""
        return replace(
            self,
            decisions=24,
            images=3,
            answers=3,
            starts=1,
            cancellations=40,
            unloads=2,
            full_size_pairs=1,
            attention_pixels=(64,),
            full_size_cancellations=3,
        )

    @property
    def on_cpu(self) -> bool:
        """Whether ours runs on nothing else, as that of everybody whom it is compared with."""
        return self.providers == CPU

    @property
    def on_cuda(self) -> bool:
        """Whether ours runs where torch and optimum can, too."""
        return self.providers.split(",")[0] in ("cuda", "tensorrt")

    @property
    def compiled(self) -> bool:
        """Whether ours is compiled first, for one image of the default size."""
        return self.providers.split(",")[0] not in QUICK_TO_OPEN


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
