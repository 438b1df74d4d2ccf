"""A diffusers text-to-image pipeline becomes a bundle that the edge runs without torch.

    edge-export diffusion MODEL OUT [--steps 25,50] [--timesteps 999,...] [--guidance 7.5] [--scheduler NAME]
        [--size 512x512] [--dtype fp32|fp16|int8]

optimum traces the graphs (`export/graphs.py`); this adds the compiled schedules, a tokenizer.json for each
tokenizer and the manifest, and then runs the bundle against the torch pipeline. The bundle appears at OUT only
when their pixels agree; until then it is built beside it. A smaller one (`export/precision.py`) is made of that.

Two images of each size at the smallest step count are compared, one with guidance and a negative prompt and one
without guidance, which the denoiser draws as it was traced; the others are drawn by its second graph
(`export/attention.py`). One more of the default size has guidance and no negative prompt, as most requests do. Where
the default is another count, one is compared at that, with guidance. Other counts differ in their schedule alone, whose
matrix is checked against the scheduler for each count (`export/schedule.py`).
"""

from __future__ import annotations

import argparse
import gc
import inspect
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from edge_agent import tokens
from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.schedule import Schedule
from edge_agent.errors import BundleError, StoreError
from edge_agent.manifest import (
    CALIBRATION,
    DECODER,
    DENOISER,
    MANIFEST,
    MAX_SIZES,
    PREDICTOR,
    TRANSFORMER,
    Size,
    parse_manifest,
    schedule_file,
)
from edge_agent.request import MAX_GUIDANCE
from edge_agent.store import name_from
from export import attention, bands, folder, graphs, source, support, tokenizer_json
from export import pipeline as pipelines
from export.errors import ExportError
from export.preview import WORTH_SHOWING, fit_preview
from export.prompts import numbered_lines
from export.reference import (
    NEGATED,
    UNGUIDED,
    UNNEGATED,
    Comparison,
    Reference,
    largest_difference,
    reference_images,
)
from export.schedule import Steps, compile_schedule, number_of
from export.scheduler import choose_scheduler
from export.terminal import Report, say

PIXEL_TOLERANCE = 1e-3  # largest difference of any colour in 0..1, before rounding
LOUD = 1000  # times the image, a first noise of which float32 has too few digits for both
_FEW_DIGITS = (
    ": beside noise a thousand times as large, torch has few digits left for the image; name more steps, or "
    "--scheduler DDIM"
)
_EARLY_DEFAULT = (256, 256)  # of diffusers, when Stable Diffusion 1.x was saved

Shapes = Literal["dynamic", "fixed"]
Dtype = Literal["fp32", "fp16", "int8"]


