"""The diffusers pipelines that can become a bundle: which they are, how they are loaded, what they state."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from huggingface_hub import ModelCard
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from cloud_server import complete, hub
from edge_agent import tokens
from edge_agent.bundle import MANIFEST, AddedConditioning, JointConditioning, Size
from edge_agent.errors import quoted
from export import autoencoder as autoencoders
from export import source, weights_file
from export.errors import ExportError, reason
from export.schedule import PLAIN, Loop


@dataclass(frozen=True)
class Kind:
    """What sets one class of pipelines apart."""

    parts: tuple[str, ...]
    steps: int  # by default
    guidance: float  # by default, as in diffusers
    takes_negative: bool = True
    loop: Loop = PLAIN


_PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
_SECOND = ("tokenizer_2", "text_encoder_2")
KINDS: dict[type, Kind] = {
    StableDiffusionPipeline: Kind(_PARTS, steps=25, guidance=7.5),
    LatentConsistencyModelPipeline: Kind(_PARTS, steps=4, guidance=8.5, takes_negative=False),
    StableDiffusionXLPipeline: Kind(
        (*_PARTS, *_SECOND), steps=25, guidance=5.0, loop=Loop(begins_at_first=True)
    ),
    StableDiffusion3Pipeline: Kind(
        ("tokenizer", "text_encoder", *_SECOND, "transformer", "vae", "scheduler"),
        steps=28,
        guidance=7.0,
        loop=Loop(scales=False),
    ),
}

_CLASSES = {made.__name__: made for made in KINDS}

# What the edge would have to learn for each class that people ask for.
_MISSING = {
    "FluxPipeline": "a transformer denoiser on packed latents and a T5 text encoder",
}

T5_POSITIONS = 256
"""That Stable Diffusion 3 keeps for the states of its third text encoder; zeros where it does without, as diffusers
has it."""


def load(
    model: str | os.PathLike[str],
    *,
    without_t5: bool = False,
    parts: Mapping[str, Any] = {},
    report: Callable[[str], None] = lambda _: None,
) -> Any:
    """The pipeline in `model`, a folder that diffusers saved or a hub id, on the CPU in float32.

    Args:
        without_t5: leave out the third text encoder of Stable Diffusion 3.
        parts: what takes the place of the model's own, which is not loaded, by name.
        report: gets a line before the hub is asked, which may take long.

    Raises:
        ExportError: it is not there, incomplete, of an unsupported class, or the hub cannot be reached.
    """
    try:
        index = _index(model, report)
        _refuse_class(index["_class_name"], complete.named(index))
        _refuse_t5(index["_class_name"], "text_encoder_3" in complete.named(index), without_t5)
        made = _CLASSES[index["_class_name"]]
        others = dict.fromkeys((*_idle(made), *parts))
        with source.quiet():
            folder = Path(model) if Path(model).is_dir() else complete.downloaded(str(model), **others)
            return complete.pipeline(folder, torch.float32, **left_out(made), **parts)
    except ExportError:
        raise
    except Exception as error:  # each part's library fails in its own way
        raise ExportError(f"{model} cannot be loaded as a diffusers pipeline: {reason(error)}") from error


def class_of(model: str | os.PathLike[str], report: Callable[[str], None] = lambda _: None) -> Any:
    """The class of the pipeline in `model`, a folder or hub id. Raises ExportError as `load` does."""
    try:
        index = _index(model, report)
    except OSError as error:
        raise ExportError(f"{model} cannot be loaded as a diffusers pipeline: {reason(error)}") from error
    _refuse_class(index["_class_name"], complete.named(index))
    return _CLASSES[index["_class_name"]]


def left_out(made: type) -> dict[str, Any]:
    """What diffusers is told so that a pipeline of class `made` comes without the parts that the edge does not run."""
    unmarked = {"add_watermarker": False} if made is StableDiffusionXLPipeline else {}
    return dict.fromkeys(_idle(made)) | unmarked


def prepared(
    pipeline: Any,
    autoencoder: str | os.PathLike[str] | None = None,
    *,
    without_t5: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Any:
    """A copy that shares the weights of `pipeline`, ready to be exported: a part can be replaced in it.

    Args:
        autoencoder: what takes the place of the pipeline's own, see `export.autoencoder`.
        without_t5: leave out the third text encoder of Stable Diffusion 3.
        report: gets a line before the hub is asked for the autoencoder.

    Raises:
        ExportError: it is of an unsupported kind, or the autoencoder cannot be loaded.
    """
    _refuse_class(type(pipeline).__name__)
    pipeline = copy.copy(pipeline)
    _refuse_t5(type(pipeline).__name__, getattr(pipeline, "text_encoder_3", None) is not None, without_t5)
    for part in _idle(type(pipeline)):
        setattr(pipeline, part, None)
    with source.quiet():
        pipeline.to("cpu", torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.watermark = None  # an invisible one that diffusers puts on where a package for it is installed
    if autoencoder is not None:
        pipeline.vae = autoencoders.load(autoencoder, pipeline.vae, report)
    _refuse_unsupported(pipeline)
    return pipeline


def kind(pipeline: Any) -> Kind:
    """What sets the class of `pipeline` apart."""
    return KINDS[type(pipeline)]


def name_of(model: Any) -> str:
    """The model's own name: the last part of where it was loaded from."""
    where = model.config.get("_name_or_path") if isinstance(model, DiffusionPipeline) else os.fspath(model)
    # Of "." too. Not `resolve`: a link's own name is the model's.
    path = Path(os.path.abspath(where or "unnamed"))  # noqa: PTH100
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):  # in the hub's cache
        return path.parents[1].name.rpartition("--")[2]
    return path.name


