"""Stage 1: an autoencoder between 64 x 64 pictures and 4 x 16 x 16 latents, for both denoisers.

An ``AutoencoderKL`` of factor 4. Its width halves at every doubling of resolution, so that all three levels cost
the same and nothing wide runs at full resolution.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from export.starter.training import UNFINISHED, Run, write_record
from export.starter.world import render, sample_scenes

STEPS, BATCH, LEARNING_RATE, SEED = 2100, 32, 2e-3, 1
KL_WEIGHT = 1e-6  # enough to keep latents near a unit Gaussian, too little to blur
EDGE_WEIGHT = 1.0  # of the difference between neighbouring pixels: sharp outlines are what makes an emoji


def new_autoencoder() -> AutoencoderKL:
    """Random weights; seed torch before."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def pictures(split: str, number: int, seed: int) -> torch.Tensor:
    """Rendered scenes as float32 [number, 3, 64, 64] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    stack = np.stack([render(scene, rng) for scene in sample_scenes(split, number, seed)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 of pixels and of their differences to the right and lower neighbours."""
    error = output - target
    return error.abs().mean() + EDGE_WEIGHT * (
        error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    )


def train(folder: Path, *, steps: int = STEPS, seconds: float | None = None) -> bool:
    """Train or go on training; True when done, and then ``folder/model`` holds the autoencoder."""
    torch.manual_seed(SEED)
    run = Run(
        folder,
        new_autoencoder(),
        steps=steps,
        batch=BATCH,
        learning_rate=LEARNING_RATE,
        seed=SEED,
        seconds=seconds,
    )

    def loss_of_batch(step: int) -> torch.Tensor:
        images = pictures("generators", BATCH, seed=SEED * 1_000_000 + step).to(run.device)
        generator = torch.Generator(run.device).manual_seed(step)
        posterior = run.model.encode(images).latent_dist
        output = run.model.decode(posterior.sample(generator)).sample
        return reconstruction_loss(output, images) + KL_WEIGHT * posterior.kl().mean()

    if not run.train(loss_of_batch):
        return False
    model = run.averaged_model()
    with torch.no_grad():
        images = pictures("generators", 256, seed=7).to(run.device)
        latents = model.encode(images).latent_dist.mean
        held_out = pictures("validation", 256, seed=8).to(run.device)
        restored = model.decode(model.encode(held_out).latent_dist.mean).sample.clamp(-1, 1)
    # Denoisers are trained on latents of unit variance; pipelines divide by this factor before decoding.
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    psnr = 10 * torch.log10(4 / F.mse_loss(restored, held_out)).item()
    print(f"autoencoder: {psnr:.2f} dB on held-out scenes")
    model.save_pretrained(folder / "model")
    write_record(folder, run.record() | {"held_out_psnr_db": round(psnr, 2)})
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; 0 when done, UNFINISHED when the next call has to go on."""
    parser = argparse.ArgumentParser(prog="edge-export starter autoencoder", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/starter"), help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, help="stop after this long; the next call goes on")
    options = parser.parse_args(argv)
    return (
        0 if train(options.work / "autoencoder", steps=options.steps, seconds=options.seconds) else UNFINISHED
    )


if __name__ == "__main__":
    raise SystemExit(main())