def export_bundle(
    model: Any,
    out: str | os.PathLike[str],
    *,
    steps: Sequence[Steps] = (),
    guidance: float | None = None,
    scheduler: str | None = None,
    sizes: Sequence[Size] = (),
    shapes: Shapes = "dynamic",
    dtype: Dtype = "fp32",
    keep: Collection[str] = (),
    calibration_prompts: str | os.PathLike[str] | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
    without_t5: bool = False,
    name: str | None = None,
    licence: str | None = None,
    force: bool = False,
    report: Report = say,
) -> Bundle:
    """Write the bundle folder `out` and return it opened.

    Args:
        model: a pipeline, a folder that diffusers saved, or a hub id. A pipeline is left as it is, but for being on
            the CPU in float32, and for what tracing notes in its configs.
        steps: the step counts to compile, the default first, each as a number or as the timesteps of its steps; one
            that suits the pipeline's class if none is named.
        guidance: the default guidance scale; the default of the pipeline's class if None.
        scheduler: another than the model's own, see `export.scheduler`.
        sizes: width and height in pixels, of the default first; the model's own if none is named.
        shapes: "fixed" makes the graphs for this size and one image at a time, as TensorRT wants them.
        dtype: "fp16" or "int8" for a smaller bundle, made of the float32 one once that equals the pipeline.
        keep: the parts that stay float32 in it, by folder, such as "vae_decoder".
        calibration_prompts: a file, one prompt a line: what the ranges of int8 are found with.
        autoencoder: folder, hub id or file of an autoencoder that takes the place of the model's own.
        without_t5: leave out the third text encoder of Stable Diffusion 3, which the edge does not run.
        name, licence: what the manifest says of the models; what they are called, and what their card says, if None.
        force: replace a bundle that is there and holds nothing but what an export makes.
        report: gets one line for each stage.

    Raises:
        ExportError: the pipeline is of an unsupported kind, its scheduler is not linear, its tokenizer cannot be
            converted, the size, guidance, name or a part to keep does not suit it, `out` is taken, cannot be written
            or is being written by another export, or the bundle's pixels differ from the pipeline's, or those of the
            smaller one too much from the float32 one's. Nothing is left at `out`.
    """
    target = Path(out).resolve()  # "." has neither a name nor a folder beside it
    _refuse_taken(target, force)
    name = name or pipelines.name_of(model)
    _refuse_options(name, licence, guidance, sizes, shapes)
    if dtype == "fp32" and keep:
        raise ExportError("there is nothing to keep in fp32 without --dtype fp16 or int8")
    if dtype == "fp32" and calibration_prompts is not None:
        raise ExportError("there is nothing to calibrate in fp32 without --dtype fp16 or int8")
    prompts = (
        None
        if calibration_prompts is None
        else [line for _, line in numbered_lines(Path(calibration_prompts))]
    )
    with folder.beside(target, report) as partial:
        pipeline = _prepared(model, autoencoder, without_t5, scheduler, report)
        kind = support.kind(pipeline)
        _refuse_kept(keep, pipeline, dtype)
        asked, sizes = bool(sizes), pipelines.sizes_of(pipeline, sizes)
        size = sizes[0]
        if size == _EARLY_DEFAULT and not asked:
            report(
                "images of 256x256 pixels, as the model's config has it; many that say so were trained for 512x512: "
                "then name --size 512x512"
            )
        tokenizers = _tokenizers(pipeline, model, report)  # before what takes minutes
        by_count = _by_count(steps or (kind.steps,), pipeline)
        counts = list(by_count)
        scale = kind.guidance if guidance is None else float(guidance)
        schedules = _schedules(pipeline, by_count, size, report)
        report(f"running {type(pipeline).__name__} in torch, to compare with")
        negated, unguided, unnegated = _references(pipeline, by_count, scale, sizes)
        report("tracing the graphs")
        # One that is the caller's is left as it is.
        graphs.trace(pipeline, partial, sizes, report, consume=isinstance(model, (str, os.PathLike)))
        facts = pipelines.facts(pipeline, size)
        if shapes == "fixed":
            graphs.freeze(partial, facts)
        # For the default size: another one that is added is to leave the model digest as it is.
        if count := bands.split(partial / DECODER, facts["latent_height"], facts["latent_width"]):
            report(f"made bands of {count} convolutions of the decoder, between which it can be stopped")
        for schedule in schedules:
            path = partial / schedule_file(schedule.steps)
            path.parent.mkdir(exist_ok=True)
            schedule.save(path)
        for part, tokenizer in tokenizers.items():
            # Not its `save`, which says of a full disk what no OSError says.
            (partial / part / tokens.FILE).write_text(
                tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n"
            )
        facts |= {
            "latent_to_rgb": _latent_to_rgb([*negated, *unguided], report),
            "name": name,
            "licence": licence or pipelines.licence_of(model, report),
            "default_steps": counts[0],
            "default_guidance": scale,
            "steps": sorted(counts),
            "other_sizes": sizes[1:] or None,
        }
        write_manifest(partial, **facts)
        loudest = float(getattr(pipeline.scheduler, "init_noise_sigma", 1.0))
        del pipeline  # for whose memory the bundle has use
        gc.collect()
        _compare_and_fuse(partial, unguided, [*negated, *unnegated], loudest, report)
        if dtype != "fp32":
            from export import precision  # here: a float32 export need not wait for its tools

            report(f"turning the bundle into {dtype}")
            precision.shrink(partial, dtype, keep=keep, prompts=prompts, report=report)
        folder.open_to_all(partial)
        _refuse_taken(target, force)  # again: a predictor may have been put in meanwhile
        folder.move(partial, target)
    report(f"wrote {target}, which a pull will call {name_from(name)}; --name gives it another name")
    return Bundle.open(target)


