"""The text encoder learns to read, before a denoiser learns to paint what it reads.

From the token states a small head has to say what fills each cell of an 8 x 8 grid over the picture: which object,
or which background. To tell, the states must carry objects, counts, sizes, relations and places, bound to each other,
as a denoiser's cross-attention needs them. A text encoder that learns from the denoiser's loss alone takes several
times as long to get there. The head is thrown away.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPTokenizerFast

from export.starter.size import Size
from export.starter.sprites import OBJECTS
from export.starter.tokenizer import token_ids, train_tokenizer
from export.starter.training import Run, write_record
from export.starter.world import BACKGROUNDS, SIZE, Scene, caption, place, sample_scenes

STEPS, BATCH, LEARNING_RATE = 2000, 256, 1.5e-3
GRID = 8  # cells a side
CLASSES = len(OBJECTS) + len(BACKGROUNDS)
BACKGROUND_WEIGHT = 0.3  # of a cell without object: most cells have none
MEASURED = 512  # held-out captions


class Reader(nn.Module):
    """Text encoder, and a head whose queries, one a cell, look at the token states."""

    def __init__(self, size: Size, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        width = size.text_width
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=width,
                num_hidden_layers=size.text_layers,
                num_attention_heads=width // 32,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.cells = nn.Parameter(torch.randn(GRID * GRID, width) * 0.1)
        layer = nn.TransformerDecoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.TransformerDecoder(layer, 2)
        self.classify = nn.Linear(width, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, GRID * GRID, CLASSES] of token ids [B, L]."""
        states = self.text_encoder(ids).last_hidden_state
        return self.classify(self.head(self.cells.expand(len(ids), -1, -1), states))


def cells_of(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """What fills each cell of the scene's picture: int64 [GRID * GRID], an object's index or a background's."""
    cells = np.full((GRID, GRID), len(OBJECTS) + BACKGROUNDS.index(scene.background))
    middles = (np.arange(GRID) + 0.5) * SIZE / GRID
    for name, left, top, size in place(scene, rng):
        rows = (middles >= top) & (middles < top + size)
        columns = (middles >= left) & (middles < left + size)
        cells[np.ix_(rows, columns)] = list(OBJECTS).index(name)
    return cells.reshape(-1)


def read_scenes(
    tokenizer: CLIPTokenizerFast, split: str, number: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [N, L] of captions, and the cells [N, GRID * GRID] of their scenes."""
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(split, number, seed)
    ids = token_ids(tokenizer, [caption(scene, rng) for scene in scenes])
    return ids, np.stack([cells_of(scene, rng) for scene in scenes])


def train(work: Path, size: Size, *, steps: int | None = None, seconds: float | None = None) -> bool:
    """Train or go on training; True when done, and then ``work/<text>/model`` holds the text encoder."""
    folder = work / size.text
    tokenizer = train_tokenizer(folder / "tokenizer")
    fast = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    torch.manual_seed(size.seed)
    run = Run(
        folder,
        Reader(size, tokenizer),
        steps=steps or STEPS,
        batch=BATCH,
        learning_rate=LEARNING_RATE,
        seed=size.seed,
        seconds=seconds,
    )
    weights = torch.ones(CLASSES, device=run.device)
    weights[len(OBJECTS) :] = BACKGROUND_WEIGHT

    def make_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        return read_scenes(fast, "generators", BATCH, size.seed * 1_000_000 + step)

    def loss_of_batch(_: int, batch: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        ids, cells = (torch.from_numpy(part).to(run.device) for part in batch)
        return F.cross_entropy(run.model(ids).flatten(0, 1), cells.flatten(), weights)

    if not run.train(make_batch, loss_of_batch):
        return False
    reader = run.averaged_model()
    ids, cells = read_scenes(fast, "validation", MEASURED, seed=1)
    with torch.inference_mode():
        read = reader(torch.from_numpy(ids).to(run.device)).argmax(dim=-1).cpu().numpy()
    accuracy = round(float((read == cells)[cells < len(OBJECTS)].mean()), 4)
    print(f"{folder.name}: names the object in {accuracy:.1%} of the filled cells of held-out scenes")
    reader.text_encoder.save_pretrained(folder / "model")
    write_record(folder, run.record() | {"held_out_cell_accuracy": accuracy})
    return True
