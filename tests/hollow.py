"""Bundles whose graphs are random bytes: whole by their manifest, quickly made, and nothing that runs."""

from __future__ import annotations

import random
from pathlib import Path

from edge_agent.bundle import write_manifest
from edge_agent.manifest import DECODER, DENOISER, TEXT_ENCODER, TOKENIZER, schedule_file

SIZES = {
    DENOISER: 1_500_000,
    TEXT_ENCODER: 300_000,
    DECODER: 200_000,
    TOKENIZER: 5_000,
    schedule_file(4): 700,
}
EMPTY = "tokenizer/added.json"


def hollow_bundle(folder: Path, seed: int = 0, name: str = "hollow") -> Path:
    """Writes the bundle and returns its folder."""
    bytes_of = random.Random(seed).randbytes
    for path, size in {**SIZES, EMPTY: 0}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(bytes_of(size))
    facts = {"name": name, "licence": "Apache-2.0", "width": 64, "height": 64, "latent_channels": 4}
    facts |= {"latent_height": 8, "latent_width": 8, "latent_scaling": 0.18, "latent_shift": 0.0}
    facts |= {"default_steps": 4, "default_guidance": 5.0, "steps": [4], "text_tokens": 77, "text_hidden": 32}
    write_manifest(folder, **facts, text_output="last_hidden_state")
    return folder
