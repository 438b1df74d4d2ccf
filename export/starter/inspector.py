"""The inspector: finds objects and background in pictures of the starter world, to keep the judge honest.

It answers "is what was asked for in the picture?", as GenEval (arXiv 2310.11513) does with a detector. It shares no
weights, no loss and no scenes with the judge, and labels nothing a router learns from. A network says for each cell
of a grid whether the middle of an object lies there, and of which (objects as points, arXiv 1904.07850); what was
found is compared with what was asked by rule (`export.inspection`).

It learns on rendered scenes of its own split, loosened: sprites move, go missing or are exchanged, because a
generated picture of four cats may hold three, and an inspector that knows how scenes are laid out would see the
fourth. Some are malformed, as a generator's are, little or beyond recognition, and then count as none. Pictures are
blurred, tinted, shrunk, made noisy and taken through the autoencoder with a little noise on the latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from export.errors import ExportError
from export.starter.autoencoder import frozen_autoencoder, pixels
from export.starter.damage import moved, smooth_field
from export.starter.shipped import STARTER_INSPECTOR
from export.starter.sprites import OBJECTS
from export.starter.training import Run, write_record
from export.starter.world import BACKGROUNDS, SIZE, Scene, as_picture, backdrop, place, sample_scenes, stamp

WEIGHTS = "inspector.safetensors"
STEPS, BATCH, LEARNING_RATE, SEED = 2500, 48, 2e-3, 51
SCENES = 20_000  # of the inspector's split, each loosened anew whenever it is drawn
NAMES = tuple(OBJECTS)
WIDTH = 64  # channels of the detector
GRID = 16  # cells a side; the middles of any two sprites of a scene are at least two cells apart
CELL = SIZE // GRID  # pixels
NOTHING = len(NAMES)  # class of a cell without an object's middle
IGNORED = -100  # a neighbour of the middle: whether the middle lies here or there is nobody's mistake
SIZE_UNIT = 32.0  # pixels; sizes are learnt as logarithms to base 2 of their share of this
SIZE_WEIGHT, BACKGROUND_WEIGHT = 0.5, 0.5
# From here on an object is there. Of 0.5, 0.8, 0.9, 0.95 and 0.98 the least of those that agreed best with the eye on
# the half of `inspector_audit.json` marked `chose`: at 0.5 the inspector names malformed objects that an eye does not.
CERTAINTY = 0.9

MISSING, EXCHANGED, MOVED, MALFORMED = 0.12, 0.15, 0.3, 0.3  # share of sprites
MOVE = 7.0  # pixels
# How malformed a sprite is, from 0 to 1: up to the first one can still name it, from the second on nobody would.
NAMED, NAMELESS = 0.35, 0.55
RESTORED = 0.5  # share of pictures taken through the autoencoder
LATENT_NOISE = 0.15  # largest standard deviation put on latents, of their own


class Detector(nn.Module):
    """Pixels [B, 3, 64, 64] in [-1, 1] to what each cell holds, how big it is, and where it all is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3 * CELL * CELL, WIDTH, 3, padding=1)
        self.fine = nn.Sequential(Block(WIDTH), Block(WIDTH))
        self.down = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(Block(2 * WIDTH), Block(2 * WIDTH))
        self.up = nn.Conv2d(2 * WIDTH, WIDTH, 1)
        self.last = Block(WIDTH)
        self.head = nn.Conv2d(WIDTH, len(NAMES) + 2, 1)  # the objects, NOTHING, the size
        self.background = nn.Linear(2 * WIDTH, len(BACKGROUNDS))
        with torch.no_grad():
            self.head.bias[NOTHING] = 8.0  # nearly every cell holds none: begin from there

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [B, NOTHING + 1, GRID, GRID], log sizes [B, GRID, GRID], background logits [B, 6]."""
        fine = self.fine(self.first(F.pixel_unshuffle(pixels, CELL)))
        coarse = self.coarse(self.down(fine))
        cells = self.head(self.last(fine + F.interpolate(self.up(coarse), scale_factor=2)))
        return cells[:, :-1], cells[:, -1], self.background(coarse.mean(dim=(2, 3)))


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, width, H, W] to the same."""
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(F.silu(norm(y)))
        return x + y


@dataclass(frozen=True)
class Seen:
    """One object the inspector found; middle and size in pixels."""

    name: str
    x: float
    y: float
    size: float
    certainty: float


@dataclass(frozen=True)
class Sight:
    """All it found in one picture."""

    objects: tuple[Seen, ...]
    background: str