def _refuse_options(
    name: str, licence: str | None, guidance: float | None, sizes: Sequence[Size], shapes: Shapes
) -> None:
    if not name.isprintable():
        raise ExportError(f"a name of {name!r} does not work: it must be printable text on one line")
    try:
        name_from(name)  # what a pull will call it
    except StoreError as error:
        raise ExportError(error.message) from error
    if licence is not None and (not licence.strip() or not licence.isprintable()):
        raise ExportError(f"a licence of {licence!r} does not work: it must be printable text on one line")
    if guidance is not None and not 0 <= guidance <= MAX_GUIDANCE:
        raise ExportError(
            f"a guidance scale of {guidance:g} does not work: the edge takes 0 to {MAX_GUIDANCE:g}"
        )
    for each in sizes:
        pipelines.refuse_large(each)
    if len(set(sizes)) > 1 + MAX_SIZES:
        raise ExportError(f"a bundle makes images of {1 + MAX_SIZES} sizes at most, not {len(set(sizes))}")
    if shapes == "fixed" and len(set(sizes)) > 1:
        raise ExportError("graphs of fixed shapes make images of one size: name one with --size")


def _prepared(
    model: Any,
    autoencoder: str | os.PathLike[str] | None,
    without_t5: bool,
    scheduler: str | None,
    report: Report,
) -> Any:
    """The pipeline to export, with the scheduler and the autoencoder that are asked for. Raises ExportError."""
    if isinstance(model, (str, os.PathLike)):
        model = pipelines.load(model, without_t5=without_t5, report=report)
    pipeline = pipelines.prepared(model, autoencoder, without_t5=without_t5, report=report)
    own = pipeline.scheduler
    if scheduler is not None:
        with source.quiet():
            pipeline.scheduler = choose_scheduler(own, scheduler)
    support.refuse_scheduler(pipeline, own)
    return pipeline


def _schedules(pipeline: Any, by_count: Mapping[int, Steps], size: Size, report: Report) -> list[Schedule]:
    """Compiled; the most steps first: where they are too many, nothing is compiled. Raises ExportError."""
    report(f"compiling {type(pipeline.scheduler).__name__} for {', '.join(map(str, by_count))} steps")
    loop = pipelines.loop_of(pipeline, size)
    with source.quiet():
        return [
            compile_schedule(pipeline.scheduler, by_count[count], loop)
            for count in sorted(by_count, reverse=True)
        ]


def _references(
    pipeline: Any, by_count: Mapping[int, Steps], scale: float, sizes: Sequence[Size]
) -> tuple[list[Reference], list[Reference], list[Reference]]:
    """Images of the pipeline to compare with: NEGATED ones, UNGUIDED ones, and one that is UNNEGATED, if it can be."""
    default, fewest = next(iter(by_count)), min(by_count)

    def made(comparison: Comparison, count: int = fewest, size: Size = sizes[0]) -> Reference:
        (image,) = reference_images(pipeline, by_count[count], scale, size, [comparison])
        return image

    negated = [made(NEGATED, size=each) for each in sizes]
    unguided = [made(UNGUIDED, size=each) for each in sizes]
    if default > fewest:
        # One image: they take longer, and differ from the first in their number of steps alone.
        negated.append(made(NEGATED, default))
    # Of one size: what no negative prompt is does not depend on it.
    unnegated = [made(UNNEGATED)] if support.kind(pipeline).takes_negative else []
    return negated, unguided, unnegated


def _latent_to_rgb(
    references: Sequence[Reference], report: Report
) -> tuple[tuple[float, float, float], ...] | None:
    """The rows of the map that previews use; None where it shows too little of the picture."""
    preview = fit_preview(references)
    shown = preview.explained >= WORTH_SHOWING
    report(
        f"a linear map explains {max(0.0, preview.explained):.0%} of the colours: previews "
        + ("use it" if shown else "run the decoder")
    )
    return preview.rows if shown else None


