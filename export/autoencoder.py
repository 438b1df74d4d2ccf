"""Autoencoders by themselves, which take the place of a model's own: tiny ones, and those that fine-tunes go with."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from cloud_server import complete
from export import source, weights_file
from export.errors import ExportError, misfit
from export.terminal import Report, silent

_FIRST_CODE = "encoder.down."
"""How the names of some weights begin in the first code, and none of diffusers'."""

_TINY = re.compile(r"((en|de)coder\.layers\.)?\d+\.")
"""How those of a tiny one do, which are in a row."""


def load(model: str | os.PathLike[str], own: Any, report: Report = silent) -> Any:
    """An autoencoder, on the CPU in float32.

    Args:
        model: a folder that diffusers saved, a hub id, or a file of weights for the config of `own`.
        own: the one whose place it takes.
        report: gets a line before the hub is asked for it.

    Raises:
        ExportError: it is not there, incomplete, no autoencoder, or the hub cannot be reached.
    """
    if os.path.isfile(model):  # noqa: PTH113, a Path's method raises where it may not look
        return _from_file(Path(model), own)
    return source.load_part(model, "vae", "an autoencoder", (AutoencoderKL, AutoencoderTiny), report)


def _from_file(file: Path, own: Any) -> Any:
    if not isinstance(own, AutoencoderKL):
        kind = type(own).__name__
        raise ExportError(
            f"{file} is a file, which has no config, and that of the model's own is of an {kind}"
        )
    weights = {_alone(name): weight for name, weight in weights_file.read_floating(file).items()}
    if any(map(_TINY.match, weights)):
        raise ExportError(
            f"{file} is a tiny autoencoder, and has no config: name its folder or hub id, such as madebyollin/taesd"
        )
    if not all(weight.float().isfinite().all() for weight in weights.values()):
        raise ExportError(f"{file} is damaged: it holds what is no number; get it again")
    try:
        if any(name.startswith(_FIRST_CODE) for name in weights):
            return source.from_first_code(AutoencoderKL, own, weights).float()
        return _from_diffusers(own, weights)
    except Exception as error:  # diffusers fails in its own ways
        raise ExportError(f"{file} is no autoencoder of this model's config: {misfit(error)}") from error


def _from_diffusers(own: Any, weights: dict[str, torch.Tensor]) -> Any:
    """Through a folder, as diffusers knows what it called some weights earlier for those alone."""
    with TemporaryDirectory() as folder, source.quiet(logging.ERROR):
        own.save_config(it := Path(folder, "it"))
        save_file(weights, it / SAFETENSORS_WEIGHTS_NAME)
        made = complete.part(AutoencoderKL, it, torch.float32)
    if len(weights) > (held := len(made.state_dict())):
        raise ValueError(f"it has {len(weights)} weights, of which the config names {held}")
    return made


def _alone(name: str) -> str:
    """A weight's name without what it begins with in a whole model's file."""
    for beginning in source.BEGINNINGS["vae"]:
        name = name.removeprefix(beginning)
    return name
