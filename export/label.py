"""Measure both models: the outcome matrix, prompts x models x seeds x metrics, as Parquet.

Both models really generate, as they are served: the edge's images are the bundle's, the cloud's those of a request that
names neither size nor steps. The judge measures every image. Work is cut into pieces that are kept as they are
finished, so an interrupted run goes on where it was, and several processes may share one run (``--share``). Images
are kept too: another judge measures them without generating anything again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from cloud_server import complete
from cloud_server.errors import StartRefused
from cloud_server.model import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, Model, open_model
from cloud_server.settings import DTYPES
from edge_agent.bundle import Bundle
from edge_agent.diffusion import providers
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.generator import Image as EdgeImage
from edge_agent.diffusion.sessions import Runtime
from edge_agent.superiority import METRICS
from export.__main__ import run
from export.arguments import at_least, check_output, write_output
from export.errors import DAMAGED_NPZ, ExportError, reason
from export.negatives import hard_negatives
from export.outcomes import ADHERENCE, COLUMNS, INSPECTION, INSPECTOR, Outcomes, read_table, write_table
from export.prompts import CEILING_PROMPTS, PROMPTS, SHARES, Prompt, own_prompts, router_prompts
from export.quality import Judge
from export.starter.shipped import STARTER_BUNDLE, STARTER_CLOUD, STARTER_JUDGE
from export.terminal import progress

PIECE = 25  # prompts; what an interruption loses at most
BATCH = 5  # images a pipeline makes at once; a whole piece of large ones would not fit a GPU
MODELS = ("edge", "cloud")
IMAGES = "images"  # folder of finished pictures, beside one folder of measurements a judge
WITHHELD = "withheld"  # array beside a piece's pictures
MADE_WITH = "made_with.json"  # in each of these folders: digests of what made its pieces
OWN_PROMPTS = "prompts.txt"  # beside that folder: those of --prompts, whose places in it give their ids
PREPROCESSING = "judge_preprocessing"  # fact of a matrix, of which earlier ones say nothing
CLOUD_DTYPE, EARLIER_DTYPE = "cloud_dtype", "float32"  # another, and what it was then


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
        return [prompt.prompt_id * 1000 + self.draw for prompt in self.prompts]


@dataclass(frozen=True)
class Picture:
    """One generated image."""

    pixels: NDArray[np.uint8]
    """[H, W, 3]"""
    withheld: bool = False
    """The model's own safety checker blanked it: nobody would be served it."""


class Paints(Protocol):
    """A model that generates."""

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        """One image a prompt."""


