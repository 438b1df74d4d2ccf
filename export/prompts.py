"""The prompts a router learns from and is measured on: captions of scenes that no generator and no judge saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from export.starter.world import Scene, caption, sample_scene

PROMPTS = {"train": 2000, "validation": 150, "calibration": 250, "test": 250}
SEED = 31


@dataclass(frozen=True)
class Prompt:
    """One prompt and what is known of it beforehand."""

    prompt_id: int
    text: str
    split: str
    scene: Scene


def router_prompts(number: Mapping[str, int] = PROMPTS, seed: int = SEED) -> list[Prompt]:
    """``number`` distinct prompts a split. A larger number keeps the prompts of a smaller one, with their ids."""
    rng = np.random.default_rng(seed)
    prompts: list[Prompt] = []
    wanted = dict(number)
    texts: set[str] = set()
    drawn = 0
    while any(wanted.values()):
        scene = sample_scene(rng)
        text = caption(scene, rng)
        if scene.split not in number or text in texts:
            continue
        texts.add(text)
        drawn += 1
        if wanted[scene.split]:
            wanted[scene.split] -= 1
            prompts.append(Prompt(drawn, text, scene.split, scene))
    return prompts