UNKNOWN = "unknown"


def licence_of(model: Any, report: Callable[[str], None] = lambda _: None) -> str:
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
    file = _file(pipeline, part, "config.json")
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


def denoiser_of(pipeline: Any) -> tuple[str, Any]:
    """The part that is run in every step, by its name and itself."""
    name = denoiser_part(type(pipeline))
    return name, getattr(pipeline, name)


def denoiser_part(made: type) -> str:
    """The name of the part that pipelines of class `made` run in every step."""
    return next(part for part in KINDS[made].parts if part in ("unet", "transformer"))


def networks(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The parts that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def origin(pipeline: Any) -> Path:
    """The folder that the pipeline was loaded from."""
    return Path(pipeline.config.get("_name_or_path") or "")


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
            zero_negative=bool(pipeline.config.get("force_zeros_for_empty_prompt", True)),
        )
    return stated


def _index(model: str | os.PathLike[str], report: Callable[[str], None]) -> dict[str, Any]:
    """What the model_index.json of `model` says; its _class_name is some text."""
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
        raise ExportError(
            f"{folder} has no model_index.json: name {_instead(folder) or 'a folder that diffusers saved, or a hub id'}"
        )
    if folder.is_dir():
        try:
            complete.refuse_absent(folder / "model_index.json")
            complete.refuse_no_object(folder / "model_index.json")
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
        complete.check_index(index)
    except ValueError as error:
        raise ExportError(f"{model} cannot be loaded as a diffusers pipeline: {error}") from error
    made = index.get("_class_name")
    if isinstance(made, (list, tuple)) and len(made) == 2:  # a file beside the index, and a class in it
        raise ExportError(
            f"{model} is of the class {made[1]}, code of its own that is not run; {', '.join(_CLASSES)} are supported"
        )
    if not isinstance(made, str) or not made:
        raise ExportError(
            f"{model}: the _class_name in model_index.json must be a pipeline's class, not {made!r:.40}"
        )
    return dict(index)


def _instead(folder: Path) -> str:
    """What was meant by `folder`, where that is plain: a snapshot in the hub's cache, the pipeline it is a part of."""
    snapshots = sorted(folder.glob("snapshots/*/model_index.json"), key=lambda file: file.stat().st_mtime)
    if snapshots:
        return f"what the hub's cache has in it, {snapshots[-1].parent}"
    if (folder.parent / "model_index.json").is_file():
        return f"the whole pipeline, {folder.parent}"
    return ""


def _refuse_t5(name: str, there: bool, without_t5: bool) -> None:
    """`name` is that of the pipeline's class."""
    if without_t5 and name != StableDiffusion3Pipeline.__name__:
        raise ExportError(f"--without-t5 is for Stable Diffusion 3; {name} has no third text encoder")
    if there and not without_t5:
        raise ExportError(
            "the third text encoder of Stable Diffusion 3, a T5 of 4.8 billion weights, is not supported: leave it out "
            "with --without-t5, as the model was trained to do without; it then reads long prompts less closely, and "
            "hardly writes words"
        )