class Painter:
    """Generates with a diffusers pipeline, at the size, steps and guidance its model card names, as the cloud does.

    ``batch`` images are made at once. ``dtype`` is one of the cloud server's. Raises ExportError when the pipeline
    cannot be loaded.
    """

    def __init__(self, model: Model, batch: int = BATCH, dtype: str = "auto") -> None:
        self.model, card = model.folder, model.card
        self.steps = DEFAULT_STEPS if card.steps is None else card.steps
        self.guidance_scale = DEFAULT_GUIDANCE_SCALE if card.guidance_scale is None else card.guidance_scale
        self.size = {} if None in (card.width, card.height) else {"width": card.width, "height": card.height}
        self.batch = batch
        try:
            self.pipeline = complete.pipeline(model.folder, complete.dtype_for(_device(), dtype))
        except Exception as error:  # each part's library fails in its own way
            raise ExportError(
                f"--cloud {self.model} cannot be loaded: {reason(error)}; save it again with save_pretrained(), "
                "or name another"
            ) from error
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            self.pipeline.to(_device())
        except torch.OutOfMemoryError as error:
            raise ExportError(
                f"--cloud {self.model} does not fit the GPU's memory: free some, or name another with --cloud"
            ) from error

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        """One image a prompt. Noise comes from the CPU, so a seed is the same image on every device.

        Raises ExportError for a model that makes no image of a prompt, or not so many at once.
        """
        made: list[Picture] = []
        for start in range(0, len(prompts), self.batch):
            chosen = slice(start, start + self.batch)
            noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[chosen]]
            try:
                output = self.pipeline(
                    list(prompts[chosen]),
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance_scale,
                    generator=noise,
                    **self.size,
                )
            except torch.OutOfMemoryError as error:
                way_out = (
                    f"name a smaller --batch than {self.batch}"
                    if self.batch > 1
                    else "free some, or name another"
                )
                raise ExportError(
                    f"--cloud {self.model}: the GPU's memory does not hold what {len(noise)} images at once need; "
                    f"{way_out}. Finished pieces are kept"
                ) from error
            except (TypeError, ValueError) as error:  # of a class that wants more than a prompt, or less
                raise ExportError(
                    f"--cloud {self.model}: a {type(self.pipeline).__name__} makes no image of a prompt: "
                    f"{reason(error)}"
                ) from error
            withheld = getattr(output, "nsfw_content_detected", None) or [False] * len(output.images)
            made += [
                Picture(np.asarray(image), bool(blank))
                for image, blank in zip(output.images, withheld, strict=True)
            ]
        return made


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class BundlePainter:
    """Generates with a bundle, at its default steps and guidance, as the daemon does.

    Of what the daemon would run it on, whatever opens at once; ``threads`` in place of one a physical core. Raises
    BundleError when a graph cannot be opened.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        names = map(providers.full_name, providers.find().serving)
        self.generator = Generator(bundle, Runtime(threads, providers=tuple(names)))
        self.nothing = self.generator.encode_negative("")
        self.steps, self.guidance_scale = bundle.manifest.default_steps, bundle.manifest.default_guidance

    def paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        """One image a prompt. Raises GenerationFailed when one has numbers that are not finite."""
        return [Picture(self._image(*one).pixels) for one in zip(prompts, seeds, strict=True)]

    def _image(self, prompt: str, seed: int) -> EdgeImage:
        _, states = self.generator.encode(prompt)
        *_, image = self.generator.generate(states, self.nothing, seed, self.steps, self.guidance_scale)
        assert isinstance(image, EdgeImage)  # the last event
        return image


def cloud_model(model: str) -> Model:
    """The model folder that ``model`` names, or hub id; ExportError when there is none."""
    try:
        return open_model(model)
    except StartRefused as error:
        raise ExportError(
            error.message.replace("--model", "--cloud")
        ) from error  # as the option is called here


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


def generate(painters: Mapping[str, Callable[[], Paints]], images: Path, wanted: Sequence[Piece]) -> None:
    """Generate the pictures that the folder ``images`` lacks: those of one model, then those of the other.

    ``painters`` opens each model when it is needed; only one is in memory at a time. The cloud's first: the bundle has
    been checked, and a cloud model that fails is better known before hours of the edge's images.
    """
    for model in reversed(MODELS):
        missing = [
            piece for piece in wanted if piece.model == model and not images_file(images, piece).exists()
        ]
        if missing:
            _generate(painters[model](), images, missing)


def _generate(painter: Paints, images: Path, missing: Sequence[Piece]) -> None:
    with progress() as bar:
        for piece in bar.track(missing, description=f"generate, {missing[0].model}"):
            pictures = painter.paint([prompt.text for prompt in piece.prompts], piece.seeds)
            arrays = {"images": np.stack([picture.pixels for picture in pictures])}
            if any(picture.withheld for picture in pictures):
                arrays[WITHHELD] = np.array([picture.withheld for picture in pictures])
            partial = images_file(images, piece).with_suffix(f".{os.getpid()}")
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays)
            partial.replace(images_file(images, piece))


def images_file(images: Path, piece: Piece) -> Path:
    """Where the piece's pictures are: one array ``images``, uint8 [prompts, height, width, 3].

    Where some were withheld an array WITHHELD [prompts] says which.
    """
    return images / f"{piece.file}.npz"


def measure(piece: Piece, images: Path, judge: Judge, adherence: bool = False) -> pa.Table:
    """Judge one generated piece: a row an image; ``adherence`` adds the column ADHERENCE.

    A picture that was withheld measures nothing: its metrics are null. Raises ExportError when the piece is damaged.
    """
    file = images_file(images, piece)
    try:
        with np.load(file) as kept:
            pictures = [Image.fromarray(picture) for picture in kept["images"]]
            withheld = kept[WITHHELD] if WITHHELD in kept else np.zeros(len(pictures), bool)
    except DAMAGED_NPZ as error:
        raise ExportError(f"{file} is damaged ({error}): remove it, and label again") from error
    seen = judge.look(pictures)
    scores = judge.quality_of(seen)
    columns: dict[str, object] = {
        "prompt_id": pa.array([prompt.prompt_id for prompt in piece.prompts], pa.int32()),
        "prompt": [prompt.text for prompt in piece.prompts],
        "split": [prompt.split for prompt in piece.prompts],
        "objects": pa.array([prompt.objects for prompt in piece.prompts], pa.int16()),
        "model": [piece.model] * len(piece.prompts),
        "seed": pa.array(piece.seeds, pa.int64()),
    }
    for index, metric in enumerate(judge.metrics):
        columns[metric.name] = pa.array(scores[:, index].astype(np.float32), mask=withheld)
    if adherence:
        negatives = [
            [negative.text for negative in hard_negatives(prompt.text, prompt.scene)] if prompt.scene else []
            for prompt in piece.prompts
        ]
        adheres = judge.adherence_of(seen, [prompt.text for prompt in piece.prompts], negatives)
        columns[ADHERENCE] = pa.array(adheres, mask=withheld | np.isnan(adheres))
    return pa.table(columns)


def without_withheld(table: pa.Table) -> tuple[pa.Table, int]:
    """The matrix without the prompts of which a picture was withheld, and how many these are.

    Both models lose all pictures of such a prompt, because they are compared in pairs.
    """
    lacking = table.filter(pc.is_null(table[METRICS[0]]))["prompt_id"].unique()
    return table.filter(pc.invert(pc.is_in(table["prompt_id"], value_set=lacking))), len(lacking)


def judged(images: Path, parts: Path, wanted: Sequence[Piece], judge: Judge, adherence: bool = False) -> None:
    """Measure what is not in the folder ``parts`` yet."""
    missing = [piece for piece in wanted if measurements(parts, piece) is None]
    with progress() as bar:
        for piece in bar.track(missing, description="judge"):
            try:
                measured = measure(piece, images, judge, adherence)
            except torch.OutOfMemoryError as error:
                raise ExportError(
                    f"--judge: the GPU's memory does not hold what {len(piece.prompts)} pictures at once need; free "
                    "some, or name a smaller CLIP. Finished pieces are kept"
                ) from error
            write_table(measured, measured_file(parts, piece))


def measured_file(parts: Path, piece: Piece) -> Path:
    """Where the piece's measurements are: the rows of `measure`."""
    return parts / f"{piece.file}.parquet"


