"""Tiny seeded pipelines of Stable Diffusion 1.5's shape: 77 tokens, cross-attention, guidance, an
autoencoder.

Random weights, made by code in a second. Everything that runs Stable Diffusion runs on them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

TOKENS = 77
HIDDEN = 32

# Enough merges that common words become one token, others several.
_WORDS = ("cat", "dog", "the", "and", "red", "beach", "moon", "two", "a", "on", "of")


def miniature_pipeline(
    seed: int = 0, size: int = 64, factor: int = 8, tokens: int = TOKENS
) -> StableDiffusionPipeline:
    """A pipeline for images of `size` pixels a side, whose autoencoder shrinks by `factor` (4 or 8)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = miniature_tokenizer(Path(folder), tokens)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=HIDDEN,
                intermediate_size=2 * HIDDEN,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokens,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=size // factor,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=HIDDEN,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        levels = {4: 3, 8: 4}[factor]
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(8, 8, 16, 16)[-levels:],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=4,
            sample_size=size,
        )
        _brighten(vae)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_miniature(folder: str | Path, seed: int = 0, size: int = 64) -> Path:
    """Write `miniature_pipeline(seed, size)` as a diffusers folder and return it."""
    miniature_pipeline(seed, size).save_pretrained(folder)
    return Path(folder)


def miniature_tokenizer(folder: Path, tokens: int = TOKENS) -> CLIPTokenizer:
    """A byte-level BPE of CLIP's kind: every byte, each again at a word's end, a few merges, start, end."""
    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            left, right = pieces[0], pieces[1]
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                vocabulary.append(left + right)
            pieces[:2] = [left + right]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=tokens)


def _brighten(vae: AutoencoderKL) -> None:
    """Random decoders give nearly one colour; a stronger last layer lets a test see differences."""
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(4.0)
