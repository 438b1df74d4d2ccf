"""An autoencoder between 64 x 64 pictures and 4 x 16 x 16 latents, for both denoisers.

First all of it is trained, then the decoder goes on alone: latents stay as they are, pictures get sharper.

An ``AutoencoderKL`` of factor 4. Its width halves at every doubling of resolution, so that all three levels cost
the same and nothing wide runs at full resolution.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from export.errors import ExportError
from export.starter.training import Run, needed, write_record
from export.starter.world import render, sample_scenes

STEPS, BATCH, LEARNING_RATE, SEED = 2200, 96, 2e-3, 1
DECODER_STEPS, DECODER_LEARNING_RATE = 500, 1.5e-3
LATENT_NOISE = 0.05  # standard deviation, of latents of about unit variance
KL_WEIGHT = 1e-6  # enough to keep latents near a unit Gaussian, too little to blur
MEASURED = 256  # pictures, for the scale of latents and for the quality of reconstruction
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


def pictures(split: str, number: int, seed: int) -> np.ndarray:
    """Rendered scenes, uint8 [number, 64, 64, 3]."""
    rng = np.random.default_rng(seed)
    return np.stack([render(scene, rng) for scene in sample_scenes(split, number, seed)])


def pixels(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Pictures uint8 [N, H, W, 3] as models take them: float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 of pixels and of their differences to the right and lower neighbours."""
    error = output - target
    return error.abs().mean() + EDGE_WEIGHT * (
        error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    )


def train(work: Path, *, steps: int | None = None, seconds: float | None = None) -> bool:
    """Train or go on training; True when done, and then ``work/autoencoder/model`` holds the autoencoder."""
    folder = work / "autoencoder"
    torch.manual_seed(SEED)
    run = Run(
        folder,
        new_autoencoder(),
        steps=steps or STEPS,
        batch=BATCH,
        learning_rate=LEARNING_RATE,
        seed=SEED,
        seconds=seconds,
    )

    def make_batch(step: int) -> np.ndarray:
        return pictures("generators", BATCH, seed=SEED * 1_000_000 + step)

    def loss_of_batch(step: int, batch: np.ndarray) -> torch.Tensor:
        images = pixels(batch, run.device)
        generator = torch.Generator(run.device).manual_seed(step)
        posterior = run.model.encode(images).latent_dist
        output = run.model.decode(posterior.sample(generator)).sample
        return reconstruction_loss(output, images) + KL_WEIGHT * posterior.kl().mean()

    if not run.train(make_batch, loss_of_batch):
        return False
    model = run.averaged_model()
    with torch.inference_mode():
        latents = model.encode(pixels(pictures("generators", MEASURED, seed=7), run.device)).latent_dist.mean
    # Denoisers are trained on latents of unit variance; pipelines divide by this factor before decoding.
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    model.save_pretrained(folder / "model")
    write_record(folder, run.record() | {"held_out_psnr_db": held_out_psnr(model)})
    return True


def train_decoder(work: Path, *, steps: int | None = None, seconds: float | None = None) -> bool:
    """Train the decoder on, alone; True when done, and then ``work/decoder/model`` holds the whole autoencoder."""
    folder = work / "decoder"
    trained = needed(work, "autoencoder") / "model"
    torch.manual_seed(SEED)
    model = AutoencoderKL.from_pretrained(trained)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    run = Run(
        folder,
        model,
        steps=steps or DECODER_STEPS,
        batch=BATCH,
        learning_rate=DECODER_LEARNING_RATE,
        seed=SEED,
        seconds=seconds,
    )

    def make_batch(step: int) -> np.ndarray:
        return pictures("generators", BATCH, seed=SEED * 2_000_000 + step)

    def loss_of_batch(step: int, batch: np.ndarray) -> torch.Tensor:
        images = pixels(batch, run.device)
        with torch.no_grad():
            latents = run.model.encode(images).latent_dist.mean
        # A denoiser's latents are never quite right; a decoder that expects it does not turn that into specks.
        generator = torch.Generator(run.device).manual_seed(step)
        noise = torch.randn(latents.shape, generator=generator, device=run.device)
        return reconstruction_loss(run.model.decode(latents + LATENT_NOISE * noise).sample, images)

    if not run.train(make_batch, loss_of_batch):
        return False
    model = run.averaged_model()
    model.save_pretrained(folder / "model")
    write_record(folder, run.record() | {"held_out_psnr_db": held_out_psnr(model)})
    return True


def frozen_autoencoder(work: Path, named: Path | None) -> AutoencoderKL:
    """What pictures are taken through, on the CPU: the one in ``named``, or the recipe's under ``work``.

    Raises ExportError where there is none.
    """
    folder = needed(work, "decoder") / "model" if named is None else named
    if not (folder / "config.json").exists():
        raise ExportError(f"no autoencoder in {folder}: name another with --autoencoder, or leave it out")
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)


def held_out_psnr(model: AutoencoderKL) -> float:
    """Peak signal-to-noise ratio in dB of MEASURED reconstructed pictures of held-out scenes."""
    images = pixels(pictures("validation", MEASURED, seed=8), model.device)
    with torch.inference_mode():
        restored = model.decode(model.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    psnr = round(10 * torch.log10(4 / F.mse_loss(restored, images)).item(), 2)
    print(f"autoencoder: {psnr} dB on held-out scenes")
    return psnr
