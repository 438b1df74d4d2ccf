"""`edge-export starter`: the whole chain from sprites to a calibrated bundle, or one stage of it.

Training took less than twenty minutes on an H200 with 16 cores beside it, but for the inspector, which took 46 minutes
on one CPU thread. On two CPU cores it would take more than a day by estimate, most of it for the cloud model; `--steps`
makes a training stage shorter. Labelling, which makes and judges 150,080 images, comes on top.

Training and labelling can be interrupted, and the same command goes on: training from its last checkpoint (at most two
minutes are lost), labelling from its last 25 prompts. A model that is trained is not trained again. Everything else
starts over, also the painting of the sketches, minutes on a GPU, unless it came to its end.

Stages, in order:

  sprites        cut the sprites out of the font (they are committed; needed only to change them)
  autoencoder    train the autoencoder both models share
  decoder        train its decoder on, alone
  edge-text, cloud-text    teach the text encoders of both models to read
  sketch         train three models a little and let them paint pictures anew: the judge learns from their mistakes
  judge          train the judge
  inspector      train the inspector, which checks whether what was asked for is in the picture
  edge, cloud    train the two text-to-image models
  install        copy finished weights to where they ship from, with their model cards
  bundle         export the edge model to the bundle the daemon runs
  label          generate with both models and judge every image
  inspect        let the inspector look at every image too
  predictor      train the predictor, put it into the bundle, calibrate it
  evaluate       measure the routing on held-out prompts
  contact-sheet  edge and cloud side by side
  summary        what both models' images cost, and how good they are
  all            everything but sprites, in this order (the default)
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from export import calibrate, diffusion_onnx, evaluate, inspection, label, pieces, predictor_onnx
from export import train as train_predictor
from export.arguments import at_least
from export.starter import (
    autoencoder,
    contact_sheet,
    denoiser,
    inspector,
    judge,
    sketch,
    sprites,
    summary,
    text_encoder,
)
from export.starter.card import read_records, write_card
from export.starter.shipped import (
    STARTER_BUNDLE,
    STARTER_CLOUD,
    STARTER_EDGE,
    STARTER_INSPECTOR,
    STARTER_JUDGE,
    STARTER_LABELS,
    WEIGHTS,
)
from export.starter.size import CLOUD, EDGE, SKETCHES, Size
from export.starter.training import UNFINISHED, needed

EDGE_STEPS = f"{EDGE.inference_steps},8,16"  # step counts compiled into the bundle, the default first
LABELLING = ("--adherence", "--edge-draws=4")  # the edge's images cost a tenth of the cloud's
EVALUATION = WEIGHTS / "evaluation.json"
INSPECTION = Path("docs/inspector.md")
_WITHOUT_OPTIONS = ("all", "install", "bundle", "predictor")  # but --work and --seconds
SKETCHED = tuple(size.name for size in SKETCHES)


def install(work: Path) -> int:
    """Copy finished weights into the packages that ship them. Raises ExportError while one is unfinished."""
    places = {
        "edge": STARTER_EDGE,
        "cloud": STARTER_CLOUD,
        "judge": STARTER_JUDGE,
        "inspector": STARTER_INSPECTOR,
    }
    shared = ("autoencoder", "decoder")
    for name in (*shared, "edge-text", "cloud-text", *SKETCHED, *places):
        needed(work, name, "sketch" if name in SKETCHED else None)
    cloud = read_records(work, (*shared, "cloud-text", "cloud"))
    others = read_records(work, (*shared, "edge-text", "edge", *SKETCHED, "judge", "inspector"))
    for name, place in places.items():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(work / name / "model", place)
    write_card(others, WEIGHTS / "README.md")
    write_card(cloud, STARTER_CLOUD / "README.md")
    return 0


def bundle() -> int:
    """Export the installed edge model, replacing the embedded bundle."""
    guidance = EDGE.guidance_scale
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "bundle"
        arguments = ["--steps", EDGE_STEPS, "--guidance", str(guidance), "--name", "routet2i-starter-edge"]
        code = diffusion_onnx.main([str(STARTER_EDGE), str(made), *arguments, "--licence", "Apache-2.0"])
        if code == 0:
            shutil.rmtree(STARTER_BUNDLE, ignore_errors=True)
            shutil.copytree(made, STARTER_BUNDLE)
    return code


def predictor(work: Path) -> int:
    """Train the predictor on the shipped labels, write it into the bundle, calibrate."""
    folder = work / "predictor"
    steps = (
        # One mixture: the starter's images are so quick that more would be a large share of one.
        lambda: train_predictor.main([str(STARTER_LABELS), str(STARTER_BUNDLE), str(folder), "--seeds", "1"]),
        lambda: predictor_onnx.main([str(folder / train_predictor.WEIGHTS), str(STARTER_BUNDLE)]),
        lambda: calibrate.main([str(STARTER_LABELS), str(STARTER_BUNDLE)]),
    )
    return _first_failure(steps)


def main(argv: Sequence[str] | None = None) -> int:
    """The chain's command; 0 when done, UNFINISHED when the next call has to go on."""
    parser = argparse.ArgumentParser(
        prog="edge-export starter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this, or with a STAGE its own options"
    )
    parser.add_argument("stage", nargs="?", default="all", metavar="STAGE")
    parser.add_argument("--work", type=Path, default=Path("runs/starter"), help="folder of checkpoints")
    parser.add_argument(
        "--seconds",
        type=float,
        help="stop training after this long, with exit code 75; the same command goes on from there",
    )
    options, rest = parser.parse_known_args(argv)
    work = options.work
    if options.help and options.stage in _WITHOUT_OPTIONS:
        parser.print_help()
        return 0
    if options.help:
        rest = ["--help"]

    def trained(train: Callable[..., bool], *size: Size) -> int:
        of_stage = argparse.ArgumentParser(
            prog=f"edge-export starter {options.stage}",
            epilog="It takes --work and --seconds too, as all stages do: see edge-export starter --help.",
        )
        of_stage.add_argument("--steps", type=at_least(1), help="training steps (default: the recipe's)")
        if train in (judge.train, inspector.train):
            of_stage.add_argument(
                "--autoencoder", type=Path, help="folder of the autoencoder (default: the recipe's)"
            )
        done = train(work, *size, seconds=options.seconds, **vars(of_stage.parse_args(rest)))
        return 0 if done else UNFINISHED

    stages: dict[str, Callable[[], int]] = {
        "autoencoder": lambda: trained(autoencoder.train),
        "decoder": lambda: trained(autoencoder.train_decoder),
        "edge-text": lambda: trained(text_encoder.train, EDGE),
        "cloud-text": lambda: trained(text_encoder.train, CLOUD),
        "sketch": lambda: _first_failure(
            [*(partial(trained, denoiser.train, size) for size in SKETCHES), partial(sketch.paint, work)]
        ),
        "judge": lambda: trained(judge.train),
        "inspector": lambda: trained(inspector.train),
        "edge": lambda: trained(denoiser.train, EDGE),
        "cloud": lambda: trained(denoiser.train, CLOUD),
        "install": lambda: install(work),
        "bundle": bundle,
        "label": lambda: label.main(
            ["--out", str(STARTER_LABELS), "--parts", str(work / "labels"), *LABELLING, *rest]
        ),
        "inspect": lambda: inspection.main(
            [str(STARTER_LABELS), str(work / "labels" / pieces.IMAGES), "--report", str(INSPECTION), *rest]
        ),
        "predictor": lambda: predictor(work),
        "evaluate": lambda: evaluate.main(
            [str(STARTER_LABELS), str(STARTER_BUNDLE), "--out", str(EVALUATION), *rest]
        ),
        "contact-sheet": lambda: contact_sheet.main(rest),
        "summary": lambda: summary.main(rest),
    }
    if rest and options.stage in _WITHOUT_OPTIONS:
        parser.error(f"the stage {options.stage} does not take {rest[0]}")
    if options.stage == "all":
        return _first_failure(stages.values())
    if options.stage == "sprites":
        return sprites.main(rest)
    if options.stage not in stages:
        parser.error(f"there is no stage {options.stage!r}; there are sprites, {', '.join(stages)} and all")
    return stages[options.stage]()


def _first_failure(stages: Iterable[Callable[[], int]]) -> int:
    for stage in stages:
        code = stage()
        if code == UNFINISHED:
            print(f"not finished (exit code {UNFINISHED}): the same command goes on from here")
        if code:
            return code
    return 0
