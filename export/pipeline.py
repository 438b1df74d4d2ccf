"""A diffusers pipeline that becomes a bundle: how it is loaded, its name and licence, its sizes, what it states."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from huggingface_hub import ModelCard

from cloud_server import complete, hub, model_index, part_files
from edge_agent.errors import quoted
from edge_agent.manifest import MANIFEST, AddedConditioning, JointConditioning, Size
from export import autoencoder as autoencoders
from export import source, weights_file
from export.errors import ExportError, reason
from export.schedule import Loop
from export.support import (
    CLASSES,
    KINDS,
    denoiser_of,
    idle,
    kind,
    origin,
    refuse_class,
    refuse_t5,
    refuse_unsupported,
    tell_of_checker,
)
from export.terminal import Report, silent

_DENOISERS = ("UNet2DConditionModel", "SD3Transformer2DModel")

T5_POSITIONS = 256
"""That Stable Diffusion 3 keeps for the states of its third text encoder; zeros where it does without, as diffusers
has it."""


def load(
    model: str | os.PathLike[str],
    *,
    without_t5: bool = False,
    parts: Mapping[str, Any] = {},
    report: Report = silent,
) -> Any:
    """The pipeline in `model`, a folder that diffusers saved or a hub id, on the CPU in float32.

    Args:
        without_t5: leave out the third text encoder of Stable Diffusion 3.
        parts: what takes the place of the model's own, which is not loaded, by name.
        report: gets a line before the hub is asked, which may take long, and one where there is a safety checker.

    Raises:
        ExportError: it is not there, incomplete, of an unsupported class, or the hub cannot be reached.
    """
    try:
        index = _index(model, report)
        refuse_t5(index["_class_name"], "text_encoder_3" in model_index.named(index), without_t5)
        made = CLASSES[index["_class_name"]]
        tell_of_checker(made, model_index.named(index), report)
        others = dict.fromkeys((*idle(made), *parts))
        with source.quiet():
            folder = Path(model) if Path(model).is_dir() else complete.downloaded(str(model), **others)
            _refuse_quantized(folder, [part for part in KINDS[made].parts if part not in parts])
            return complete.pipeline(folder, torch.float32, **left_out(made), **parts)
    except ExportError:
        raise
    except Exception as error:  # each part's library fails in its own way
        raise ExportError(f"{model} cannot be loaded as a diffusers pipeline: {reason(error)}") from error


def class_of(model: str | os.PathLike[str], report: Report = silent) -> Any:
    """The class of the pipeline in `model`, a folder or hub id. Raises ExportError as `load` does."""
    try:
        return CLASSES[_index(model, report)["_class_name"]]
    except OSError as error:
        raise ExportError(f"{model} cannot be loaded as a diffusers pipeline: {reason(error)}") from error


def left_out(made: type) -> dict[str, Any]:
    """What diffusers is told so that a pipeline of class `made` comes without the parts that the edge does not run."""
    unmarked = {"add_watermarker": False} if made is StableDiffusionXLPipeline else {}
    return dict.fromkeys(idle(made)) | unmarked


def prepared(
    pipeline: Any,
    autoencoder: str | os.PathLike[str] | None = None,
    *,
    without_t5: bool = False,
    report: Report = silent,
) -> Any:
    """A copy that shares the weights of `pipeline`, ready to be exported: a part can be replaced in it.

    Args:
        autoencoder: what takes the place of the pipeline's own, see `export.autoencoder`.
        without_t5: leave out the third text encoder of Stable Diffusion 3.
        report: gets a line before the hub is asked for the autoencoder, and one where there is a safety checker.

    Raises:
        ExportError: it is of an unsupported kind, or the autoencoder cannot be loaded.
    """
    refuse_class(type(pipeline).__name__)
    pipeline = copy.copy(pipeline)
    refuse_t5(type(pipeline).__name__, getattr(pipeline, "text_encoder_3", None) is not None, without_t5)
    left = [part for part in idle(type(pipeline)) if getattr(pipeline, part, None) is not None]
    tell_of_checker(type(pipeline), left, report)
    for part in idle(type(pipeline)):
        setattr(pipeline, part, None)
    with source.quiet():
        pipeline.to("cpu", torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.watermark = None  # an invisible one that diffusers puts on where a package for it is installed
    if autoencoder is not None:
        pipeline.vae = autoencoders.load(autoencoder, pipeline.vae, report)
    refuse_unsupported(pipeline)
    return pipeline


def name_of(model: Any) -> str:
    """The model's own name: the last part of where it was loaded from."""
    where = model.config.get("_name_or_path") if isinstance(model, DiffusionPipeline) else os.fspath(model)
    # Of "." too. Not `resolve`: a link's own name is the model's.
    path = Path(os.path.abspath(where or "unnamed"))  # noqa: PTH100
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):  # in the hub's cache
        return path.parents[1].name.rpartition("--")[2]
    return path.name


