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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from cloud_server import complete
from cloud_server.model import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS
from cloud_server.settings import DTYPES
from edge_agent.bundle import Bundle
from edge_agent.superiority import METRICS
from export.arguments import at_least
from export.errors import ExportError
from export.negatives import hard_negatives
from export.outcomes import (
    ADHERENCE,
    CLOUD_DIGEST,
    COLUMNS,
    EDGE_DIGEST,
    INSPECTION,
    INSPECTOR,
    JUDGE_DIGEST,
    MODELS,
    Outcomes,
    facts_of,
    read_table,
    write_table,
)
from export.output import check_output
from export.painter import BATCH, BundlePainter, Painter, Paints, Picture, cloud_model, device
from export.pieces import (
    CLOUD_DTYPE,
    EARLIER_DTYPE,
    IMAGES,
    PIECE,
    Draws,
    Piece,
    begun,
    images_file,
    keep_pictures,
    kept_pictures,
    keys_of,
    measured_file,
    measurements,
    note,
    only_for,
    only_of,
    pieces,
)
from export.prompts import CEILING_PROMPTS, IDS_A_SPLIT, PROMPTS, SHARES, own_prompts, router_prompts
from export.quality import Judge
from export.starter.shipped import STARTER_BUNDLE, STARTER_CLOUD, STARTER_JUDGE
from export.terminal import progress, say

PREPROCESSING = "judge_preprocessing"  # fact of a matrix, of which earlier ones say nothing


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
        task = bar.add_task(f"images, {missing[0].model}", total=_images(missing))
        for piece in missing:
            pictures: list[Picture] = []
            for start in range(0, len(piece.prompts), painter.batch):
                some = slice(start, start + painter.batch)
                made = painter.paint([prompt.text for prompt in piece.prompts[some]], piece.seeds[some])
                pictures += made
                bar.advance(task, len(made))
            keep_pictures(images, piece, pictures)


def _images(wanted: Sequence[Piece]) -> int:
    return sum(len(piece.prompts) for piece in wanted)


def measure(piece: Piece, images: Path, judge: Judge, adherence: bool = False) -> pa.Table:
    """Judge one generated piece: a row an image; ``adherence`` adds the column ADHERENCE.

    A picture that was withheld measures nothing: its metrics are null. Raises ExportError when the piece is damaged.
    """
    pictures = kept_pictures(images, piece)
    withheld = np.array([picture.withheld for picture in pictures])
    seen = judge.look([Image.fromarray(picture.pixels) for picture in pictures])
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
        task = bar.add_task("images, judged", total=_images(missing))
        for piece in missing:
            try:
                measured = measure(piece, images, judge, adherence)
            except torch.OutOfMemoryError as error:
                raise ExportError(
                    f"--judge: the GPU's memory does not hold what {len(piece.prompts)} pictures at once need; free "
                    "some, or name a smaller CLIP. Finished pieces are kept"
                ) from error
            write_table(measured, measured_file(parts, piece))
            bar.advance(task, len(piece.prompts))


def inspector_of(matrix: Path | None) -> dict[str, str]:
    """What an earlier matrix says of whose verdicts it has."""
    stated = {} if matrix is None else facts_of(read_table(matrix))
    return {INSPECTOR: stated[INSPECTOR]} if INSPECTOR in stated else {}


def take_over(
    matrix: Path, facts: Mapping[str, str], parts: Path, wanted: Sequence[Piece], adherence: bool
) -> None:
    """Put the pieces that an earlier matrix has whole into the folder ``parts``, as if they had been measured.

    Where one of the models is another, those of the other one. ExportError unless the matrix is sound and was made with
    the same ``facts`` otherwise: judge and metrics. What it does not say of the judge's preprocessing is taken to be
    the same.
    """
    Outcomes.read(matrix)
    table = read_table(matrix)
    stated = facts_of(table)
    unstated = {PREPROCESSING: facts.get(PREPROCESSING), CLOUD_DTYPE: EARLIER_DTYPE}
    other = {name for name, fact in facts.items() if (unstated | stated).get(name) != fact}
    of_models = {"edge": {EDGE_DIGEST}, "cloud": {CLOUD_DIGEST, CLOUD_DTYPE}}
    same = [model for model in MODELS if other.isdisjoint(of_models[model])]
    if other - set.union(*of_models.values()) or not same:
        raise ExportError(
            f"{matrix} does not have this {' or '.join(sorted(other))}: leave --extend out, and label everything"
        )
    if other:
        say(f"{matrix} is of another {min(other)}: the images of the {same[0]} alone are taken over")
    columns = [*COLUMNS, *([ADHERENCE] if adherence else [])]
    if missing := set(columns) - set(table.column_names):
        raise ExportError(f"{matrix} has no {missing.pop()}: leave --extend out, and label everything")
    table = table.select([*columns, *(name for name in INSPECTION if name in table.column_names)])
    said = zip(keys_of(table), table["prompt"].to_pylist(), strict=True)
    row_of = {one: row for row, one in enumerate(said)}
    for piece in wanted:
        cells = zip(piece.prompts, piece.seeds, strict=True)
        rows = [row_of.get(((piece.model, prompt.prompt_id, seed), prompt.text)) for prompt, seed in cells]
        if piece.model in same and None not in rows and measurements(parts, piece) is None:
            write_table(table.take(rows).replace_schema_metadata(None), measured_file(parts, piece))