def measurements(parts: Path, piece: Piece) -> pa.Table | None:
    """The piece's measurements; None where there are none yet, or none that can be read, as after a power loss."""
    try:
        return pq.read_table(measured_file(parts, piece))
    except (OSError, pa.ArrowException):
        return None


def digest_of(model: str) -> str:
    """The fact of a matrix that says which model of this side made its images."""
    return f"{model}_digest"


def inspector_of(matrix: Path | None) -> dict[str, str]:
    """What an earlier matrix says of whose verdicts it has."""
    stated = {} if matrix is None else read_table(matrix).schema.metadata or {}
    return {INSPECTOR: stated[INSPECTOR.encode()].decode()} if INSPECTOR.encode() in stated else {}


def take_over(
    matrix: Path, facts: Mapping[str, str], parts: Path, wanted: Sequence[Piece], adherence: bool = False
) -> None:
    """Put the pieces that an earlier matrix has whole into the folder ``parts``, as if they had been measured.

    Where one of the models is another, those of the other one. ExportError unless the matrix is sound and was made with
    the same ``facts`` otherwise: judge and metrics. What it does not say of the judge's preprocessing is taken to be
    the same.
    """
    Outcomes.read(matrix)
    table = read_table(matrix)
    stated = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    unstated = {PREPROCESSING: facts.get(PREPROCESSING), CLOUD_DTYPE: EARLIER_DTYPE}
    other = {name for name, fact in facts.items() if (unstated | stated).get(name) != fact}
    of_models = {"edge": {digest_of("edge")}, "cloud": {digest_of("cloud"), CLOUD_DTYPE}}
    same = [model for model in MODELS if other.isdisjoint(of_models[model])]
    if other - set.union(*of_models.values()) or not same:
        raise ExportError(
            f"{matrix} does not have this {' or '.join(sorted(other))}: leave --extend out, and label everything"
        )
    if other:
        print(f"{matrix} is of another {min(other)}: the images of the {same[0]} alone are taken over")
    columns = [*COLUMNS, *([ADHERENCE] if adherence else [])]
    if missing := set(columns) - set(table.column_names):
        raise ExportError(f"{matrix} has no {missing.pop()}: leave --extend out, and label everything")
    table = table.select([*columns, *(name for name in INSPECTION if name in table.column_names)])
    keys = zip(*(table[name].to_pylist() for name in ("model", "prompt_id", "seed", "prompt")), strict=True)
    row_of = {key: row for row, key in enumerate(keys)}
    for piece in wanted:
        cells = zip(piece.prompts, piece.seeds, strict=True)
        rows = [row_of.get((piece.model, prompt.prompt_id, seed, prompt.text)) for prompt, seed in cells]
        if piece.model in same and None not in rows and measurements(parts, piece) is None:
            write_table(table.take(rows).replace_schema_metadata(None), measured_file(parts, piece))


