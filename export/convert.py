"""A single file of weights, or a model with what was made for it, becomes a diffusers folder, as all commands read.

    edge-export convert MODEL FOLDER [--base MODEL] [--denoiser MODEL] [--lora FILE[=SCALE]]
        [--embedding FILE[=NAME]] [--clip-skip N] [--scheduler NAME]

diffusers converts and fuses; this refuses what it passes over: a weight that the file lacks, one that the model has no
use for, and layers of a LoRA that it does not have.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from cloud_server import complete, hub, part_files
from export import denoiser as denoisers
from export import embedding, folder, lora, single_file, source, support, weights_file
from export import pipeline as pipelines
from export.errors import ExportError
from export.scheduler import believed, choose_scheduler, refuse_unable
from export.terminal import Report, say

CARD = "routet2i.json"  # what the cloud server makes by default
CARDS = ("README.md", CARD)  # the first has the licence


def convert(
    model: str,
    out: str,
    *,
    base: str | None = None,
    denoiser: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    embeddings: Sequence[tuple[str, str | None]] = (),
    clip_skip: int = 1,
    scheduler: str | None = None,
    report: Report = say,
) -> None:
    """Write `model` as a diffusers folder at `out`, each part in half precision where its weights are.

    Args:
        model: a file with the weights of a whole model, a folder that diffusers saved, or a hub id.
        out: the folder to write.
        base: where configs and tokenizers of a single file come from, a folder or hub id; the hub's, of the model that
            diffusers takes the file to descend from, if None.
        denoiser: what takes the place of the model's own, see `export.denoiser`.
        loras: files or hub ids, each with the scale that its changes are fused with.
        embeddings: files or hub ids, each with the name that is to stand for it in prompts, None for its own.
        clip_skip: the layer of the text encoder that is to drive the denoiser, counted from the last, which is 1; those
            after it are left out.
        scheduler: another than the model's own, see `export.scheduler`.
        report: gets one line for each step.

    Raises:
        ExportError: `model` lacks weights or is of an unsupported class, what is added does not fit it, the scheduler
            is none, or `out` is taken or cannot be written. Nothing is left at `out`.
    """
    target = Path(out).resolve()
    folder.refuse_unusable(target, "the model")
    _refuse_taken(target)
    single = Path(model).is_file()
    if base is not None and not single:
        raise ExportError(f"--base is for a single file, and {model} is none: it has its own configs")
    with folder.beside(target, report) as partial:
        # Before what takes long.
        changes = [(lora.located(name), name, scale) for name, scale in loras]
        concepts = [(embedding.located(name), name, known_as) for name, known_as in embeddings]
        names = list(weights_file.types(Path(model))) if single else []
        base = single_file.base_of(Path(model), names, base, report) if single else model
        made = pipelines.class_of(base, report)
        if embeddings:
            embedding.refuse_class(made)
        if clip_skip != 1 and "text_encoder_2" in support.KINDS[made].parts:
            raise ExportError(f"--clip-skip is for models of one text encoder, and {made.__name__} has two")
        parts, kept_in = {}, {}
        if denoiser is not None:
            part = support.denoiser_part(made)
            parts[part], kept_in[part] = denoisers.load(denoiser, part, base, report)
            if loras:
                parts[part].float()
        if single and not any(name.startswith(source.BEGINNINGS["vae"]) for name in names):
            report(f"{model} has no autoencoder: taking that of {base}")
            parts["vae"], kept_in["vae"] = _autoencoder(base)
        if single:
            with folder.scratch(target) as scratch:
                pipeline = single_file.load(Path(model), names, base, made, parts, scratch)
        else:
            without_t5 = made is StableDiffusion3Pipeline
            pipeline = pipelines.load(model, without_t5=without_t5, parts=parts, report=report)
        _reschedule(pipeline, denoisers.markers(denoiser or model), scheduler, report)
        for file, name, scale in changes:
            report(f"fusing {name}" + ("" if scale == 1 else f", {scale:g} of it"))
            lora.fuse(pipeline, file, scale)
        for file, name, known_as in concepts:
            report(f"adding {name}: write {embedding.add(pipeline, file, known_as)} in prompts")
        if clip_skip != 1:
            _skip(pipeline.text_encoder, clip_skip - 1)
        report(f"writing {type(pipeline).__name__}")
        _save(pipeline, kept_in, Path(model) if single else None, partial)
        for name in CARDS if not single else ():
            if card := source.card(model, name):
                shutil.copyfile(card, partial / name)
        if (partial / CARD).is_file() and (denoiser or loras or scheduler):
            report(f"kept {CARD}: look whether its steps and guidance scale still suit the model")
        folder.open_to_all(partial)
        _refuse_taken(target)  # again: something may have been put there meanwhile
        folder.move(partial, target)
    report(f"wrote {target}")


def _refuse_taken(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ExportError(f"{target} is there; name a new folder")


def _reschedule(pipeline: Any, markers: Collection[str], scheduler: str | None, report: Report) -> None:
    """Have `pipeline` the scheduler that is asked for, or that the `markers` of its denoiser's file tell of."""
    with source.quiet():
        pipeline.scheduler = believed(pipeline.scheduler, markers)
        if scheduler is not None:
            pipeline.scheduler = choose_scheduler(pipeline.scheduler, scheduler)
    if markers:
        refuse_unable(pipeline.scheduler, markers)
        predicts = pipeline.scheduler.config.get("prediction_type")
        report(f"the file says {' and '.join(markers)}: {type(pipeline.scheduler).__name__}, {predicts}")