def _parser() -> argparse.ArgumentParser:
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
            f"--{split}",
            type=at_least(0, IDS_A_SPLIT),
            dest=split,
            help=f"prompts of the starter's (default: {number})",
        )
    parser.add_argument(
        "--share",
        type=_share,
        default=(1, 1),
        metavar="K/N",
        help="do the K-th of N shares of the work; the last of the N processes to finish writes the labels",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; exit code 0 when the matrix is written, 1 when pieces of it are still to be made."""
    parser = _parser()
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
    if options.judge == STARTER_JUDGE and (own or options.bundle != STARTER_BUNDLE):
        say(
            "the starter's judge knows the starter's objects alone: for other models or prompts name a CLIP by --judge"
        )
    bundle, cloud = Bundle.open(options.bundle), cloud_model(options.cloud)
    prompts = own or router_prompts(counts)
    judge = Judge(options.judge)
    models = {
        EDGE_DIGEST: bundle.model_digest,
        CLOUD_DIGEST: cloud.digest,
        CLOUD_DTYPE: str(complete.dtype_for(device(), options.cloud_dtype)).removeprefix("torch."),
    }
    measured = {
        "metrics": json.dumps([metric.texts for metric in judge.metrics]),
        JUDGE_DIGEST: judge.digest,
        PREPROCESSING: judge.preprocessing,
    }
    name = f"{judge.digest[:16]}-{ADHERENCE}" if options.adherence else judge.digest[:16]
    only_for(root, own)
    only_of(root / IMAGES, models, "images of other models, or of the cloud's in another dtype")
    only_of(root / name, models | measured, "measurements of other metrics or preprocessing")
    note(root, own)  # once nothing is refused any more, and before another process may find images
    images, parts = begun(root / IMAGES, models), begun(root / name, models | measured)
    draws = Draws(options.draws, options.edge_draws, options.measured_draws, options.ceiling_draws)
    every = list(pieces(prompts, draws))
    mine = [piece for piece in every if piece.number % options.share[1] == options.share[0] - 1]
    if options.extend is not None:
        take_over(options.extend, models | measured, parts, every, options.adherence)
    unmeasured = [piece for piece in mine if measurements(parts, piece) is None]
    if damaged := [file for piece in unmeasured if (file := measured_file(parts, piece)).exists()]:
        say(f"pieces that cannot be read, such as {damaged[0]}: {len(damaged)}; they are measured again")
    if unmeasured:
        unmade = [piece for piece in unmeasured if not images_file(images, piece).exists()]
        of = {model: _images([piece for piece in unmade if piece.model == model]) for model in MODELS}
        say(
            f"images to make: {of['edge']:,} by the edge, {of['cloud']:,} by the cloud; to judge: "
            f"{_images(unmeasured):,}"
        )
    threads = None
    if (processes := options.share[1]) > 1:  # each to its share of the cores, or they wait for each other
        threads = max(1, (os.cpu_count() or 1) // processes)
        torch.set_num_threads(threads)
    painters: dict[str, Callable[[], Paints]] = {
        "edge": lambda: BundlePainter(bundle, threads),
        "cloud": lambda: Painter(cloud, options.batch, options.cloud_dtype),
    }
    try:
        generate(painters, images, unmeasured)
        judged(images, parts, unmeasured, judge, options.adherence)
    except KeyboardInterrupt:
        say("stopped; finished pieces are kept, and the same command goes on from there")
        raise
    facts = models | measured | inspector_of(options.extend)
    return _assembled(options.out, parts, every, facts)


def _assembled(out: Path, parts: Path, every: Sequence[Piece], facts: Mapping[str, str]) -> int:
    """Write the matrix of all pieces, where they are made; the exit code."""
    tables = [table for piece in every if (table := measurements(parts, piece)) is not None]
    if len(tables) < len(every):
        say(f"{len(tables)} of {len(every)} pieces are made; the same command without --share makes the rest")
        return 1
    table, withheld = without_withheld(pa.concat_tables(tables, promote_options="default"))
    prompts = len({prompt.prompt_id for piece in every for prompt in piece.prompts})
    if withheld:
        say(
            f"left out {withheld} of {prompts} prompts: the cloud's safety checker withheld a picture of each"
        )
    if withheld == prompts:
        raise ExportError("no prompt is left to route: label others, or a model without a safety checker")
    write_table(table.replace_schema_metadata(facts), out)
    say(f"{table.num_rows} images of {prompts - withheld} prompts -> {out}")
    return 0


def _share(text: str) -> tuple[int, int]:
    try:
        k, n = map(int, text.split("/"))
    except ValueError:
        k = n = 0
    if not 1 <= k <= n:
        raise argparse.ArgumentTypeError(f"{text!r} is no share K/N with K from 1 to N, such as 1/4")
    return k, n
