"""What generators get wrong, for the judge to learn from: pictures repainted by models that have hardly been trained.

Blurs and veils can be made by rule; a cat that is nearly one cannot. So each picture is noised up to some strength and
painted anew from there (SDEdit, arXiv 2108.01073) by one of the sketches, models at a fraction of their training: what
is where stays, the objects come out malformed. What is wrong with them is measured (`faults.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from export.output import replacing
from export.starter.autoencoder import pixels
from export.starter.damage import render_samples
from export.starter.faults import Shown, faults
from export.starter.size import SKETCHES
from export.starter.training import made_ahead, needed
from export.starter.world import Scene, caption, sample_scenes

NUMBER, SEED = 40_000, 61  # pictures of the judge's split
BATCH = 200  # of one strength, by one model
STRENGTH = (0.4, 0.95)  # share of the noise schedule that is gone through again
STEPS = 8  # of the whole schedule
SHOWN = ("picture", "twin", "empty", "sprites")  # of a sample


@dataclass(frozen=True)
class Sketches:
    """N scenes, each as it should look and as a sketch paints it. Both have been through the autoencoder."""

    scenes: list[Scene]
    pictures: np.ndarray
    """uint8 [N, 64, 64, 3]"""
    sketched: np.ndarray
    """uint8 [N, 64, 64, 3]"""
    harm: np.ndarray
    """float32 [N, M], 0 to 1: how far each metric's fault goes (`faults.py`)."""


def sketches(work: Path) -> Sketches:
    """Paint NUMBER of them, or read what was painted before: ``work/sketch/sketches-NUMBER.npz``.

    Raises ExportError when a model is not trained yet.
    """
    for size in SKETCHES:
        needed(work, size.name, "sketch")
    file = work / "sketch" / f"sketches-{NUMBER}.npz"
    if not file.exists():
        arrays = _painted(work, sample_scenes("judge", NUMBER, SEED))
        with replacing(file) as partial:
            np.savez(partial, **arrays)
    with np.load(file) as kept:
        scenes = sample_scenes("judge", len(kept["harm"]), SEED)
        return Sketches(scenes, kept["pictures"], kept["sketched"], kept["harm"])


def paint(work: Path) -> int:
    """What the stage does once its models are trained: the command's exit code, 0."""
    sketches(work)
    return 0


def _painted(work: Path, scenes: list[Scene]) -> dict[str, np.ndarray]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipelines = [_opened(work / size.name / "model", device) for size in SKETCHES]

    def rendered(start: int) -> tuple[dict[str, np.ndarray], list[str], float]:
        rng = np.random.default_rng((SEED, start))
        samples = render_samples(scenes[start : start + BATCH], rng)
        captions = [caption(scene, rng) for scene in scenes[start : start + BATCH]]
        arrays = {name: np.stack([getattr(s, name) for s in samples]) for name in SHOWN}
        return arrays, captions, float(rng.uniform(*STRENGTH))

    parts: dict[str, list[np.ndarray]] = {"pictures": [], "sketched": [], "harm": []}
    starts = range(0, len(scenes), BATCH)
    for number, (arrays, captions, strength) in enumerate(made_ahead(rendered, starts)):
        pipeline, size = pipelines[number % len(SKETCHES)], SKETCHES[number % len(SKETCHES)]
        with torch.inference_mode():
            seen = {
                name: pipeline.vae(pixels(arrays[name], device)).sample.clamp(-1, 1) / 2 + 0.5
                for name in ("picture", "twin", "empty")
            }
        painted = pipeline(
            captions,
            image=pixels(arrays["picture"], device) / 2 + 0.5,
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=size.guidance_scale,
            generator=torch.Generator(device).manual_seed(number),
            output_type="pt",
        ).images
        sprites = torch.from_numpy(arrays["sprites"]).to(device).long()
        shown = Shown(seen["picture"], seen["twin"], seen["empty"], sprites)
        parts["pictures"].append(_uint8(shown.pictures))
        parts["sketched"].append(_uint8(painted))
        parts["harm"].append(faults(shown, painted).cpu().numpy())
        if number % 20 == 0:
            print(f"sketches: {number * BATCH}/{len(scenes)}", flush=True)
    return {name: np.concatenate(part) for name, part in parts.items()}


def _opened(model: Path, device: torch.device) -> StableDiffusionImg2ImgPipeline:
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(
        model, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _uint8(pictures: torch.Tensor) -> np.ndarray:
    """Pictures, float [N, 3, H, W] in [0, 1], as uint8 [N, H, W, 3]."""
    return (pictures.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