def _save(pipeline: Any, kept_in: Mapping[str, Path], single: Path | None, out: Path) -> None:
    """Write `pipeline` to `out`, each network in the type of the weights it was made of: those in `kept_in`, of the
    `single` file, or of its own folder.
    """
    with source.quiet():
        for part, network in pipelines.networks(pipeline).items():
            dtype = _stored(kept_in.get(part, single or support.origin(pipeline) / part), part)
            network.to(dtype)
            _refuse_infinite(network, part, dtype)
        pipeline.save_pretrained(out)
    pipelines.drop_origin(out)


def _autoencoder(base: str) -> tuple[Any, Path]:
    """That of `base`, and the folder that its weights are in."""
    try:
        with source.quiet(logging.ERROR), complete.bars_on_terminals_alone():
            kept = hub.out_of_reach(base)
            autoencoder = source.whole(AutoencoderKL, base, subfolder="vae", local_files_only=kept)
            return autoencoder, source.loaded_from(base, f"vae/{AutoencoderKL.config_name}")
    except Exception as error:  # each library fails in its own ways
        raise ExportError(f"{base} gives no autoencoder: {source.why_not(base, error)}") from error


def _skip(encoder: Any, last: int) -> None:
    """Leave out so many of its last layers. Its last norm remains, as where diffusers is told to skip some."""
    stack = next(
        part for part in encoder.modules() if isinstance(getattr(part, "layers", None), torch.nn.ModuleList)
    )
    kept = len(stack.layers) - last
    if kept < 1:
        raise ExportError(f"the text encoder has {len(stack.layers)} layers: --clip-skip goes from 1 to that")
    stack.layers = stack.layers[:kept]
    encoder.config.num_hidden_layers = kept


def _refuse_infinite(network: torch.nn.Module, part: str, dtype: torch.dtype) -> None:
    held = "in half precision " if dtype is not torch.float32 else ""
    for name, weight in network.named_parameters():
        if not weight.isfinite().all():
            raise ExportError(
                f"the {part}'s {name} is {held}no finite number: a file is damaged, or what it adds is too large"
            )


def _stored(where: Path, part: str) -> torch.dtype:
    """The type of the weights of `part` in a file or folder: half precision where none is in float32."""
    files = [where] if where.is_file() else part_files.weights_at(where)
    held = {name: dtype for file in files for name, dtype in weights_file.types(file).items()}
    for marker in denoisers.MARKERS:
        held.pop(marker, None)
    # Only in a whole model's file do names begin with their part's.
    beginnings = source.BEGINNINGS.get(part, source.ENCODERS)
    types = {dtype for name, dtype in held.items() if name.startswith(beginnings)} or set(held.values())
    halves = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in types]
    return halves[0] if halves and torch.float32 not in types else torch.float32


def _scaled(text: str) -> tuple[str, float]:
    name, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        share = float(scale)
    except ValueError:
        share = math.nan
    if not math.isfinite(share):
        raise argparse.ArgumentTypeError(f"{scale!r} is no scale; write FILE=0.8")
    return name, share


def _named(text: str) -> tuple[str, str | None]:
    file, equals, name = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, None
    if not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; write FILE=NAME, or FILE alone")
    return file, name.strip()


def _layer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no layer counted from the last, such as 2")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage; returns the exit code. Raises ExportError for what it refuses."""
    parser = argparse.ArgumentParser(prog="edge-export convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a fine-tune's .safetensors or .ckpt file, or, to add to it, the folder or hub id of a diffusers pipeline",
    )
    parser.add_argument("out", metavar="FOLDER", help="folder to write, of a diffusers pipeline")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="folder or hub id of the model that a single file descends from, whose configs and tokenizers it shares; "
        "by default found out from its weights, and fetched from the hub",
    )
    parser.add_argument(
        "--denoiser",
        metavar="MODEL",
        help="a denoiser that takes the place of the model's own, such as one distilled to few steps: a file "
        "of its weights alone, a folder that diffusers saved, or a hub id",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_scaled,
        dest="loras",
        metavar="FILE[=SCALE]",
        help="a LoRA to fuse with the model, wholly or to a share such as 0.8: a file, or a hub id; may repeat",
    )
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        type=_named,
        dest="embeddings",
        metavar="FILE[=NAME]",
        help="a concept that was learnt by textual inversion, a file or a hub id, and the name that stands for it in "
        "prompts, if not its own; may repeat",
    )
    parser.add_argument(
        "--clip-skip",
        type=_layer,
        default=1,
        metavar="N",
        help="the layer of the text encoder that drives the model, counted from the last as fine-tunes' pages do: 2 "
        "leaves the last one out. Default: %(default)s",
    )
    parser.add_argument(
        "--scheduler",
        metavar="NAME[:KEY=VALUE,...]",
        help="another diffusers scheduler, from the model's own config with these changes; an LCM's LoRA wants LCM",
    )
    options = vars(parser.parse_args(argv))
    convert(options.pop("model"), options.pop("out"), **options)
    return 0
