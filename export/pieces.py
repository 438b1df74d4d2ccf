"""The work of labelling in pieces: each is kept in a file of pictures, and in one of measurements for each judge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from export.errors import DAMAGED_NPZ, ExportError
from export.outcomes import MODELS
from export.output import replacing, write_output
from export.painter import Picture
from export.prompts import CEILING_PROMPTS, Prompt

PIECE = 25  # prompts; what an interruption loses at most
IMAGES = "images"  # folder of finished pictures, beside one folder of measurements a judge
WITHHELD = "withheld"  # array beside a piece's pictures
MADE_WITH = "made_with.json"  # in each of these folders: digests of what made its pieces
OWN_PROMPTS = "prompts.txt"  # beside that folder: those of --prompts, whose places in it give their ids
CLOUD_DTYPE = "cloud_dtype"  # fact of what made pieces
EARLIER_DTYPE = "float32"  # what it was before it was recorded

Key = tuple[str, int, int]
"""Which picture: model, prompt id, seed."""


def keys_of(table: pa.Table) -> list[Key]:
    """Of the pictures whose measurements are the rows."""
    return list(zip(*(table[name].to_pylist() for name in ("model", "prompt_id", "seed")), strict=True))


@dataclass(frozen=True)
class Piece:
    """Up to PIECE prompts, one model, one seed each; kept in one file."""

    number: int  # of these prompts and this draw, the same for both models
    model: str
    draw: int  # 0 for the first image of a prompt, 1 for the second, ...
    prompts: tuple[Prompt, ...]

    @property
    def file(self) -> str:
        """Name, without its ending, of the files it is kept in."""
        ids = [prompt.prompt_id for prompt in self.prompts]
        return f"{self.model}-{self.draw}-{ids[0]}-{ids[-1]}-{len(ids)}"

    @property
    def seeds(self) -> list[int]:
        """One seed an image, the same for both models, different for every prompt."""
        return [seed_of(prompt.prompt_id, self.draw) for prompt in self.prompts]


def seed_of(prompt_id: int, draw: int) -> int:
    """Of a prompt's first image (0), its second, ...: past a thousand the next prompt's begin."""
    return prompt_id * 1000 + draw


@dataclass(frozen=True)
class Draws:
    """How many images of a prompt each model makes."""

    train: int = 1
    train_edge: int = 1
    """The edge's of a training prompt, `train` at least. Most of the luck in what a prompt gains is theirs. With four,
    which cost less than half of one of the cloud's, mixtures predicted gains that correlated 0.54 with measured ones,
    on validation and calibration prompts, with one 0.52 (labels of an earlier judge)."""
    measured: int = 4
    """On every other split: what is measured on them is an expectation, not one image's luck."""
    ceiling: int = 16
    """On the first CEILING_PROMPTS of test: with 16 one knows well what the best router could win."""

    def of(self, split: str, model: str) -> int:
        """The model's images of every prompt of the split."""
        if split != "train":
            return self.measured
        return max(self.train, self.train_edge) if model == "edge" else self.train

    @property
    def most(self) -> int:
        """Of any prompt."""
        return max(self.train, self.train_edge, self.measured, self.ceiling)


def pieces(prompts: Sequence[Prompt], draws: Draws) -> Iterator[Piece]:
    """All pieces, the first image of every prompt before any second one; those for the ceiling come last."""
    splits = {
        split: [prompt for prompt in prompts if prompt.split == split]
        for split in dict.fromkeys(prompt.split for prompt in prompts)
    }
    number = 0
    for draw in range(draws.most):
        for split, of_split in splits.items():
            # Split by split, so that a run with more prompts keeps the pieces of one with fewer.
            few = of_split[:CEILING_PROMPTS] if split == "test" and draw < draws.ceiling else []
            wanted = {model: of_split if draw < draws.of(split, model) else few for model in MODELS}
            for start in range(0, max(map(len, wanted.values())), PIECE):
                for model in MODELS:
                    if piece := tuple(wanted[model][start : start + PIECE]):
                        yield Piece(number, model, draw, piece)
                number += 1


def images_file(images: Path, piece: Piece) -> Path:
    """Where the piece's pictures are: one array ``images``, uint8 [prompts, height, width, 3].

    Where some were withheld an array WITHHELD [prompts] says which.
    """
    return images / f"{piece.file}.npz"


def keep_pictures(images: Path, piece: Piece, pictures: Sequence[Picture]) -> None:
    """Write them to `images_file`."""
    arrays = {"images": np.stack([picture.pixels for picture in pictures])}
    if any(picture.withheld for picture in pictures):
        arrays[WITHHELD] = np.array([picture.withheld for picture in pictures])
    with replacing(images_file(images, piece)) as partial:
        np.savez_compressed(partial, **arrays)


