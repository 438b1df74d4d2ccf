"""A small world to learn routing in: prompts whose gap between edge and cloud depends on their words, and a bundle.

The bundle's tokenizer and text encoder are real, tiny and random; denoiser and decoder are placeholders, because no
stage of the predictor opens them.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from edge_agent import tokens
from edge_agent.bundle import Bundle, write_manifest
from edge_agent.superiority import METRICS
from export import tokenizer_json
from tests.miniature import miniature_tokenizer

TOKENS, WIDTH = 24, 32
HARD = {"dog": 1.0, "moon": 0.8, "two": 0.6}  # what the edge model finds hard, in logits of its quality
EASY = ("cat", "red", "beach", "a", "the")


def write_labels(path: Path, prompts: int, *, seeds: int = 2, facts: dict[str, str] | None = None) -> Path:
    """Labels of `prompts` prompts: half of them train, a sixth each of the other splits."""
    draw = np.random.default_rng(0)
    splits = ("train", "train", "train", "validation", "calibration", "test")
    rows = []
    drawn: dict[str, list[str]] = {}  # no prompt twice
    while len(drawn) < prompts:
        words = draw.choice([*HARD, *EASY], size=draw.integers(2, 8)).tolist()
        drawn.setdefault(" ".join(words), words)
    for number, words in enumerate(drawn.values()):
        hard = sum(HARD.get(word, 0.0) for word in words)
        for model, part in (("edge", 0.8), ("cloud", 0.2)):
            for image in range(seeds):
                logits = (
                    1.0
                    - part * hard * np.linspace(0.7, 1.3, len(METRICS))
                    + 0.2 * draw.standard_normal(len(METRICS))
                )
                quality = dict(zip(METRICS, (1 / (1 + np.exp(-logits))).tolist(), strict=True))
                key = {"prompt_id": number, "prompt": " ".join(words), "split": splits[number % 6]}
                # A baseline that sees only part of it.
                rows.append(
                    {
                        **key,
                        "objects": words.count("dog") + words.count("cat"),
                        "model": model,
                        "seed": image,
                        **quality,
                    }
                )
    types = {
        "prompt_id": pa.int32(),
        "objects": pa.int16(),
        "seed": pa.int64(),
        **dict.fromkeys(METRICS, pa.float32()),
    }
    schema = pa.schema([(name, types.get(name, pa.string())) for name in rows[0]], metadata=facts)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def write_bundle(folder: Path) -> Bundle:
    """A bundle with a random text encoder of WIDTH dimensions and TOKENS positions."""
    for name in ("unet/model.onnx", "vae_decoder/model.onnx", "schedules/1.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"not opened by the predictor's stages")
    (folder / "tokenizer").mkdir()
    tokenizer = miniature_tokenizer(folder / "tokenizer", TOKENS)
    tokenizer_json.convert(tokenizer).save(str(folder / "tokenizer" / tokens.FILE))
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    (folder / "text_encoder").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing; nothing here depends on what they warn of
        torch.onnx.export(
            encoder.eval(),
            (torch.zeros(1, TOKENS, dtype=torch.long),),
            folder / "text_encoder" / "model.onnx",
            input_names=["input_ids"],
            output_names=["last_hidden_state", "pooler_output"],
            dynamo=False,
        )
    write_manifest(
        folder,
        name="routing world",
        licence="Apache-2.0",
        width=8,
        height=8,
        latent_channels=1,
        latent_height=1,
        latent_width=1,
        latent_scaling=1.0,
        latent_shift=0.0,
        default_steps=1,
        default_guidance=1.0,
        steps=(1,),
        text_tokens=TOKENS,
        text_hidden=WIDTH,
        text_output="last_hidden_state",
    )
    return Bundle.open(folder)
