"""What sets the edge and the cloud model apart: capacity and steps, nothing else.

Three more, the sketches, are of several sizes and trained only a little. What they get wrong teaches the judge
(`sketch.py`); nobody is served their pictures.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """One model's shape and recipe."""

    name: str
    text: str  # the stage whose text encoder it has
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


# The edge's is so small because with 3.1 million weights, after nine minutes on an H200, it draws all of this world.
EDGE = Size("edge", "edge-text", (16, 32, 64), (1, 2, 4), 128, 2, 4, 2.0, 2300, 512, 1.2e-3, 11)
CLOUD = Size("cloud", "cloud-text", (64, 128, 256), (2, 4, 8), 160, 3, 8, 2.0, 1000, 1024, 1e-3, 12)
SKETCHES = (
    Size("sketch", "edge-text", (32, 64, 128), (1, 2, 4), 128, 2, 4, 3.0, 500, 128, 1.2e-3, 13),
    Size("sketch-small", "edge-text", (16, 32, 64), (1, 2, 4), 128, 2, 4, 2.0, 1200, 256, 1.2e-3, 14),
    Size("sketch-large", "edge-text", (48, 96, 192), (1, 2, 4), 128, 2, 4, 3.0, 300, 256, 1.2e-3, 15),
)
