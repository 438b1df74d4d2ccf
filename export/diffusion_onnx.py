"""A diffusers Stable Diffusion pipeline becomes a bundle that the edge runs without torch.

    python -m export.diffusion_onnx MODEL OUT [--steps 25,50] [--guidance 7.5] [--name NAME] [--licence ID]

optimum traces the graphs; this adds the compiled schedules, one tokenizer.json and the manifest, and then
runs the bundle against the torch pipeline. The bundle appears at OUT only when their pixels agree; until
then it is built beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from numpy.typing import NDArray

from edge_agent.bundle import MANIFEST, Bundle, schedule_file, write_manifest
from edge_agent.diffusion.generator import Generator, Image
from edge_agent.errors import BundleError, GenerationFailed
from export import tokenizer_json
from export.errors import ExportError
from export.schedule import compile_schedule

PIXEL_TOLERANCE = 1e-3  # largest difference of any colour in 0..1, before rounding
DEFAULT_STEPS = (25,)
DEFAULT_GUIDANCE = 7.5

# Compared with the torch pipeline after an export: prompt, negative prompt, seed, guided or not.
_COMPARISONS = (
    ("a red cat and two dogs on the beach 🐈", "blurry, dark", 1234567, True),
    ("the moon", "", 0, False),
)

Report = Callable[[str], None]


def export_bundle(
    model: str | os.PathLike[str] | StableDiffusionPipeline,
    out: str | os.PathLike[str],
    *,
    steps: Sequence[int] = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    name: str | None = None,
    licence: str = "unknown",
    force: bool = False,
    report: Report = print,
) -> Bundle:
    """Write the bundle folder `out` and return it opened.

    Args:
        model: a pipeline, a folder that diffusers saved, or a hub id.
        steps: the step counts to compile; the first is the default.
        guidance: the default guidance scale.
        name, licence: what the manifest says of the models.
        force: replace a bundle that is there.
        report: gets one line for each stage.

    Raises:
        ExportError: the pipeline is of an unsupported kind, its scheduler is not linear, its tokenizer
        cannot be
            converted, `out` is taken, or the bundle's pixels differ from the pipeline's. Nothing is left at
            `out`.
    """
    target = Path(out)
    _refuse_taken(target, force)
    pipeline = model if isinstance(model, StableDiffusionPipeline) else _load(model)
    with _quiet():
        pipeline.to("cpu", torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    _refuse_unsupported(pipeline)
    counts = list(dict.fromkeys(steps))
    schedules = [compile_schedule(pipeline.scheduler, count) for count in counts]
    references = reference_images(pipeline, min(counts), guidance)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the move at the end is one rename on one disk.
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's 0700 would keep other users from a finished bundle
        report("tracing text encoder, denoiser and decoder")
        _trace(pipeline, partial)
        report(f"compiling {type(pipeline.scheduler).__name__} for {', '.join(map(str, counts))} steps")
        for schedule in schedules:
            path = partial / schedule_file(schedule.steps)
            path.parent.mkdir(exist_ok=True)
            schedule.save(path)
        tokenizer_json.write(pipeline.tokenizer, partial / "tokenizer")
        facts = _facts(pipeline) | {
            "name": name or _name(model),
            "licence": licence,
            "default_steps": counts[0],
            "default_guidance": float(guidance),
            "steps": sorted(counts),
        }
        write_manifest(partial, **facts)
        report("comparing pixels with the torch pipeline")
        difference = largest_difference(Bundle.open(partial), references)
        report(f"largest difference {difference:.1e} of {PIXEL_TOLERANCE:.0e} allowed")
        if difference > PIXEL_TOLERANCE:
            raise ExportError(
                f"the bundle's pixels differ from the torch pipeline's by {difference:.1e}; not written"
            )
        _move(partial, target)
    except (BundleError, GenerationFailed) as error:
        raise ExportError(error.message) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"wrote {target}")
    return Bundle.open(target)


@dataclass(frozen=True)
class Reference:
    """An image that the torch pipeline made, and from what."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    colours: NDArray[np.float32]  # [H, W, 3] in 0..1, before rounding


def reference_images(pipeline: StableDiffusionPipeline, steps: int, guidance: float) -> list[Reference]:
    """Images of `pipeline` in its own size: with `guidance` and a negative prompt, and without.

    Raises ExportError when one of them has numbers that are not finite.
    """
    references = []
    for prompt, negative, seed, guided in _COMPARISONS:
        scale = max(guidance, 1.5) if guided else 1.0
        colours = pipeline(
            prompt,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        ).images[0]
        if not np.isfinite(colours).all():
            raise ExportError("the torch pipeline gives numbers that are not finite in float32")
        references.append(Reference(prompt, negative, seed, steps, scale, colours))
    return references


def largest_difference(bundle: Bundle, references: Sequence[Reference]) -> float:
    """Largest difference of any colour in 0..1 between the images of `bundle` and `references`.

    Raises GenerationFailed when the bundle gives numbers that are not finite.
    """
    generator = Generator(bundle)
    worst = 0.0
    for reference in references:
        _, states = generator.encode(reference.prompt)
        _, negative = generator.encode(reference.negative)
        *_, image = generator.generate(states, negative, reference.seed, reference.steps, reference.guidance)
        assert isinstance(image, Image)
        worst = max(worst, float(np.abs(image.colours - reference.colours).max()))
    return worst


