"""What sets the edge and the cloud model apart: capacity, steps and guidance, nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """One model's shape and recipe."""

    name: str
    channels: tuple[int, int, int]  # of the UNet at 16 x 16, 8 x 8 and 4 x 4
    heads: tuple[int, int, int]
    text_width: int
    text_layers: int
    inference_steps: int
    guidance_scale: float
    training_steps: int
    batch: int
    learning_rate: float
    seed: int


EDGE = Size("edge", (32, 64, 128), (1, 2, 4), 128, 2, 4, 3.0, 3000, 32, 1.5e-3, 11)
CLOUD = Size("cloud", (64, 128, 256), (2, 4, 8), 160, 3, 20, 4.0, 3000, 32, 1.2e-3, 12)
SIZES = {size.name: size for size in (EDGE, CLOUD)}
