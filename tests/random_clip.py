"""A CLIP of random weights, too small to know anything, with a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from export.starter.tokenizer import train_tokenizer

SIDE = 96  # pixels; the starter's judge takes 64


def save_clip(
    folder: Path, *, side: int = SIDE, processed: int | None = None, tokens: int = 24, seed: int = 0
) -> Path:
    """Writes one for pictures of `side` pixels and texts of `tokens`, whose processor makes pictures of `processed` (of
    the same `side` by default), and returns `folder`.
    """
    tokenizer = train_tokenizer(folder / "own", ["a photo of the sea", "sharp", "blurry"] * 4)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokens,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"image_size": side, "patch_size": 16}
    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    made = processed or side
    images = CLIPImageProcessor(size={"shortest_edge": made}, crop_size=made)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder
