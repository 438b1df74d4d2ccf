"""Denoisers by themselves: weights that take the place of a model's own, such as of one distilled to few steps."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from cloud_server import complete, hub, part_files
from export import source, weights_file
from export.errors import ExportError, misfit
from export.terminal import Report, silent

CLASSES: dict[str, Any] = {"unet": UNet2DConditionModel, "transformer": SD3Transformer2DModel}
"""By the part's name in a pipeline."""

_FITTING = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
)
"""What of its config has to suit the pipeline's other parts."""

_ENDS = (("conv_in.weight", "conv_out.weight"), ("pos_embed.proj.weight", "proj_out.weight"))
"""Of each class, weights that the latents meet first and last. No other network has both."""

MARKERS = PREDICTS_V, ZERO_SNR = "v_pred", "ztsnr"
"""Names without a value, by which files say that a denoiser predicts v, and that it learnt with betas rescaled so that
the last step leaves nothing but noise."""

_FIRST_CODE = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
"""How the names of an UNet's weights begin there."""


def load(model: str, part: str, base: str | Path, report: Report = silent) -> tuple[Any, Path]:
    """A denoiser for the pipeline at `base`, on the CPU, and the file or folder that its weights are in. Those of a
    file stay in the type that they have, as they are large; of a folder they are in float32.

    Args:
        model: a file of weights for the config that `base` has; or a folder that diffusers saved, or a
            hub id, with a config of its own.
        part: its name in the pipeline.
        base: folder or hub id of that pipeline.
        report: gets a line before the hub is asked for the denoiser.

    Raises:
        ExportError: it is not there, incomplete, does not suit the pipeline, or the hub cannot be reached.
    """
    made = CLASSES[part]
    try:
        with source.quiet(logging.ERROR), complete.bars_on_terminals_alone():
            if Path(base).is_dir():
                part_files.refuse_faulty(made, Path(base, part), weights=False)
            config = made.load_config(base, subfolder=part, local_files_only=hub.out_of_reach(base))
            if Path(model).is_file():
                return _from_file(Path(model), made, config), Path(model)
    except ExportError:
        raise
    except Exception as error:  # each library fails in its own ways
        why = source.why_not(base, error)
        raise ExportError(f"the config of the {part} of {base} makes no {made.__name__}: {why}") from error
    denoiser = source.load_part(model, part, "a denoiser", (made,), report)
    defaults = {name: one.default for name, one in inspect.signature(made).parameters.items()}
    for name in _FITTING:
        own, wanted = denoiser.config.get(name), config.get(name, defaults.get(name))
        if own != wanted:
            raise ExportError(f"{model} does not suit {base}: its {name} is {own}, and {wanted} is wanted")
    return denoiser, source.loaded_from(model, made.config_name)


def markers(model: str) -> list[str]:
    """Of MARKERS those in a file, where its metadata may say the first one too; none where it does not predict v. A
    folder and a hub have none: there a scheduler says it.

    Raises ExportError where the file is damaged.
    """
    if not (file := Path(model)).is_file():
        return []
    held, said = {*weights_file.types(file)}, weights_file.metadata(file)
    # kohya's merge of a LoRA says so of all of the second version, whether they do or not.
    guessed = said.get("modelspec.architecture", "").startswith("stable-diffusion-v2")
    if said.get("modelspec.prediction_type") == "v" and not guessed:
        held.add(PREDICTS_V)
    return [name for name in MARKERS if name in held] if PREDICTS_V in held else []


def is_alone(names: Collection[str]) -> bool:
    """Whether weights of these names are a denoiser's and nothing else: as diffusers names them, or the first code."""
    names = set(names) - {*MARKERS}
    if any(all(name in names for name in ends) for ends in _ENDS):
        return True
    return bool(names) and all(name.startswith((source.DENOISER, *_FIRST_CODE)) for name in names)


def _from_file(file: Path, made: Any, config: Any) -> Any:
    """The denoiser of class `made` whose weights `file` holds."""
    refusal = f"{file} is no {made.__name__} of this model's config"
    with init_empty_weights():
        denoiser = made.from_config(config)
    if mistaken := _mistaken(weights_file.types(file)):
        raise ExportError(f"{file} is no denoiser alone: {mistaken}")
    own, weights = set(denoiser.state_dict()), weights_file.read_floating(file, without=MARKERS)
    if is_alone(weights) and not own & weights.keys():
        weights = {source.DENOISER + name.removeprefix(source.DENOISER): one for name, one in weights.items()}
        try:
            return source.from_first_code(made, denoiser, weights)
        except Exception as error:  # diffusers fails in its own ways
            raise ExportError(f"{refusal}: {misfit(error)}") from error
    if lacking := sorted(own - weights.keys()):
        raise ExportError(f"{refusal}: it has no weights {source.listed(lacking)}")
    if others := sorted(weights.keys() - own):
        raise ExportError(f"{refusal}, which has no place for {source.listed(others)}")
    try:
        denoiser.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # torch says at length what is of another size
        raise ExportError(f"{refusal}: {misfit(error)}") from error
    return denoiser.eval()


def _mistaken(names: Collection[str]) -> str:
    """What a file of these names is instead, as far as that can be told."""
    if any("lora" in name for name in names):
        return "it is a LoRA; name it with --lora"
    if any(name.startswith(source.ENCODERS) for name in names):
        return "it is a whole model; name it as MODEL"
    if any(name.startswith(("decoder.", *source.BEGINNINGS["vae"])) for name in names):
        return "it is an autoencoder; name it with --autoencoder when you export the model"
    return ""