UNKNOWN = "unknown"


def licence_of(model: Any, report: Report = silent) -> str:
    """What the card of a folder or hub id says, as the hub writes it (apache-2.0); UNKNOWN where nobody says.

    `report` gets a line where the hub could not be asked.
    """
    if isinstance(model, DiffusionPipeline):
        return UNKNOWN
    if (file := source.card(model, "README.md")) is None:
        if hub.out_of_reach(model):
            report(
                f"the hub cannot be asked for the licence of {model}: it stays {UNKNOWN}; --licence names it"
            )
        return UNKNOWN
    try:
        said = ModelCard.load(file).data.to_dict()
    except Exception:  # the hub's library fails in its own ways; a card is prose, and no export fails for it
        return UNKNOWN
    licence = said.get("license_name") or said.get("license")
    return licence if isinstance(licence, str) and licence.strip() and licence.isprintable() else UNKNOWN


MAX_SIDE = 4096
"""Of an image, in pixels: four times Stable Diffusion XL's. What a larger one takes of memory and hours, no device that
runs a bundle has."""


def refuse_large(size: tuple[int, int]) -> None:
    """Raises ExportError where width or height is more than MAX_SIDE."""
    if max(size) > MAX_SIDE:
        raise ExportError(
            f"a size of {size[0]}x{size[1]} does not work: width and height are at most {MAX_SIDE}; name a smaller one "
            "with --size"
        )


def sizes_of(pipeline: Any, asked: Sequence[Size]) -> tuple[Size, ...]:
    """Width and height in pixels: those `asked`, each once, or the pipeline's own.

    Raises ExportError as `size_of` and `loop_of` do, and where the scheduler makes other timesteps for another size,
    which are compiled for one.
    """
    sizes = tuple(dict.fromkeys(size_of(pipeline, size) for size in asked)) or (size_of(pipeline, None),)
    if len({loop_of(pipeline, size) for size in sizes}) > 1:
        raise ExportError(
            f"{type(pipeline.scheduler).__name__} shifts its timesteps by the size, as the model's "
            "scheduler_config.json asks for with use_dynamic_shifting: name one size with --size, and export the model "
            "once for each"
        )
    return sizes


def size_of(pipeline: Any, size: Size | None) -> Size:
    """Width and height in pixels: `size`, or the pipeline's own.

    Raises ExportError when the denoiser cannot halve it as often as it does, it is above MAX_SIDE or what a transformer
    has positions for, or the pipeline does not name its own.
    """
    part, denoiser = denoiser_of(pipeline)
    transformer = part == "transformer"
    factor, own = pipeline.vae_scale_factor, denoiser.config.sample_size
    file = origin(pipeline) / part / "config.json"
    height, width = sides = tuple(own) if isinstance(own, (list, tuple)) and len(own) == 2 else (own, own)
    # Whatever is asked for: optimum traces at the model's own.
    if own is not None and not all(type(side) is int and side > 0 for side in sides):
        null = "" if transformer else ", or null, and name the image's with --size WIDTHxHEIGHT"
        raise ExportError(
            f"{file}: a sample_size of {own!r:.40} is none: write the side of the latents{null}"
        )
    if size is None and own is None:
        raise ExportError(f"{file} names no sample_size: name the image's with --size WIDTHxHEIGHT")
    wanted = size or (width * factor, height * factor)
    refuse_large(wanted)
    if size is None and not transformer:
        return wanted
    config = denoiser.config
    multiple = factor * (config.patch_size if transformer else 2 ** (len(config.block_out_channels) - 1))
    most = multiple * config.pos_embed_max_size if transformer else MAX_SIDE
    what = f"a size of {wanted[0]}x{wanted[1]}" + ("" if size else f", as {file} names it,")
    if any(side < multiple or side % multiple for side in wanted):
        raise ExportError(
            f"{what} does not work: width and height must be multiples of {multiple} for this model, such as "
            f"{_nearest(wanted[0], multiple)}x{_nearest(wanted[1], multiple)}"
        )
    if max(wanted) > most:
        raise ExportError(f"{what} does not work: this model knows positions up to {most}x{most}")
    return wanted