def _compare_and_fuse(
    partial: Path, unguided: Sequence[Reference], others: Sequence[Reference], loudest: float, report: Report
) -> None:
    """Hold the denoiser as it was traced to the `unguided` references, and with attention as one operator to the
    others. Raises ExportError.
    """
    report("comparing pixels with the torch pipeline")
    bundle = Bundle.open(partial)
    difference = largest_difference(bundle, unguided)
    if count := attention.fuse(bundle.path(bundle.manifest.denoiser)):
        report(f"made each of {count} attentions one operator, in a second graph over the same weights")
    else:
        report("no attention is of the kind that can be one operator, so that there is no second graph")
    write_manifest(partial)
    difference = max(difference, largest_difference(Bundle.open(partial), others))
    report(f"largest difference {difference:.1e} of {PIXEL_TOLERANCE:.0e} allowed")
    if difference > PIXEL_TOLERANCE:
        raise ExportError(
            f"the bundle's pixels differ from the torch pipeline's by {difference:.1e}; not written"
            + (_FEW_DIGITS if loudest > LOUD else "")
        )


def _tokenizers(pipeline: Any, model: Any, report: Report) -> dict[str, Any]:
    """The converted tokenizers by their folders. Raises ExportError, naming the folder."""
    converted = {}
    for part in support.kind(pipeline).parts:
        if part.startswith("tokenizer"):
            where = Path(model, part) if isinstance(model, (str, os.PathLike)) else part
            try:
                converted[part] = tokenizer_json.convert(getattr(pipeline, part))
            except ExportError as error:
                raise ExportError(f"{where}: {error}") from error
            if unmade := tokenizer_json.unmade(getattr(pipeline, part)):
                report(
                    f"{where}: no line of merges.txt makes {unmade[0]!r} and {len(unmade) - 1} more tokens of "
                    "vocab.json: it may be cut off, and prompts would be read in pieces"
                )
    return converted


def _refuse_kept(keep: Collection[str], pipeline: Any, dtype: Dtype) -> None:
    models = [part for part in support.kind(pipeline).parts if hasattr(getattr(pipeline, part), "parameters")]
    parts = sorted("vae_decoder" if part == "vae" else part for part in models)
    if unknown := sorted(set(keep) - set(parts)):
        raise ExportError(f"--keep: the bundle has no {', '.join(unknown)}; its parts are {', '.join(parts)}")
    if set(keep) == set(parts):
        raise ExportError(
            f"--keep names every part, so that nothing would be {dtype}: leave --dtype out, or keep fewer parts"
        )


def _refuse_taken(target: Path, force: bool) -> None:
    folder.refuse_unusable(target, "the bundle")
    for parent in target.parents:
        if (parent / MANIFEST).is_file() and any(
            map(Path.is_file, (parent / DENOISER, parent / TRANSFORMER))
        ):
            raise ExportError(f"{target} lies in the bundle {parent}; name a folder outside of it")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise ExportError(f"{target} is there and is not a bundle; name a new folder")
    if not force:
        raise ExportError(f"{target} holds a bundle already; name a new folder, or replace it with --force")
    if others := _not_exported(target):
        more = f" and {len(others) - 3} more" if others[3:] else ""
        raise ExportError(
            f"{target} also holds {', '.join(others[:3])}{more}, which no export makes and --force would delete; move "
            "the folder away, or name a new one"
        )