class Inspector:
    """Looks at pictures of the starter world with the weights in ``folder``; ExportError when they are not its."""

    def __init__(self, folder: Path = STARTER_INSPECTOR) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.detector = Detector()
        try:
            weights = load_file(folder / WEIGHTS)
            self.detector.load_state_dict({name: weight.float() for name, weight in weights.items()})
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ExportError(
                f"{folder / WEIGHTS} is not an inspector's weights ({error}): make them with "
                "`edge-export starter inspector`"
            ) from error
        self.digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        self.detector.to(self.device).eval()

    def look(self, images: Sequence[Image.Image]) -> list[Sight]:
        """What is in each picture; ExportError for one of another size than the world's."""
        for image in images:
            if image.size != (SIZE, SIZE):
                raise ExportError(
                    f"the inspector knows pictures of {SIZE}x{SIZE} pixels, not {image.width}x{image.height}: "
                    "it is of the starter world alone"
                )
        stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
        with torch.inference_mode():
            cells, sizes, backgrounds = self.detector(pixels(stack, self.device))
        return read(cells.softmax(dim=1).cpu(), sizes.cpu(), backgrounds.cpu())


def read(chances: torch.Tensor, sizes: torch.Tensor, backgrounds: torch.Tensor) -> list[Sight]:
    """What the network's outputs say; ``chances`` are probabilities [B, NOTHING + 1, GRID, GRID].

    An object is there where something is more likely than in every neighbouring cell and, all of them together, more
    likely than CERTAINTY: a large one's middle may lie in this cell or the next. Its kind is what they say together.
    """
    something = 1 - chances[:, NOTHING]
    peaks = (9 * something >= CERTAINTY) & (something == F.max_pool2d(something[:, None], 3, 1, 1)[:, 0])
    kinds = F.avg_pool2d(chances[:, :NOTHING], 3, 1, 1).argmax(dim=1)
    found: list[list[Seen]] = [[] for _ in chances]
    likeliest_first = sorted(peaks.nonzero().tolist(), key=lambda cell: -float(something[tuple(cell)]))
    for picture, row, column in likeliest_first:
        around = something[picture, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        if around.sum() < CERTAINTY:
            continue
        found[picture].append(
            Seen(
                NAMES[int(kinds[picture, row, column])],
                (column + 0.5) * CELL,
                (row + 0.5) * CELL,
                SIZE_UNIT * 2.0 ** float(sizes[picture, row, column]),
                min(1.0, float(around.sum())),
            )
        )
        around.zero_()  # two objects do not share a cell between them
    where = backgrounds.argmax(dim=1).tolist()
    return [Sight(tuple(seen), BACKGROUNDS[index]) for seen, index in zip(found, where, strict=True)]


def loosened(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture uint8 [64, 64, 3] of about this scene, its cells int64 and log sizes float32 [GRID, GRID]."""
    canvas = backdrop(scene.background, rng)
    cells = np.full((GRID, GRID), NOTHING)
    sizes = np.zeros((GRID, GRID), np.float32)
    middles = []
    for name, left, top, size in place(scene, rng):
        if rng.random() < MISSING:
            continue
        if rng.random() < EXCHANGED:
            name = NAMES[int(rng.integers(len(NAMES)))]
        if rng.random() < MOVED:
            left, top = (
                int(np.clip(round(v + rng.uniform(-MOVE, MOVE)), 0, SIZE - size)) for v in (left, top)
            )
        before = canvas.copy()
        stamp(canvas, name, left, top, size)
        harm = rng.uniform(0, 1) if rng.random() < MALFORMED else 0.0
        if harm:
            malform(canvas, before, left, top, size, harm, rng)
        row, column = (int((v + size / 2) // CELL) for v in (top, left))
        if harm < NAMELESS:
            middles.append((row, column))
            cells[row, column] = NAMES.index(name) if harm < NAMED else IGNORED
            sizes[row, column] = np.log2(size / SIZE_UNIT)
    for row, column in middles:
        around = cells[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        around[around == NOTHING] = IGNORED
    return as_picture(canvas), cells, sizes


def malform(
    canvas: np.ndarray,
    before: np.ndarray,
    left: int,
    top: int,
    size: int,
    harm: float,
    rng: np.random.Generator,
) -> None:
    """Spoil the shape of the sprite at this place, in one of four ways; ``before`` is the canvas without it."""
    around = np.s_[max(0, top - 3) : top + size + 3, max(0, left - 3) : left + size + 3]
    window = canvas[around]
    height, width = window.shape[:2]
    way = int(rng.integers(4))
    if way == 0:  # bent
        down, right = (0.5 * harm * size * smooth_field((height, width), 4, rng) for _ in range(2))
        canvas[around] = moved(window, down, right)
    elif way == 1:  # smeared: what is left is about a coarse grid's
        coarse = max(2, round(size / (1 + 0.25 * harm * size)))
        picture = Image.fromarray(as_picture(window)).resize((coarse, coarse), Image.Resampling.BOX)
        canvas[around] = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)) / 255
    else:  # partly gone, or partly another, but never wholly that
        other = before.copy()
        if way == 3:
            stamp(other, NAMES[int(rng.integers(len(NAMES)))], left, top, size)
        field = smooth_field((height, width), 4, rng)
        where = field > np.quantile(field, 1 - (0.8 if way == 2 else 0.5) * harm)
        canvas[around] = np.where(where[..., None], other[around], window)


def weathered(pixels: torch.Tensor, rng: np.random.Generator, autoencoder: AutoencoderKL) -> torch.Tensor:
    """Pixels [B, 3, 64, 64] in [-1, 1], spoiled in the ways a generated picture is."""
    number = len(pixels)

    def uniform(shape: Sequence[int], low: float, high: float) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, size=shape).astype(np.float32)).to(pixels.device)

    def normal(shape: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(pixels.device)

    chosen = torch.from_numpy(np.flatnonzero(rng.random(number) < RESTORED)).to(pixels.device)
    if len(chosen):
        with torch.no_grad():
            latents = autoencoder.encode(pixels[chosen]).latent_dist.mean
            noise = uniform((len(chosen), 1, 1, 1), 0, LATENT_NOISE) * latents.std()
            seen = autoencoder.decode(latents + noise * normal(latents.shape)).sample.clamp(-1, 1)
            pixels = pixels.index_copy(0, chosen, seen)
    # Bent along a smooth field, and out of focus by being sampled from a smaller copy.
    bend = uniform((number, 1, 1, 1), 0, 0.03) * normal((number, 2, 5, 5))
    bend = F.interpolate(bend, SIZE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    corners = torch.eye(2, 3, device=pixels.device).expand(number, 2, 3)
    straight = F.affine_grid(corners, [number, 3, SIZE, SIZE], align_corners=False)
    pixels = F.grid_sample(pixels, straight + bend, padding_mode="border", align_corners=False)
    small = int(rng.integers(SIZE // 2, SIZE))
    soft = F.interpolate(F.interpolate(pixels, small, mode="area"), SIZE, mode="bilinear")
    pixels = torch.lerp(pixels, soft, uniform((number, 1, 1, 1), -0.5, 1).clamp(min=0))
    contrast, tint = uniform((number, 3, 1, 1), 0.85, 1.15), uniform((number, 3, 1, 1), -0.12, 0.12)
    grain = uniform((number, 1, 1, 1), 0, 0.08) * normal(pixels.shape)
    return (pixels * contrast + tint + grain).clamp(-1, 1)


def train(
    work: Path, *, autoencoder: Path | None = None, steps: int | None = None, seconds: float | None = None
) -> bool:
    """Train or go on training; True when done, and then ``work/inspector/model`` holds the weights.

    ``autoencoder`` is the one pictures are taken through (default: the recipe's, ``work/decoder/model``).
    """
    folder = work / "inspector"
    restorer = frozen_autoencoder(work, autoencoder)
    scenes = sample_scenes("inspector", SCENES, SEED)
    torch.manual_seed(SEED)
    run = Run(
        folder,
        Detector(),
        steps=steps or STEPS,
        batch=BATCH,
        learning_rate=LEARNING_RATE,
        seed=SEED,
        seconds=seconds,
    )
    restorer.to(run.device)

    def make_batch(step: int) -> tuple[np.ndarray, ...]:
        """Pictures [B, 64, 64, 3], their cells and log sizes [B, GRID, GRID], their backgrounds [B]."""
        rng = np.random.default_rng((SEED, step))
        drawn = [scenes[int(index)] for index in rng.integers(len(scenes), size=BATCH)]
        parts = zip(*(loosened(scene, rng) for scene in drawn), strict=True)
        where = np.array([BACKGROUNDS.index(scene.background) for scene in drawn])
        return *(np.stack(part) for part in parts), where

    def loss_of_batch(step: int, batch: tuple[np.ndarray, ...]) -> torch.Tensor:
        pictures, *answers = batch
        cells, sizes, where = (torch.from_numpy(part).to(run.device) for part in answers)
        seen = weathered(pixels(pictures, run.device), np.random.default_rng((SEED, step, 1)), restorer)
        logits, guessed, backgrounds = run.model(seen)
        middles = (cells >= 0) & (cells != NOTHING)
        number = middles.sum().clamp(min=1)
        kind = F.cross_entropy(logits, cells, ignore_index=IGNORED, reduction="sum") / number
        size = (guessed - sizes)[middles].abs().sum() / number
        return kind + SIZE_WEIGHT * size + BACKGROUND_WEIGHT * F.cross_entropy(backgrounds, where)

    if not run.train(make_batch, loss_of_batch):
        return False
    weights = {name: weight.half().contiguous() for name, weight in run.averaged_model().state_dict().items()}
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / WEIGHTS).write_bytes(
        safetensors.torch.save(weights)
    )  # an OSError where the disk is full
    write_record(folder, run.record())
    return True
