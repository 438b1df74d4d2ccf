"""What a generator gets wrong, for the judge to learn from: pictures repainted by a model that has hardly been trained.

Blurs and veils can be made by rule; a cat that is nearly one cannot. So each picture is noised up to some strength and
painted anew from there (SDEdit, arXiv 2108.01073) by the sketch, a model at a fraction of its training: what is where
stays, the objects come out malformed. How malformed is measured where the objects are: how far they have gone
from what they were, on the way to other objects altogether.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from export.errors import ExportError
from export.starter.autoencoder import pixels
from export.starter.damage import Sample, render_samples
from export.starter.size import SKETCH
from export.starter.training import made_ahead
from export.starter.world import Scene, caption, sample_scenes

NUMBER, SEED = 8000, 61  # pictures of the judge's split
BATCH = 100  # of one strength
STRENGTH = (0.4, 0.95)  # share of the noise schedule that is gone through again
STEPS = 8  # of the whole schedule
# Share of the way to other objects. Up to the first an eye sees no difference, from the second on it names no object.
HARMLESS, RUINED = 0.1, 0.6


@dataclass(frozen=True)
class Sketches:
    """N scenes, each as it should look and as the sketch paints it. Both have been through the autoencoder."""

    scenes: list[Scene]
    pictures: np.ndarray
    """uint8 [N, 64, 64, 3]"""
    sketched: np.ndarray
    """uint8 [N, 64, 64, 3]"""
    harm: np.ndarray
    """float32 [N], 0 to 1: how malformed the objects are."""


def sketches(work: Path) -> Sketches:
    """Paint NUMBER of them, or read what was painted before: ``work/sketch/sketches.npz``.

    Raises ExportError when the sketch is not trained yet.
    """
    if not (work / SKETCH.name / "record.json").exists():
        raise ExportError(f"no sketch in {work}: run `edge-export starter sketch --work {work}`")
    file = work / SKETCH.name / "sketches.npz"
    if not file.exists():
        arrays = _painted(work / SKETCH.name / "model", sample_scenes("judge", NUMBER, SEED))
        partial = file.with_suffix(".partial")
        with partial.open("wb") as opened:
            np.savez(opened, **arrays)
        partial.replace(file)
    with np.load(file) as kept:
        scenes = sample_scenes("judge", len(kept["harm"]), SEED)
        return Sketches(scenes, kept["pictures"], kept["sketched"], kept["harm"])


def _painted(model: Path, scenes: list[Scene]) -> dict[str, np.ndarray]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(
        model, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def rendered(start: int) -> tuple[list[Sample], list[str], float]:
        rng = np.random.default_rng((SEED, start))
        samples = render_samples(scenes[start : start + BATCH], rng)
        captions = [caption(scene, rng) for scene in scenes[start : start + BATCH]]
        return samples, captions, float(rng.uniform(*STRENGTH))

    parts: dict[str, list[np.ndarray]] = {"pictures": [], "sketched": [], "harm": []}
    starts = range(0, len(scenes), BATCH)
    for start, (samples, captions, strength) in zip(starts, made_ahead(rendered, starts), strict=True):
        originals = pixels(np.stack([sample.picture for sample in samples]), device)
        with torch.inference_mode():
            seen = pipeline.vae(originals).sample.clamp(-1, 1)
        painted = pipeline(
            captions,
            image=(originals + 1) / 2,
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=SKETCH.guidance_scale,
            generator=torch.Generator(device).manual_seed(start),
            output_type="np",
        ).images
        pictures = ((seen.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
        sketched = (painted * 255).round().astype(np.uint8)
        parts["pictures"].append(pictures)
        parts["sketched"].append(sketched)
        parts["harm"].append(_harm(samples, pictures, sketched))
        if start % (20 * BATCH) == 0:
            print(f"sketches: {start}/{len(scenes)}", flush=True)
    return {name: np.concatenate(part) for name, part in parts.items()}


def _harm(samples: list[Sample], pictures: np.ndarray, sketched: np.ndarray) -> np.ndarray:
    harm = []
    for sample, picture, painted in zip(samples, pictures, sketched, strict=True):
        there = sample.objects
        gone, other = (
            float(np.abs(picture[there].astype(np.float32) - changed[there]).mean())
            for changed in (painted, sample.twin)
        )
        harm.append((gone / max(other, 1.0) - HARMLESS) / (RUINED - HARMLESS))
    return np.clip(np.array(harm, np.float32), 0, 1)