def _not_exported(bundle: Path) -> list[str]:
    """What lies in the folder besides an export: predictor and calibration, and what the manifest does not list."""
    try:
        listed = parse_manifest((bundle / MANIFEST).read_bytes(), bundle / MANIFEST).files
    except BundleError as error:
        raise ExportError(f"{error.message}; move it away, or name a new folder") from error
    exported = {MANIFEST, *(name for name in listed if name not in (PREDICTOR, CALIBRATION))}
    found = (path for path in sorted(bundle.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [name for path in found if (name := path.relative_to(bundle).as_posix()) not in exported]


def _by_count(steps: Sequence[Steps], pipeline: Any) -> dict[int, Steps]:
    """`steps` by how many they are. Raises ExportError where a count has two schedules, or the pipeline takes none."""
    found: dict[int, Steps] = {}
    for each in steps:
        if found.setdefault(number := number_of(each), each) != each:
            raise ExportError(f"a bundle has one schedule of {number} steps: leave one of two out")
        if not isinstance(each, int) and "timesteps" not in inspect.signature(pipeline.__call__).parameters:
            raise ExportError(f"{type(pipeline).__name__} takes no --timesteps: name --steps")
    return found


def _timesteps(text: str) -> tuple[int, ...]:
    timesteps = _whole_numbers(text)
    if not timesteps or min(timesteps) < 0 or any(later >= one for one, later in pairwise(timesteps)):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of falling timesteps, such as 999,749,499,249")
    return timesteps


def _counts(text: str) -> tuple[int, ...]:
    counts = _whole_numbers(text)
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of step counts of at least 1, such as 25,50")
    return counts


def _whole_numbers(text: str) -> tuple[int, ...]:
    """Those between commas; none where something else is there."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        return ()


def _sizes(text: str) -> tuple[Size, ...]:
    sizes = []
    for each in text.lower().split(","):
        try:
            width, height = (int(part) for part in each.split("x"))
        except ValueError:
            width = height = 0
        if min(width, height) < 1:
            raise argparse.ArgumentTypeError(f"{each!r} is no WIDTHxHEIGHT of at least 1x1, such as 512x512")
        sizes.append((width, height))
    return tuple(sizes)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage; returns the exit code. Raises ExportError for what it refuses."""
    parser = argparse.ArgumentParser(prog="edge-export diffusion", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="folder that diffusers saved, or hub id")
    parser.add_argument("out", metavar="OUT", help="bundle folder to write")
    parser.add_argument(
        "--steps",
        type=_counts,
        default=(),
        help="step counts to compile, the first is the default: 25,50, or 1,2,4 for SD-Turbo; by default 25, for "
        "Stable Diffusion 3 28, for latent consistency models 4",
    )
    parser.add_argument(
        "--timesteps",
        action="append",
        default=[],
        type=_timesteps,
        metavar="T,T,...",
        help="the timesteps of each step, as they were found for some models to need few steps, in place of what the "
        "scheduler chooses for their number; may repeat. The default where there are no --steps",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        help="default guidance scale; by default that of the model's class in diffusers. Give 0 for models that were "
        "distilled not to need it, such as SD-Turbo",
    )
    parser.add_argument(
        "--scheduler",
        metavar="NAME[:KEY=VALUE,...]",
        help="another diffusers scheduler, from the model's own config with these changes",
    )
    parser.add_argument(
        "--size",
        dest="sizes",
        type=_sizes,
        default=(),
        metavar="WIDTHxHEIGHT",
        help="image sizes in pixels, the first is the default: 512x512 or 512x512,512x768,768x512; the model's own by "
        "default. Each is compared with the pipeline",
    )
    parser.add_argument(
        "--shapes",
        choices=("dynamic", "fixed"),
        default="dynamic",
        help="dynamic: one graph for every size, and for one image or two, so that guidance can run both prompts in "
        "one pass; fixed: graphs for one size and one image at a time, as TensorRT wants them, which optimum's "
        "ORTDiffusionPipeline runs only without guidance. Default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        default="fp32",
        help="fp16: 50 to 60 %% of the bytes, for GPUs; int8: 30 to 50 %%, for CPUs only; docs/precision.md says what "
        "they cost",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PART",
        help="with --dtype, leave this part in fp32, such as text_encoder or vae_decoder; may repeat",
    )
    parser.add_argument(
        "--calibration-prompts",
        metavar="FILE",
        help="prompts, one a line, to find the ranges of int8 with; by default a dozen about everyday things",
    )
    parser.add_argument(
        "--autoencoder",
        metavar="MODEL",
        help="folder, hub id or file of an autoencoder to decode with, such as a tiny one; the model's own by default",
    )
    parser.add_argument(
        "--without-t5",
        action="store_true",
        help="leave out the third text encoder of Stable Diffusion 3, a T5 of 4.8 billion weights, which the edge does "
        "not run; the model was trained to do without it",
    )
    parser.add_argument("--name", help="name in the manifest; the model's own by default")
    parser.add_argument(
        "--licence",
        help="licence in the manifest, as an SPDX id; by default what the model's card says, its README.md",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the bundle at OUT, if it holds nothing but what this command makes",
    )
    options = vars(parser.parse_args(argv))
    options["steps"] = (*options["steps"], *options.pop("timesteps"))
    export_bundle(options.pop("model"), options.pop("out"), **options)
    return 0