def refuse_scheduler(pipeline: Any) -> None:
    """Raises ExportError for a scheduler without what the pipeline's class asks its own for, or one that the pipeline
    runs and that makes no images of what its denoiser predicts.
    """
    if not kind(pipeline).loop.scales:
        name, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
        flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
        if not name.startswith("FlowMatch") and not flow:
            raise ExportError(
                f"{name} is not for flow matching, which {type(pipeline).__name__} was trained with: name another with "
                "--scheduler, such as FlowMatchEulerDiscrete, or DPMSolverMultistep:use_flow_sigmas=true,"
                "prediction_type=flow_prediction,flow_shift=3.0"
            )
    elif isinstance(pipeline, LatentConsistencyModelPipeline):
        if not isinstance(pipeline.scheduler, LCMScheduler):
            raise ExportError(
                f"{type(pipeline.scheduler).__name__} does not go with {type(pipeline).__name__}, which tells its "
                "scheduler of how many steps its model was distilled; name LCM with --scheduler"
            )
    elif not all(hasattr(pipeline.scheduler, name) for name in ("init_noise_sigma", "scale_model_input")):
        raise ExportError(
            f"{type(pipeline.scheduler).__name__} does not go with {type(pipeline).__name__}, which has its scheduler "
            "scale noise and input; name another with --scheduler, such as EulerDiscrete"
        )


def _refuse_class(name: str, parts: Collection[str] | None = None) -> None:
    """`parts` are those that the model has, where they are known."""
    supported = ", ".join(_CLASSES)
    if name in _MISSING:
        raise ExportError(
            f"{name} is not supported yet: it needs {_MISSING[name]}; {supported} are supported"
        )
    if name not in _CLASSES:
        raise ExportError(f"{name} is not supported{_instead_of(name, parts)}; {supported} are")


def _instead_of(name: str, parts: Collection[str] | None) -> str:
    """What to do about a model of the class `name`, where that can be told."""
    if "Onnx" in name or name.startswith("ORT"):
        return ": it holds ONNX graphs; name the model that they were made from"
    if name.startswith("Flax"):
        return ": it holds weights for JAX; name the model with those for torch"
    plain = re.sub("Img2Img|PAG", "", name)
    if plain in _CLASSES and (parts is None or {*KINDS[_CLASSES[plain]].parts} <= {*parts}):  # no refiner
        return (
            f": it has the parts of a {plain}; where the model draws from a prompt alone too, write that into its "
            "model_index.json"
        )
    if re.search("Img2Img|Inpaint|Pix2Pix|Upscale|Variation|ControlNet", name):
        return ": it wants a picture, and the edge draws from a prompt alone"
    return ""


def _idle(made: type) -> set[str]:
    """The parts that the class `made` takes and the edge does not run. They need be neither there nor loaded."""
    return complete.parts_of({"_class_name": made.__name__}) - set(KINDS[made].parts)


