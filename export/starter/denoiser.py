"""Two StableDiffusionPipelines that differ in size and steps, the edge and the cloud model, and the judge's sketches.

Both see the same scenes, the same captions and the same recipe. A tenth of the captions is dropped, so that
classifier-free guidance has its other half.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, CLIPTokenizerFast

from export.output import replacing
from export.pipeline import drop_origin
from export.starter.autoencoder import pixels
from export.starter.size import Size
from export.starter.tokenizer import token_ids
from export.starter.training import Run, made_ahead, needed, pickled, write_record
from export.starter.world import Scene, caption, render, sample_scenes

SCENES = 60_000  # of the generators' split, rendered and encoded once
CAPTION_DROPPED = 0.1
# Timesteps are drawn logit-normal (Esser et al., arXiv 2403.03206), a little towards noise: what a picture shows, and
# so whether it follows its caption, is decided where little of it can be seen yet.
TIMESTEP_MEAN, TIMESTEP_DEVIATION = 0.5, 1.0
FILE_LIMIT = "15MB"  # larger weights are written in shards


class Denoiser(nn.Module):
    """A UNet on top of a text encoder that can read already and stays as it is."""

    def __init__(self, size: Size, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder.requires_grad_(False)
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=size.channels,
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=size.text_width,
            attention_head_dim=size.heads,
        )

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predicted velocity [B, 4, 16, 16] of noisy latents at timesteps [B], under captions ids [B, L]."""
        with torch.no_grad():
            states = self.text_encoder(ids).last_hidden_state
        return self.unet(latents, timesteps, states).sample


def noise_schedule() -> dict[str, object]:
    """The forward process both models learn to undo; sampling starts from pure noise ("trailing")."""
    return {
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # takes no part in trailing spacing; diffusers asks for it all the same
    }


def encode_scenes(autoencoder: AutoencoderKL, scenes: list[Scene], file: Path, seed: int) -> torch.Tensor:
    """Latents of the scenes, scaled to unit variance: float16 [N, 4, 16, 16], kept in ``file``."""
    if file.exists():
        return torch.load(file, weights_only=True)

    def painted(start: int) -> np.ndarray:
        rng = np.random.default_rng((seed, start))
        return np.stack([render(scene, rng) for scene in scenes[start : start + 200]])

    parts: list[torch.Tensor] = []
    for images in made_ahead(painted, range(0, len(scenes), 200)):
        with torch.inference_mode():
            posterior = autoencoder.encode(pixels(images, autoencoder.device)).latent_dist
        parts.append((posterior.mean * autoencoder.config.scaling_factor).half().cpu())
        if len(parts) % 20 == 0:
            print(f"encoding scenes: {len(parts) * 200}/{len(scenes)}", flush=True)
    latents = torch.cat(parts)
    with replacing(file) as partial:  # the other model's run may be at it too
        partial.write_bytes(pickled(latents))
    return latents


def train(work: Path, size: Size, *, steps: int | None = None, seconds: float | None = None) -> bool:
    """Train or go on training ``size``; True when done, and then ``work/<name>/model`` holds the pipeline."""
    decoder, text_folder = needed(work, "decoder"), needed(work, size.text)
    folder = work / size.name
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder = AutoencoderKL.from_pretrained(decoder / "model").eval()
    if torch.cuda.is_available():
        autoencoder.to("cuda")
    tokenizer = CLIPTokenizer.from_pretrained(text_folder / "tokenizer")
    fast = CLIPTokenizerFast.from_pretrained(text_folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(text_folder / "model")
    scenes = sample_scenes("generators", SCENES, seed=3)
    latents = encode_scenes(autoencoder, scenes, decoder / f"latents-{SCENES}.pt", seed=4)

    torch.manual_seed(size.seed)
    run = Run(
        folder,
        Denoiser(size, text_encoder),
        steps=steps or size.training_steps,
        batch=size.batch,
        learning_rate=size.learning_rate,
        seed=size.seed,
        seconds=seconds,
    )
    latents = latents.to(run.device)
    scheduler = DDPMScheduler(**noise_schedule())

    def make_batch(step: int) -> tuple[np.ndarray, ...]:
        """Token ids [B, L], which scenes they are of [B], timesteps [B]."""
        rng = np.random.default_rng((size.seed, step))
        chosen = rng.integers(len(scenes), size=size.batch)
        texts = ["" if rng.random() < CAPTION_DROPPED else caption(scenes[i], rng) for i in chosen]
        drawn = rng.normal(TIMESTEP_MEAN, TIMESTEP_DEVIATION, size.batch)
        return token_ids(fast, texts), chosen, (1000 / (1 + np.exp(-drawn))).astype(np.int64)

    def loss_of_batch(step: int, batch: tuple[np.ndarray, ...]) -> torch.Tensor:
        ids, chosen, timesteps = (torch.from_numpy(part).to(run.device) for part in batch)
        clean = latents[chosen].float()
        generator = torch.Generator(run.device).manual_seed(size.seed * 10_000_000 + step)
        noise = torch.randn(clean.shape, generator=generator, device=run.device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"):
            predicted = run.model(noisy, timesteps, ids)
        return F.mse_loss(predicted.float(), target)

    done = run.train(make_batch, loss_of_batch)
    # A pipeline is written after every piece: an unfinished model can be looked at.
    write_pipeline(folder / "model", size, run, autoencoder, tokenizer)
    if done:
        write_record(folder, run.record())
    return done


def write_pipeline(
    folder: Path, size: Size, run: Run, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer
) -> None:
    """An ordinary diffusers pipeline in float16, and beside it the defaults the model is meant to run with."""
    trained = run.averaged_model()
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=trained.text_encoder,
        tokenizer=tokenizer,
        unet=trained.unet,
        scheduler=DPMSolverMultistepScheduler(**noise_schedule(), algorithm_type="dpmsolver++"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(partial, max_shard_size=FILE_LIMIT)
    drop_origin(partial)
    facts = {
        "name": f"routet2i-starter-{size.name}",
        "licence": "Apache-2.0",
        "width": 64,
        "height": 64,
        "sizes": [[64, 64]],
        "steps": size.inference_steps,
        "guidance_scale": size.guidance_scale,
    }
    (partial / "routet2i.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