def networks(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The parts that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def loop_of(pipeline: Any, size: tuple[int, int]) -> Loop:
    """How `pipeline` drives its scheduler for images of `size` = width, height.

    Raises ExportError where it cannot shift its timesteps by the size as its config says.
    """
    loop, config = kind(pipeline).loop, pipeline.scheduler.config
    if loop.scales or not config.get("use_dynamic_shifting"):
        return loop
    name = type(pipeline.scheduler).__name__
    if "mu" not in inspect.signature(pipeline.scheduler.set_timesteps).parameters:
        raise ExportError(
            f"{name} does not shift its timesteps by the size, which the model's scheduler_config.json asks for with "
            "use_dynamic_shifting; name another with --scheduler, such as FlowMatchEulerDiscrete"
        )
    patch = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    # With what the pipeline itself takes where the config names nothing.
    shifts = [
        config.get(key, default)
        for key, default in (
            ("base_image_seq_len", 256),
            ("max_image_seq_len", 4096),
            ("base_shift", 0.5),
            ("max_shift", 1.16),
        )
    ]
    try:
        mu = float(calculate_shift((size[0] // patch) * (size[1] // patch), *shifts))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ExportError(
            f"{name} cannot shift its timesteps by the size: base_image_seq_len, max_image_seq_len, base_shift and "
            f"max_shift of its config are {', '.join(map(repr, shifts))}; write numbers, the first two apart"
        ) from error
    return replace(loop, mu=mu)


def facts(pipeline: Any, size: tuple[int, int]) -> dict[str, Any]:
    """What the manifest states of the models, for images of `size` = width, height."""
    vae, factor = pipeline.vae.config, pipeline.vae_scale_factor
    width, height = size
    stated = {
        "width": width,
        "height": height,
        "latent_channels": vae.latent_channels,
        "latent_height": height // factor,
        "latent_width": width // factor,
        "latent_scaling": float(vae.scaling_factor),
        "latent_shift": 0.0,  # only Stable Diffusion 3 adds the autoencoder's shift_factor
        "text_tokens": pipeline.tokenizer.model_max_length,
        "text_hidden": pipeline.text_encoder.config.hidden_size,
        "text_output": "last_hidden_state",
    }
    part, denoiser = denoiser_of(pipeline)
    if part == "unet":
        stated["guidance_embedding"] = denoiser.config.get("time_cond_proj_dim")
    if "text_encoder_2" not in kind(pipeline).parts:
        return stated
    first, second = pipeline.text_encoder.config, pipeline.text_encoder_2.config
    # The states before the last layer, as diffusers takes them.
    text_output = f"hidden_states.{second.num_hidden_layers - 1}"
    stated |= {
        "text_hidden": first.hidden_size + second.hidden_size,
        "text_output": f"hidden_states.{first.num_hidden_layers - 1}",
    }
    if part == "transformer":
        stated["latent_shift"] = float(vae.shift_factor)
        stated["joint"] = JointConditioning(
            text_output=text_output,
            pooled_output="text_embeds",
            positions=stated["text_tokens"] + T5_POSITIONS,
            hidden=denoiser.config.joint_attention_dim,
        )
    else:
        stated["added"] = AddedConditioning(
            text_output=text_output,
            pooled_output="text_embeds",
            time_ids=(float(height), float(width), 0.0, 0.0, float(height), float(width)),
            zero_negative=bool(pipeline.config.force_zeros_for_empty_prompt),
        )
    return stated


def _index(model: str | os.PathLike[str], report: Report) -> dict[str, Any]:
    """What the model_index.json of `model` says, whose _class_name is a supported one."""
    folder = Path(model)
    source.refuse_mistyped(model, "a diffusers pipeline")
    if folder.is_file() and folder.suffix not in weights_file.SUFFIXES:
        instead = f"name its folder, {folder.parent}" if folder.name == "model_index.json" else "name one"
        raise ExportError(f"{folder} is a file, and a pipeline is a folder: {instead}")
    if folder.is_file():
        raise ExportError(
            f"{folder} is a file, and a pipeline is a folder: make one with "
            f"edge-export convert {quoted(str(folder))} FOLDER"
        )
    if (folder / MANIFEST).is_file():
        raise ExportError(f"{folder} is a bundle already; name the diffusers folder that it was made from")
    if folder.is_dir() and not os.path.lexists(folder / "model_index.json"):
        raise ExportError(f"{folder} has no model_index.json: {_instead(folder)}")
    if folder.is_dir():
        try:
            part_files.refuse_absent(folder / "model_index.json")
            part_files.refuse_no_object(folder / "model_index.json")
        except ValueError as error:
            raise ExportError(str(error)) from error
    source.tell_of_hub(model, report)
    try:
        with source.quiet():
            index = DiffusionPipeline.load_config(os.fspath(model), local_files_only=hub.out_of_reach(model))
    except Exception as error:  # the hub's library fails in its own ways
        if isinstance(error, OSError) and error.filename is not None:
            raise  # names the file itself
        if folder.is_dir():
            raise ExportError(f"{folder / 'model_index.json'} cannot be read: {reason(error)}") from error
        raise ExportError(
            f"{model} cannot be loaded as a diffusers pipeline: {source.why_not(model, error)}"
        ) from error
    try:
        model_index.check(index)
    except ValueError as error:
        raise ExportError(f"{model} cannot be loaded as a diffusers pipeline: {error}") from error
    made = index.get("_class_name")
    if isinstance(made, (list, tuple)) and len(made) == 2:  # a file beside the index, and a class in it
        raise ExportError(
            f"{model} is of the class {made[1]}, code of its own that is not run; {', '.join(CLASSES)} are supported"
        )
    if not isinstance(made, str) or not made:
        raise ExportError(
            f"{model}: the _class_name in model_index.json must be a pipeline's class, not {made!r:.40}"
        )
    refuse_class(made, model_index.named(index))
    return dict(index)


def _instead(folder: Path) -> str:
    """What to do about a `folder` that is no pipeline, by what lies there."""
    snapshots = sorted(folder.glob("snapshots/*/model_index.json"), key=lambda file: file.stat().st_mtime)
    if snapshots:
        return f"name what the hub's cache has in it, {snapshots[-1].parent}"
    if (folder.parent / "model_index.json").is_file():
        return f"name the whole pipeline, {folder.parent}"
    if (folder / "adapter_config.json").is_file():
        return (
            "it holds an adapter alone: call fuse_lora() in the pipeline that it was made for, and save that"
        )
    weights = [file for file in folder.glob("*") if file.suffix in weights_file.SUFFIXES]
    for file in weights:
        if file.stem == "pytorch_lora_weights":
            return f"it holds a LoRA: add it with edge-export convert MODEL NEW --lora {quoted(str(file))}"
    if made := _part_in(folder):
        into = f", or put it into one with edge-export convert MODEL NEW --denoiser {quoted(str(folder))}"
        return f"it holds a {made} alone: name a whole pipeline{into if made in _DENOISERS else ''}"
    if len(weights) == 1:
        return f"make a pipeline of its one file with edge-export convert {quoted(str(weights[0]))} NEW"
    return "name a folder that diffusers saved, or a hub id"


def _part_in(folder: Path) -> str:
    """The class of the part of a pipeline that `folder` holds; empty where it holds none."""
    with suppress(OSError, RecursionError, TypeError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict):
            for made in (config.get("_class_name"), *(config.get("architectures") or ())):
                if isinstance(made, str) and made.isidentifier():
                    return made
    return ""


def _refuse_quantized(folder: Path, parts: Sequence[str]) -> None:
    """Raises ExportError where one of the `parts` in `folder` says that its weights are quantized. The libraries would
    ask for packages that do not make float32 of them either.
    """
    for file in (folder / part / "config.json" for part in parts):
        with suppress(OSError, RecursionError, ValueError):  # which loading tells
            config = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(config, dict) and (said := config.get("quantization_config")):
                how = said.get("quant_method") if isinstance(said, dict) else said
                raise ExportError(
                    f"{file} says that its weights are quantized ({how!r:.40}): get the model in float32 or "
                    "half precision"
                )


def _nearest(side: int, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def drop_origin(folder: Path) -> None:
    """Take out of the configs in `folder` where the weights lay on the exporting machine: nobody's business."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