def _refuse_unsupported(pipeline: Any) -> None:
    for part in kind(pipeline).parts:
        if getattr(pipeline, part, None) is None:
            raise ExportError(f"the pipeline has no {part}")
    for part in (part for part in kind(pipeline).parts if part.startswith("tokenizer")):
        _refuse_tokenizer(pipeline, part)
    denoiser, vae = denoiser_of(pipeline)[1].config, pipeline.vae.config
    xl, v3 = (isinstance(pipeline, made) for made in (StableDiffusionXLPipeline, StableDiffusion3Pipeline))
    encoders = [pipeline.text_encoder] + ([pipeline.text_encoder_2] if xl or v3 else [])
    if denoiser.in_channels != vae.latent_channels:
        why = (
            "it wants a picture too, as models for inpainting do, and the edge draws from a prompt alone"
            if denoiser.in_channels > vae.latent_channels
            else "the autoencoder is another model's"
        )
        raise ExportError(
            f"{_file(pipeline, denoiser_of(pipeline)[0], 'config.json')}: the denoiser takes {denoiser.in_channels} "
            f"input channels, and the latents have {vae.latent_channels}: {why}"
        )
    checks: dict[str, Callable[[], Any]] = {
        "a text encoder that is no CLIP": lambda: any(
            not isinstance(encoder, (CLIPTextModel, CLIPTextModelWithProjection)) for encoder in encoders
        ),
        "a denoiser whose config lists its cross_attention_dim by block": lambda: isinstance(
            denoiser.get("cross_attention_dim"), (list, tuple)
        ),
        "a text encoder that masks padding": lambda: any(
            getattr(encoder.config, "use_attention_mask", None) for encoder in encoders
        ),
        "added conditioning other than Stable Diffusion XL's": lambda: (
            denoiser.get("class_embed_type")
            or denoiser.get("encoder_hid_dim_type")
            or denoiser.get("addition_embed_type") != ("text_time" if xl else None)
        ),
        "a second text encoder without projection": lambda: (
            (xl or v3) and not isinstance(pipeline.text_encoder_2, CLIPTextModelWithProjection)
        ),
        "a first text encoder without projection": lambda: (
            v3 and not isinstance(pipeline.text_encoder, CLIPTextModelWithProjection)
        ),
        "a transformer that takes smaller states than the text encoders make": lambda: (
            v3 and denoiser.joint_attention_dim < sum(encoder.config.hidden_size for encoder in encoders)
        ),
        "a transformer without a table of positions": lambda: v3 and not denoiser.pos_embed_max_size,
        "tokenizers of different lengths": lambda: (
            (xl or v3) and pipeline.tokenizer.model_max_length != pipeline.tokenizer_2.model_max_length
        ),
        "a predicted variance": lambda: (
            (denoiser.out_channels or denoiser.in_channels) != denoiser.in_channels
        ),
        "an autoencoder of another factor than the pipeline's": lambda: (
            2 ** (len(vae.block_out_channels) - 1) != pipeline.vae_scale_factor
        ),
    }
    for what, found in checks.items():
        if found():
            raise ExportError(f"{what} is not supported")
    for name, wanted in (("scaling_factor", True), ("shift_factor", v3)):
        factor = vae.get(name)
        number = type(factor) in (int, float) and math.isfinite(factor)
        if wanted and not (number and (factor or name == "shift_factor")):
            other = " other than 0" if name == "scaling_factor" else ""
            raise ExportError(
                f"the config.json of the autoencoder, {type(pipeline.vae).__name__}, must name a {name}, a number"
                f"{other}, not {factor!r}"
            )


def _refuse_tokenizer(pipeline: Any, part: str) -> None:
    tokenizer, encoder = getattr(pipeline, part), getattr(pipeline, part.replace("tokenizer", "text_encoder"))
    added = tokenizer.added_tokens_encoder
    # The edge writes such a token out as all of its vectors' before it reads a prompt; diffusers does so elsewhere.
    several = concepts(added)
    if several and not isinstance(pipeline, TextualInversionLoaderMixin):
        raise ExportError(
            f"the {part}'s {next(iter(several))!r} is an embedding of several vectors, which {type(pipeline).__name__} "
            "does not read as such: export the model without it"
        )
    if several != concepts(pipeline.tokenizer.added_tokens_encoder):
        raise ExportError(
            "the two tokenizers have embeddings of different numbers of vectors, which is not supported: export the "
            "model without them"
        )
    file = _file(pipeline, part, "tokenizer_config.json")
    length, positions = tokenizer.model_max_length, encoder.config.max_position_embeddings
    if type(length) is not int or not 2 < length <= positions:  # start, end and a word
        raise ExportError(
            f"{file}: model_max_length must be a whole number from 3 to {positions}, the text encoder's positions, "
            f"not {length!r:.40}; write {positions}"
        )
    if tokenizer.pad_token_id is None:
        raise ExportError(
            f"{file}: pad_token must be the token that prompts are filled up with, in CLIP <|endoftext|>, not null"
        )
    embeddings = encoder.get_input_embeddings().num_embeddings
    ids = tokenizer.get_vocab().items()  # one that is no number, the conversion refuses
    if beyond := [token for token, number in ids if type(number) is int and number >= embeddings]:
        more = f" and {len(beyond) - 1} more" if beyond[1:] else ""
        raise ExportError(
            f"{file.parent}: the text encoder has {embeddings} embeddings, and none for the token {beyond[0]!r}{more}; "
            "take it out of the tokenizer, or get the text encoder that was trained with it"
        )


def concepts(added: Collection[str]) -> dict[str, int]:
    """Of the tokens that were `added` to a tokenizer, those that stand for several vectors, and for how many: those of
    the others are called name_1, name_2, ...
    """
    return {name: len(vectors) for name, vectors in tokens.concepts(added).items()}


def _file(pipeline: Any, *names: str) -> Path:
    """A file of the pipeline's, in the folder that it was loaded from where it was."""
    return origin(pipeline).joinpath(*names)


def _nearest(side: int, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def drop_origin(folder: Path) -> None:
    """Take out of the configs in `folder` where the weights lay on the exporting machine: nobody's business."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
