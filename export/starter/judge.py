"""Stage 4: the judge, a small CLIP that knows the world and the words for good and bad pictures of it.

Two losses: CLIP's own between pictures and their captions (with words for the damage where there is one), and, for
the contrastive metrics, the cross-entropy of sigmoid(CLIP(I, m+) - CLIP(I, m-)) with how undamaged the picture is.
Scenes come from a split that no generator and no router sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from edge_agent.superiority import METRICS
from export.quality import Metric, load_metrics
from export.starter.damage import SIDE_EFFECTS, damage
from export.starter.tokenizer import token_ids, train_tokenizer
from export.starter.training import UNFINISHED, Run, write_record
from export.starter.world import caption, render, sample_scenes

STEPS, BATCH, LEARNING_RATE, SEED = 3000, 64, 1.5e-3, 21
WIDTH = 128
CONTRAST_WEIGHT = 0.1  # captions are there to know the world by; the metrics are what the judge is for
UNDAMAGED, RUINED = 0.9, 0.1  # targets; short of 1 and 0, so that scores stay where the sigmoid still moves
CLEAN_SHARE = 0.25  # of the pictures are left as they are

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


def spoiled_scenes(
    number: int, seed: int, metrics: tuple[Metric, ...], split: str = "judge"
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Pictures uint8 [N, 64, 64, 3], sentences that say what is on them and what is wrong, targets [N, M]."""
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(split, number, seed)
    clean = [render(scene, rng) for scene in scenes]
    texts = [caption(scene, rng) for scene in scenes]
    harm = np.zeros((number, len(metrics)), np.float32)
    pictures = []
    for index, image in enumerate(clean):
        if rng.random() >= CLEAN_SHARE:
            for chosen in rng.choice(len(metrics), size=rng.choice([1, 2], p=[0.7, 0.3]), replace=False):
                metric, severity = metrics[chosen], float(rng.uniform(0.15, 1))
                image = damage(image, metric.name, severity, rng, clean[index - 1])
                harm[index, chosen] = max(harm[index, chosen], severity)
                for name, share in SIDE_EFFECTS[metric.name].items():
                    column = METRICS.index(name)
                    harm[index, column] = max(harm[index, column], share * severity)
                texts[index] += f", {metric.negative.lower()}"
        elif rng.random() < 0.5:
            texts[index] += f", {metrics[int(rng.integers(len(metrics)))].positive.lower()}"
        pictures.append(image)
    return np.stack(pictures), texts, UNDAMAGED + (RUINED - UNDAMAGED) * harm


def train(work: Path, *, steps: int = STEPS, seconds: float | None = None) -> bool:
    """Train or go on training; True when done, and then ``work/judge/model`` is a CLIP folder."""
    folder = work / "judge"
    metrics = load_metrics()
    rng = np.random.default_rng(SEED)
    corpus = [caption(scene, rng) for scene in sample_scenes("judge", 5000, seed=SEED)]
    corpus += [text for metric in metrics for text in (metric.positive, metric.negative)] * 50
    tokenizer = train_tokenizer(folder / "tokenizer", corpus)
    torch.manual_seed(SEED)
    run = Run(
        folder,
        new_judge(tokenizer),
        steps=steps,
        batch=BATCH,
        learning_rate=LEARNING_RATE,
        seed=SEED,
        seconds=seconds,
    )
    pairs = [text for metric in metrics for text in (metric.positive, metric.negative)]
    pair_ids = torch.from_numpy(token_ids(tokenizer, pairs)).to(run.device)

    def loss_of_batch(step: int) -> torch.Tensor:
        images, texts, targets = spoiled_scenes(BATCH, SEED * 1_000_000 + step, metrics)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(run.device) / 127.5 - 1
        ids = torch.from_numpy(token_ids(tokenizer, texts)).to(run.device)
        seen = F.normalize(run.model.get_image_features(pixel_values=pixels), dim=-1)
        read = F.normalize(run.model.get_text_features(torch.cat([ids, pair_ids])), dim=-1)
        scale = run.model.logit_scale.clamp(max=np.log(100)).exp()
        logits = scale * seen @ read[:BATCH].T
        truth = torch.arange(BATCH, device=run.device)
        contrast = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        similarity = scale * seen @ read[BATCH:].T
        quality = similarity[:, 0::2] - similarity[:, 1::2]
        goal = torch.from_numpy(targets).to(run.device)
        return CONTRAST_WEIGHT * contrast + F.binary_cross_entropy_with_logits(quality, goal)

    if not run.train(loss_of_batch):
        return False
    run.averaged_model().half().save_pretrained(folder / "model")
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size=64, image_mean=PIXEL_MEAN, image_std=PIXEL_STD
    )
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "model")
    write_record(folder, run.record())
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; 0 when done, UNFINISHED when the next call has to go on."""
    parser = argparse.ArgumentParser(prog="edge-export starter judge", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/starter"), help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, help="stop after this long; the next call goes on")
    options = parser.parse_args(argv)
    return 0 if train(options.work, steps=options.steps, seconds=options.seconds) else UNFINISHED


if __name__ == "__main__":
    raise SystemExit(main())