def _only_of(folder: Path, facts: Mapping[str, str], name: str) -> Path:
    """The folder, made where it is not there yet; ExportError when what it holds was made with something else.

    A fact that was not recorded yet when it was made is taken to be the same, but for the cloud's number format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = made_with(folder)
    if made is not None and facts | {CLOUD_DTYPE: EARLIER_DTYPE} | made != facts:
        raise ExportError(f"{folder} holds {name}: remove it, or name another --parts")
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


def _only_for(root: Path, own: Sequence[Prompt]) -> None:
    """ExportError when ``root`` holds pictures of other prompts: pieces go by ids, which own ones have by their place.

    ``own`` are the prompts of --prompts; none for the starter's, whose ids say everything.
    """
    file, texts = root / OWN_PROMPTS, [prompt.text for prompt in own]
    kept = file.read_text(encoding="utf-8").removesuffix("\n").split("\n") if file.exists() else []
    both = min(len(kept), len(texts))
    begun = bool(kept) or (root / IMAGES).exists()
    if kept[:both] != texts[:both] or (begun and bool(kept) != bool(texts)):
        raise ExportError(
            f"{root} holds pictures of other prompts: add new ones at the end of the file, remove {root}, or name "
            "another --parts"
        )
    if len(texts) > len(kept):
        root.mkdir(parents=True, exist_ok=True)
        write_output(file, "\n".join(texts) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; exit code 0 when the matrix is written, 1 when pieces of it are still to be made."""
    parser = argparse.ArgumentParser(prog="edge-export label", description=__doc__)
    parser.add_argument(
        "--bundle", type=Path, default=STARTER_BUNDLE, help="the edge model (default: the starter's)"
    )
    parser.add_argument(
        "--cloud",
        default=str(STARTER_CLOUD),
        help="the cloud model: a diffusers folder or hub id (default: the starter's); routet2i.json in the folder says "
        f"at how many steps and which guidance scale, else {DEFAULT_STEPS} and {DEFAULT_GUIDANCE_SCALE:g}",
    )
    parser.add_argument(
        "--cloud-dtype",
        choices=DTYPES,
        default="auto",
        help="what the cloud model computes in, as `cloud-server serve --dtype` has it: auto is float16 on CUDA, else "
        "float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--judge",
        default=STARTER_JUDGE,
        help="a CLIP that transformers opens as CLIPModel, folder or hub id, such as openai/clip-vit-large-patch14 "
        "(default: the starter's, which knows the starter's objects alone)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/labels.parquet"), help="the labels (default: %(default)s)"
    )
    parser.add_argument("--parts", type=Path, help="folder of finished pieces (default: beside --out)")
    draws = Draws()
    parser.add_argument(
        "--draws",
        type=at_least(1),
        default=draws.train,
        help="images of a training prompt by each model (default: %(default)s)",
    )
    parser.add_argument(
        "--edge-draws",
        type=at_least(1),
        default=draws.train_edge,
        help="images of a training prompt by the edge, unless --draws asks for more; four are worth it where they cost "
        "little beside the cloud's (default: %(default)s)",
    )
    parser.add_argument(
        "--measured-draws",
        type=at_least(1),
        default=draws.measured,
        help="images of a prompt of another split by each model (default: %(default)s)",
    )
    parser.add_argument(
        "--ceiling-draws",
        type=at_least(0),
        default=draws.ceiling,
        help=f"images of each of the first {CEILING_PROMPTS} test prompts by each model, which tell what the best "
        "router could win (default: %(default)s)",
    )
    parser.add_argument(
        "--adherence",
        action="store_true",
        help="also measure how much more an image is like its prompt than like that prompt with one thing wrong",
    )
    parser.add_argument(
        "--extend",
        type=Path,
        metavar="MATRIX",
        help="earlier labels by the same judge and of at least one of the same models: whole pieces of "
        f"{PIECE} prompts that it has are not made again",
    )
    parser.add_argument(
        "--batch",
        type=at_least(1),
        default=BATCH,
        help="images the cloud model makes at once; fewer need less memory (default: %(default)s)",
    )
    shares = ", ".join(f"{share} {split}" for split, share in SHARES.items())
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts of your own, one a line in UTF-8, in place of the starter's; a hash of its text puts each in a "
        f"split, of a hundred {shares}",
    )
    for split, number in PROMPTS.items():
        parser.add_argument(
            f"--{split}", type=at_least(0), dest=split, help=f"prompts of the starter's (default: {number})"
        )
    parser.add_argument(
        "--share",
        type=_share,
        default=(1, 1),
        metavar="K/N",
        help="do the K-th of N shares of the work; the last of the N processes to finish writes the labels",
    )
    options = parser.parse_args(argv)

    asked = {split: count for split in PROMPTS if (count := getattr(options, split)) is not None}
    if options.prompts is not None and asked:
        parser.error(f"--prompts FILE says how many there are: leave --{next(iter(asked))} out")
    counts = PROMPTS | asked
    if not any(counts.values()):
        parser.error("there is no prompt to label: ask for some of one split at least, such as --test 100")
    own = [] if options.prompts is None else own_prompts(options.prompts)
    root = options.parts or options.out.with_suffix(".parts")
    if root.resolve() == options.out.resolve():
        raise ExportError(
            f"--out {options.out} is the folder of the finished pieces: name another file, or another --parts"
        )
    check_output(options.out, *([options.prompts] if own else []))
    bundle, cloud = Bundle.open(options.bundle), cloud_model(options.cloud)
    prompts = own or router_prompts(counts)
    judge = Judge(options.judge)
    models = {
        digest_of("edge"): bundle.model_digest,
        digest_of("cloud"): cloud.digest,
        CLOUD_DTYPE: str(complete.dtype_for(_device(), options.cloud_dtype)).removeprefix("torch."),
    }
    measured = {
        "metrics": json.dumps([metric.texts for metric in judge.metrics]),
        "judge_digest": judge.digest,
        PREPROCESSING: judge.preprocessing,
    }
    _only_for(root, own)
    images = _only_of(root / IMAGES, models, "images of other models, or of the cloud's in another dtype")
    name = f"{judge.digest[:16]}-{ADHERENCE}" if options.adherence else judge.digest[:16]
    parts = _only_of(root / name, models | measured, "measurements of other metrics or preprocessing")
    draws = Draws(options.draws, options.edge_draws, options.measured_draws, options.ceiling_draws)
    every = list(pieces(prompts, draws))
    mine = [piece for piece in every if piece.number % options.share[1] == options.share[0] - 1]
    if options.extend is not None:
        take_over(options.extend, models | measured, parts, every, options.adherence)
    unmeasured = [piece for piece in mine if measurements(parts, piece) is None]
    if damaged := [file for piece in unmeasured if (file := measured_file(parts, piece)).exists()]:
        print(f"pieces that cannot be read, such as {damaged[0]}: {len(damaged)}; they are measured again")
    threads = None
    if (processes := options.share[1]) > 1:  # each to its share of the cores, or they wait for each other
        threads = max(1, (os.cpu_count() or 1) // processes)
        torch.set_num_threads(threads)
    painters: dict[str, Callable[[], Paints]] = {
        "edge": lambda: BundlePainter(bundle, threads),
        "cloud": lambda: Painter(cloud, options.batch, options.cloud_dtype),
    }
    generate(painters, images, unmeasured)
    judged(images, parts, unmeasured, judge, options.adherence)
    tables = [table for piece in every if (table := measurements(parts, piece)) is not None]
    if len(tables) < len(every):
        print(
            f"{len(tables)} of {len(every)} pieces are made; the same command without --share makes the rest"
        )
        return 1
    table = pa.concat_tables(tables, promote_options="default")
    table, withheld = without_withheld(table)
    if withheld:
        print(
            f"left out {withheld} of {len(prompts)} prompts: the cloud's safety checker withheld a picture of each"
        )
    if withheld == len(prompts):
        raise ExportError("no prompt is left to route: label others, or a model without a safety checker")
    facts = models | measured | inspector_of(options.extend)
    write_table(table.replace_schema_metadata(facts), options.out)
    print(f"{table.num_rows} images of {len(prompts) - withheld} prompts -> {options.out}")
    return 0


def _share(text: str) -> tuple[int, int]:
    try:
        k, n = map(int, text.split("/"))
    except ValueError:
        k = n = 0
    if not 1 <= k <= n:
        raise argparse.ArgumentTypeError(f"{text!r} is no share K/N with K from 1 to N, such as 1/4")
    return k, n


if __name__ == "__main__":
    raise SystemExit(run(main))