def _load(model: str | os.PathLike[str]) -> Any:
    folder = Path(model)
    if (folder / "model_index.json").is_file():
        for name, part in DiffusionPipeline.load_config(folder).items():
            if isinstance(part, list) and part[0] is not None and not (folder / name).is_dir():
                raise ExportError(f"{folder} has no {name}, which its model_index.json names")
    try:
        return DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    except Exception as error:  # each part's library fails in its own way
        reason = str(error).strip().split("\n")[0]
        raise ExportError(
            f"{model} cannot be loaded as a diffusers pipeline (folder or hub id): {reason}"
        ) from error


def _refuse_taken(target: Path, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise ExportError(f"{target} is there and is not a bundle; name a new folder")
    if not force:
        raise ExportError(f"{target} holds a bundle already; name a new folder, or replace it with --force")


def _refuse_unsupported(pipeline: Any) -> None:
    if type(pipeline) is not StableDiffusionPipeline:
        raise ExportError(f"{type(pipeline).__name__} is not supported; StableDiffusionPipeline is")
    for part in ("tokenizer", "text_encoder", "unet", "vae", "scheduler"):
        if getattr(pipeline, part, None) is None:
            raise ExportError(f"the pipeline has no {part}")
    unet = pipeline.unet.config
    checks = {
        "a text encoder that masks padding": getattr(
            pipeline.text_encoder.config, "use_attention_mask", None
        ),
        "guidance embedded in the timestep (latent consistency models)": unet.get("time_cond_proj_dim"),
        "added conditioning": unet.get("addition_embed_type") or unet.get("class_embed_type"),
        "input channels other than the latents'": unet.in_channels != pipeline.vae.config.latent_channels,
        "a predicted variance": unet.out_channels != unet.in_channels,
    }
    for what, found in checks.items():
        if found:
            raise ExportError(f"{what} is not supported")
    if not hasattr(pipeline.vae.config, "scaling_factor"):
        raise ExportError(f"{type(pipeline.vae).__name__} names no scaling_factor")


def _trace(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    with _quiet():
        # Here, because importing it takes seconds that a refusal should not cost.
        from optimum.exporters.onnx.convert import onnx_export_from_model

        try:
            # Validation is ours: the whole line is compared, not graph by graph on random inputs.
            onnx_export_from_model(pipeline, output=folder, task="text-to-image", do_validation=False)
        except OSError:
            raise  # a full disk says so itself
        except Exception as error:  # torch and optimum fail in many ways
            raise ExportError(f"optimum cannot trace the pipeline: {error}") from error
    shutil.rmtree(folder / "vae_encoder", ignore_errors=True)  # text to image never encodes an image
    # Where the weights lay on the exporting machine is nobody's business.
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of every Python branch in the models; the comparison of pixels decides instead."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _facts(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    vae = pipeline.vae.config
    size = pipeline.unet.config.sample_size
    latent_height, latent_width = (size, size) if isinstance(size, int) else size
    factor = pipeline.vae_scale_factor
    return {
        "width": latent_width * factor,
        "height": latent_height * factor,
        "latent_channels": vae.latent_channels,
        "latent_height": latent_height,
        "latent_width": latent_width,
        "latent_scaling": float(vae.scaling_factor),
        "latent_shift": 0.0,  # StableDiffusionPipeline does not add the autoencoder's shift_factor
        "text_tokens": pipeline.tokenizer.model_max_length,
        "text_hidden": pipeline.text_encoder.config.hidden_size,
        "text_output": "last_hidden_state",
    }


def _name(model: Any) -> str:
    where = (
        model.config.get("_name_or_path") if isinstance(model, StableDiffusionPipeline) else os.fspath(model)
    )
    return Path(where or "unnamed").name


def _move(partial: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        partial.replace(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.replace(old)
    partial.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise ValueError(text)
    return counts


_counts.__name__ = "list of step counts"  # argparse names the type in its message


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this stage; returns the exit code. Raises ExportError for what it refuses."""
    parser = argparse.ArgumentParser(prog="edge-export diffusion", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="folder that diffusers saved, or hub id")
    parser.add_argument("out", metavar="OUT", help="bundle folder to write")
    parser.add_argument(
        "--steps",
        type=_counts,
        default=DEFAULT_STEPS,
        help="step counts to compile, the first is the default: 25,50",
    )
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE, help="default guidance scale")
    parser.add_argument("--name", help="name in the manifest; the model's own by default")
    parser.add_argument("--licence", default="unknown", help="licence in the manifest, as an SPDX id")
    parser.add_argument("--force", action="store_true", help="replace the bundle at OUT")
    options = vars(parser.parse_args(argv))
    export_bundle(options.pop("model"), options.pop("out"), **options)
    return 0


if __name__ == "__main__":
    from export.__main__ import run

    raise SystemExit(run(main))
