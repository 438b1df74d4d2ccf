"""The judge, a small CLIP that knows the world and the words for good and bad pictures of it.

It sees every scene twice, as it is and spoiled, and learns from four losses. For the contrastive metrics, the
cross-entropy of sigmoid(CLIP(I, m+) - CLIP(I, m-)) with how undamaged the picture is, and how far the spoiled picture's
CLIP(I, m+) - CLIP(I, m-) lies below its original's: what scenes differ in beside the damage cancels there. To know the
world by, CLIP's own between pictures and their captions (with words for the damage where there is one), and whether an
undamaged picture is more like its caption than like the same sentence with one thing wrong.
Of most scenes the spoiled picture is a sketch, a generator's own failure (`sketch.py`), since generated pictures are
what is measured later. Half of the others, which are damaged by rule, are taken through the autoencoder, both
pictures alike, as what the models paint comes out of it. Scenes come from a split that no generator and no router
sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPTokenizerFast,
)

from edge_agent.superiority import METRICS
from export.metrics import Metric, load_metrics
from export.negatives import hard_negatives
from export.starter.autoencoder import frozen_autoencoder, pixels
from export.starter.damage import SIDE_EFFECTS, Sample, damage, render_samples
from export.starter.sketch import Sketches, sketches
from export.starter.tokenizer import token_ids, train_tokenizer
from export.starter.training import Run, write_record
from export.starter.world import caption, sample_scenes

STEPS, LEARNING_RATE, SEED = 6000, 1.5e-3, 21
RULED, SKETCHED = 64, 96  # scenes of a step whose spoiled picture was damaged by rule, and is a sketch
BATCH = 2 * (RULED + SKETCHED)
BLAMED, FAULTS = 0.25, 2  # of a sketch, its worst faults are named, from how bad on and how many at most
WIDTH = 128
CONTRAST_WEIGHT = ADHERENCE_WEIGHT = 0.1  # captions are there to know the world by; metrics are its purpose
PAIR_WEIGHT = 0.3
RESTORED = 0.5  # share of the scenes damaged by rule that are taken through the autoencoder
LATENT_NOISE = 0.2  # largest standard deviation put on their latents, of their own
UNDAMAGED, RUINED = 0.9, 0.1  # targets; short of 1 and 0, so that scores stay where the sigmoid still moves

# CLIP's own normalisation is for photographs; the world's pictures are centred on grey.
PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)


def new_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Random weights; seed torch before."""
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    text = tower | {
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


@dataclass(frozen=True)
class Batch:
    """N scenes: the first N pictures and texts are of them undamaged, the others of the same ones spoiled."""

    pictures: np.ndarray
    """uint8 [2 N, 64, 64, 3]"""
    texts: list[str]
    """What is on each picture and, of the spoiled, what is wrong with it."""
    wrong: list[str]
    """N sentences that are wrong about the undamaged pictures in one thing."""
    targets: np.ndarray
    """float32 [2 N, M]: what each metric should be."""


def make_batch(
    ruled: int,
    seed: int,
    metrics: tuple[Metric, ...],
    sketched: int = 0,
    painted: Sketches | None = None,
) -> Batch:
    """``ruled`` scenes, each undamaged and spoiled in one or two ways, and then ``sketched`` of those ``painted``."""
    rng = np.random.default_rng(seed)
    scenes = sample_scenes("judge", ruled, seed)
    samples = render_samples(scenes, rng)
    undamaged = [sample.picture for sample in samples]
    spoiled, harm, blamed = [], [], []
    for sample in samples:
        after, faults = _spoiled(sample, rng)
        spoiled.append(after)
        harm.append(_harm_of(faults))
        blamed.append(list(faults))
    if painted is not None:
        for place in rng.integers(len(painted.scenes), size=sketched).tolist():
            scenes.append(painted.scenes[place])
            undamaged.append(painted.pictures[place])
            spoiled.append(painted.sketched[place])
            harm.append(painted.harm[place])
            worst = np.argsort(-harm[-1], kind="stable")[:FAULTS]
            blamed.append([METRICS[column] for column in worst if harm[-1][column] >= BLAMED])
    captions = [caption(scene, rng) for scene in scenes]
    wrong = []
    for scene, text in zip(scenes, captions, strict=True):
        negatives = hard_negatives(text, scene)
        wrong.append(negatives[int(rng.integers(len(negatives)))].text)
    said = {metric.name: metric.negative.lower() for metric in metrics}
    texts = [", ".join([text, *map(said.get, names)]) for text, names in zip(captions, blamed, strict=True)]
    targets = np.concatenate([np.zeros((len(scenes), len(METRICS)), np.float32), np.stack(harm)])
    return Batch(
        np.stack(undamaged + spoiled), captions + texts, wrong, UNDAMAGED + (RUINED - UNDAMAGED) * targets
    )


def _harm_of(faults: dict[str, float]) -> np.ndarray:
    """float32 [M]: what damages of these severities do to each metric."""
    harm = np.zeros(len(METRICS), np.float32)
    for name, severity in faults.items():
        for beside, share in {name: 1.0, **SIDE_EFFECTS[name]}.items():
            column = METRICS.index(beside)
            harm[column] = max(harm[column], share * severity)
    return harm


def _spoiled(sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, float]]:
    """The picture damaged by rule, and the severity by metric."""
    chosen = rng.choice(len(METRICS), size=rng.choice([1, 2], p=[0.7, 0.3]), replace=False)
    faults: dict[str, float] = {}
    # The last first: what paints with other pictures goes before what fades or blurs the whole.
    for name in (METRICS[column] for column in sorted(chosen, reverse=True)):
        faults[name] = float(rng.uniform(0.15, 1))
        sample = replace(sample, picture=damage(sample, name, faults[name], rng))
    return sample.picture, faults


