"""Which diffusers pipelines can become a bundle, and why another cannot."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from cloud_server import model_index
from edge_agent import tokens
from export.errors import ExportError
from export.schedule import PLAIN, Loop
from export.terminal import Report


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

CLASSES = {made.__name__: made for made in KINDS}


def kind(pipeline: Any) -> Kind:
    """What sets the class of `pipeline` apart."""
    return KINDS[type(pipeline)]


def denoiser_of(pipeline: Any) -> tuple[str, Any]:
    """The part that is run in every step, by its name and itself."""
    name = denoiser_part(type(pipeline))
    return name, getattr(pipeline, name)


def denoiser_part(made: type) -> str:
    """The name of the part that pipelines of class `made` run in every step."""
    return next(part for part in KINDS[made].parts if part in ("unet", "transformer"))


def idle(made: type) -> set[str]:
    """The parts that the class `made` takes and the edge does not run. They need be neither there nor loaded."""
    return model_index.parts_of({"_class_name": made.__name__}) - set(KINDS[made].parts)


def origin(pipeline: Any) -> Path:
    """The folder that the pipeline was loaded from; of another one its files have names alone."""
    return Path(pipeline.config.get("_name_or_path") or "")


def tell_of_checker(made: type, there: Collection[str], report: Report) -> None:
    """A line to `report` where a safety checker is `there` among the parts that the edge does not run."""
    if "safety_checker" in idle(made) & {*there}:
        report(
            "leaving out the safety checker, so that what is made here draws without one; the cloud server withholds "
            "pictures where its own model has one"
        )


def refuse_class(name: str, parts: Collection[str] | None = None) -> None:
    """Raises ExportError where pipelines of the class `name` are not supported. `parts` are those that the model has,
    where they are known.
    """
    if name not in CLASSES:
        raise ExportError(f"{name} is not supported{_instead_of(name, parts)}; {', '.join(CLASSES)} are")


def _instead_of(name: str, parts: Collection[str] | None) -> str:
    """What to do about a model of the class `name`, where that can be told."""
    if "Onnx" in name or name.startswith("ORT"):
        return ": it holds ONNX graphs; name the model that they were made from"
    if name.startswith("Flax"):
        return ": it holds weights for JAX; name the model with those for torch"
    plain = re.sub("Img2Img|PAG", "", name)
    if plain in CLASSES and (parts is None or {*KINDS[CLASSES[plain]].parts} <= {*parts}):  # no refiner
        return (
            f": it has the parts of a {plain}; where the model draws from a prompt alone too, write that into its "
            "model_index.json"
        )
    if re.search("Img2Img|Inpaint|Pix2Pix|Upscale|Variation|ControlNet", name):
        return ": it wants a picture, and the edge draws from a prompt alone"
    has = model_index.parts_of({"_class_name": name}) | {*(parts or ())}
    if plain not in CLASSES and "transformer" in has:  # Flux, PixArt, Sana, QwenImage and so on
        return ": it needs a transformer of another kind and a text encoder that the edge does not run"
    return ""


def refuse_t5(name: str, there: bool, without_t5: bool) -> None:
    """Raises ExportError for a pipeline of the class `name` that would come with the third text encoder, where it is
    `there`, or can have none to leave out.
    """
    if without_t5 and name != StableDiffusion3Pipeline.__name__:
        raise ExportError(f"--without-t5 is for Stable Diffusion 3; {name} has no third text encoder")
    if there and not without_t5:
        raise ExportError(
            "the third text encoder of Stable Diffusion 3, a T5 of 4.8 billion weights, is not supported: leave it out "
            "with --without-t5, as the model was trained to do without; it then reads long prompts less closely, and "
            "hardly writes words"
        )


_FLOW, _EDM, _NOISE = "FlowMatch", "EDM", "noise"
# A scheduler for each training, where the pipeline scales noise and input.
_FOR = {
    _FLOW: "DPMSolverMultistep:use_flow_sigmas=true,prediction_type=flow_prediction",
    _EDM: "EDMEuler",
    _NOISE: "EulerDiscrete",
}


def _training(scheduler: Any) -> str:
    """How the models were trained that `scheduler` is for."""
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        return _FLOW
    return next((training for training in (_FLOW, _EDM) if name.startswith(training)), _NOISE)


def refuse_scheduler(pipeline: Any, own: Any) -> None:
    """Raises ExportError for a scheduler without what the pipeline's class asks its own for, or one that the pipeline
    runs and that makes no images of what its denoiser predicts. `own` is the scheduler that the model came with.
    """
    name, training = type(pipeline.scheduler).__name__, _training(pipeline.scheduler)
    if not kind(pipeline).loop.scales:
        if training != _FLOW:
            raise ExportError(
                f"{name} is not for flow matching, which {type(pipeline).__name__} was trained with: name another with "
                "--scheduler, such as FlowMatchEulerDiscrete, or DPMSolverMultistep:use_flow_sigmas=true,"
                "prediction_type=flow_prediction,flow_shift=3.0"
            )
    elif isinstance(pipeline, LatentConsistencyModelPipeline):
        if not isinstance(pipeline.scheduler, LCMScheduler):
            raise ExportError(
                f"{name} does not go with {type(pipeline).__name__}, which tells its scheduler of how many steps its "
                "model was distilled; name LCM with --scheduler"
            )
    elif not all(hasattr(pipeline.scheduler, name) for name in ("init_noise_sigma", "scale_model_input")):
        raise ExportError(
            f"{name} does not go with {type(pipeline).__name__}, which has its scheduler scale noise and input; name "
            "another with --scheduler, such as EulerDiscrete"
        )
    elif training != (trained := _training(own)):
        raise ExportError(
            f"{name} is for models that were trained otherwise than this one, whose own is {type(own).__name__}, and "
            f"would draw no image: name another with --scheduler, such as {_FOR[trained]}; a model trained for "
            "it gets it as its own by `edge-export convert MODEL NEW --scheduler`"
        )


def refuse_unsupported(pipeline: Any) -> None:
    """Raises ExportError for parts that the edge does not run, that are missing, or that do not go together."""
    for part in kind(pipeline).parts:
        if getattr(pipeline, part, None) is None:
            raise ExportError(f"the pipeline has no {part}")
    for part in (part for part in kind(pipeline).parts if part.startswith("tokenizer")):
        _refuse_tokenizer(pipeline, part)
    part, network = denoiser_of(pipeline)
    denoiser, vae = network.config, pipeline.vae.config
    xl, v3 = (isinstance(pipeline, made) for made in (StableDiffusionXLPipeline, StableDiffusion3Pipeline))
    encoders = [pipeline.text_encoder] + ([pipeline.text_encoder_2] if xl or v3 else [])
    if denoiser.in_channels != vae.latent_channels:
        why = (
            "it wants a picture too, as models for inpainting do, and the edge draws from a prompt alone"
            if denoiser.in_channels > vae.latent_channels
            else "the autoencoder is another model's"
        )
        raise ExportError(
            f"{origin(pipeline) / part / 'config.json'}: the denoiser takes {denoiser.in_channels} input channels, and "
            f"the latents have {vae.latent_channels}: {why}"
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
            or denoiser.get("num_class_embeds")
            or denoiser.get("encoder_hid_dim_type")
            or denoiser.get("addition_embed_type") != ("text_time" if xl else None)
        ),
        "a second text encoder without projection": lambda: (
            (xl or v3) and not isinstance(pipeline.text_encoder_2, CLIPTextModelWithProjection)
        ),
        "a first text encoder without projection": lambda: (
            v3 and not isinstance(pipeline.text_encoder, CLIPTextModelWithProjection)
        ),
        "a text encoder with projection": lambda: (
            not (xl or v3) and isinstance(pipeline.text_encoder, CLIPTextModelWithProjection)
        ),
        "a denoiser with dual_cross_attention": lambda: denoiser.get("dual_cross_attention"),
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
        "an autoencoder that makes other than three colours": lambda: vae.get("out_channels", 3) != 3,
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
    several = tokens.concepts(added)
    if several and not isinstance(pipeline, TextualInversionLoaderMixin):
        raise ExportError(
            f"the {part}'s {next(iter(several))!r} is an embedding of several vectors, which {type(pipeline).__name__} "
            "does not read as such: export the model without it"
        )
    if several != tokens.concepts(pipeline.tokenizer.added_tokens_encoder):
        raise ExportError(
            "the two tokenizers have embeddings of different numbers of vectors, which is not supported: export the "
            "model without them"
        )
    file = origin(pipeline) / part / "tokenizer_config.json"
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