def kept_pictures(images: Path, piece: Piece) -> list[Picture]:
    """Read them from there. Raises ExportError when the file is damaged."""
    file = images_file(images, piece)
    try:
        with np.load(file) as kept:
            pixels = kept["images"]
            withheld = kept[WITHHELD].tolist() if WITHHELD in kept else [False] * len(pixels)
            return [Picture(*one) for one in zip(pixels, withheld, strict=True)]
    except DAMAGED_NPZ as error:
        raise ExportError(f"{file} is damaged ({error}): remove it, and label again") from error


def all_pictures(images: Path) -> Iterator[tuple[Key, NDArray[np.uint8]]]:
    """Every picture in the folder, with its pixels. Raises ExportError for a file that is no piece."""
    for file in sorted(images.glob("[!.]*.npz")):  # not what one that was killed has left
        try:
            model, draw, first, last, number = file.stem.split("-")
            with np.load(file) as kept:
                pictures = kept["images"]
            ids = range(int(first), int(last) + 1)
            if model not in MODELS or not len(pictures) == len(ids) == int(number):
                raise ValueError("its name and its pictures do not agree")
        except DAMAGED_NPZ as error:
            raise ExportError(
                f"{file} is not a piece of `edge-export label` ({error}): remove it, and label again"
            ) from error
        for prompt_id, pixels in zip(ids, pictures, strict=True):
            yield (model, prompt_id, seed_of(prompt_id, int(draw))), pixels


def measured_file(parts: Path, piece: Piece) -> Path:
    """Where the piece's measurements are: the rows of `measure`."""
    return parts / f"{piece.file}.parquet"


def measurements(parts: Path, piece: Piece) -> pa.Table | None:
    """The piece's measurements; None where there are none yet, or none that can be read, as after a power loss."""
    try:
        return pq.read_table(measured_file(parts, piece))
    except (OSError, pa.ArrowException):
        return None


def only_of(folder: Path, facts: Mapping[str, str], name: str) -> None:
    """ExportError when what the folder holds was made with something else.

    A fact that was not recorded yet when it was made is taken to be the same, but for the cloud's number format.
    """
    made = made_with(folder)
    if made is not None and facts | {CLOUD_DTYPE: EARLIER_DTYPE} | made != facts:
        raise ExportError(f"{folder} holds {name}: remove it, or name another --parts")


def begun(folder: Path, facts: Mapping[str, str]) -> Path:
    """The folder, made where it is not there yet, which says what it is made with."""
    folder.mkdir(parents=True, exist_ok=True)
    write_output(folder / MADE_WITH, json.dumps(facts))
    return folder


def made_with(folder: Path) -> dict[str, object] | None:
    """What a folder of pieces was made with; None where nothing says. Raises ExportError when that is damaged."""
    file = folder / MADE_WITH
    try:
        facts = json.loads(file.read_bytes())
        if not isinstance(facts, dict):
            raise ValueError("no object of JSON")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ExportError(
            f"{file} is damaged ({error}): remove {folder}, or this file alone where the same models and judge made "
            "all that lies beside it, and label again"
        ) from error
    return facts


def only_for(root: Path, own: Sequence[Prompt]) -> None:
    """ExportError when ``root`` holds pictures of other prompts: pieces go by ids, which own ones have by their place.

    ``own`` are the prompts of --prompts; none for the starter's, whose ids say everything.
    """
    there = (root / IMAGES).exists()  # before what is noted is read, which another process writes first
    kept, texts = _noted(root), [prompt.text for prompt in own]
    other = next((pair for pair in zip(kept, texts, strict=False) if pair[0] != pair[1]), None)
    if other or ((there or kept) and bool(kept) != bool(texts)):
        where = f" ({other[0]!r:.60}, and not {other[1]!r:.60})" if other else ""
        raise ExportError(
            f"{root} holds pictures of other prompts{where}: add new ones at the end of the file, remove {root}, or "
            "name another --parts"
        )


def note(root: Path, own: Sequence[Prompt]) -> None:
    """Take note in ``root`` of the prompts that pictures are made of there from now on, for `only_for`."""
    if len(own) > len(_noted(root)):
        root.mkdir(parents=True, exist_ok=True)
        write_output(root / OWN_PROMPTS, "".join(f"{prompt.text}\n" for prompt in own))


def _noted(root: Path) -> list[str]:
    file = root / OWN_PROMPTS
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n").split("\n") if file.exists() else []
    except UnicodeDecodeError as error:
        raise ExportError(f"{file} is damaged: remove {root}, and label again") from error