def restored(
    pixels: torch.Tensor, ruled: int, autoencoder: AutoencoderKL, rng: np.random.Generator
) -> torch.Tensor:
    """Pixels [2 N, 3, H, W] in [-1, 1], some of the first ``ruled`` of the N scenes taken through the autoencoder.

    With noise on the latents, the same for the undamaged and the spoiled picture, so that what differs is the damage.
    """
    number = len(pixels) // 2
    scenes = np.flatnonzero(rng.random(ruled) < RESTORED)
    if not scenes.size:
        return pixels
    rows = torch.from_numpy(np.concatenate([scenes, scenes + number])).to(pixels.device)
    with torch.no_grad():
        latents = autoencoder.encode(pixels[rows]).latent_dist.mean
        strength = rng.uniform(0, LATENT_NOISE, size=(len(scenes), 1, 1, 1))
        noise = torch.from_numpy(strength * rng.standard_normal((len(scenes), *latents.shape[1:]))).to(
            latents
        )
        seen = autoencoder.decode(latents + latents.std() * noise.repeat(2, 1, 1, 1)).sample.clamp(-1, 1)
    return pixels.index_copy(0, rows, seen)


def train(
    work: Path, *, autoencoder: Path | None = None, steps: int | None = None, seconds: float | None = None
) -> bool:
    """Train or go on training; True when done, and then ``work/judge/model`` is a CLIP folder.

    ``autoencoder`` is the one pictures are taken through (default: the recipe's, ``work/decoder/model``).
    """
    folder = work / "judge"
    restorer, painted = frozen_autoencoder(work, autoencoder), sketches(work)
    metrics = load_metrics()
    pairs = [text for metric in metrics for text in (metric.positive, metric.negative)]
    rng = np.random.default_rng(SEED)
    corpus = [caption(scene, rng) for scene in sample_scenes("judge", 5000, seed=SEED)] + 50 * pairs
    tokenizer = train_tokenizer(folder / "tokenizer", corpus)
    torch.manual_seed(SEED)
    run = Run(
        folder,
        new_judge(tokenizer),
        steps=steps or STEPS,
        batch=BATCH,
        learning_rate=LEARNING_RATE,
        seed=SEED,
        seconds=seconds,
    )
    restorer.to(run.device)
    fast = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")

    def batch_of(step: int) -> tuple[np.ndarray, ...]:
        """Pictures [B, 64, 64, 3], targets [B, M], token ids [B + B / 2 + 2 M, L] of all texts."""
        batch = make_batch(RULED, SEED * 1_000_000 + step, metrics, SKETCHED, painted)
        ids = token_ids(fast, [*batch.texts, *batch.wrong, *pairs])
        length = int((ids != tokenizer.eos_token_id).sum(axis=1).max()) + 1  # the rest is padding
        return batch.pictures, batch.targets, ids[:, :length]

    def loss_of_batch(step: int, batch: tuple[np.ndarray, ...]) -> torch.Tensor:
        pictures, *others = batch
        goal, ids = (torch.from_numpy(part).to(run.device) for part in others)
        shown = restored(pixels(pictures, run.device), RULED, restorer, np.random.default_rng((SEED, step)))
        seen = F.normalize(run.model.get_image_features(pixel_values=shown), dim=-1)
        read = F.normalize(run.model.get_text_features(ids), dim=-1)
        own, wrong, praised_or_blamed = read.split([BATCH, BATCH // 2, len(pairs)])
        scale = run.model.logit_scale.clamp(max=np.log(100)).exp()

        logits = scale * seen @ own.T
        truth = torch.arange(BATCH, device=run.device)
        contrast = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        undamaged, spoiled = slice(0, BATCH // 2), slice(BATCH // 2, BATCH)
        closer = scale * (seen[undamaged] * (own[undamaged] - wrong)).sum(dim=-1)

        quality = scale * seen @ (praised_or_blamed[0::2] - praised_or_blamed[1::2]).T
        fall = quality[undamaged] - quality[spoiled]
        return (
            F.binary_cross_entropy_with_logits(quality, goal)
            + PAIR_WEIGHT * F.smooth_l1_loss(fall, goal[undamaged].logit() - goal[spoiled].logit())
            + CONTRAST_WEIGHT * contrast
            + ADHERENCE_WEIGHT * F.softplus(-closer).mean()
        )

    if not run.train(batch_of, loss_of_batch):
        return False
    run.averaged_model().half().save_pretrained(folder / "model")
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size=64, image_mean=PIXEL_MEAN, image_std=PIXEL_STD
    )
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "model")
    write_record(folder, run.record())
    return True
