"""Autoencoders by themselves, which take the place of a model's own: tiny ones, and those that fine-tunes go with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny

from export import source
from export.errors import ExportError, misfit

_PREFIX = "first_stage_model."
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def load(model: str | os.PathLike[str], own: Any, report: Callable[[str], None] = lambda _: None) -> Any:
    """An autoencoder, on the CPU in float32.

    Args:
        model: a folder that diffusers saved, a hub id, or a .safetensors file of weights for the config of `own`.
        own: the one whose place it takes.
        report: gets a line before the hub is asked for it.

    Raises:
        ExportError: it is not there, incomplete, no autoencoder, or the hub cannot be reached.
    """
    if os.path.isfile(model):  # noqa: PTH113, a Path's method raises where it may not look
        return _from_file(Path(model), own)
    return source.load_part(model, "vae", "an autoencoder", (AutoencoderKL, AutoencoderTiny), report)


def _from_file(file: Path, own: Any) -> Any:
    names = [name.removeprefix(_PREFIX) for name in source.names_in(file)]
    if not isinstance(own, AutoencoderKL):
        raise ExportError(
            f"{file} is a file, which has no config, and that of the model's own is {type(own).__name__}'s"
        )
    refusal = f"{file} is no autoencoder of this model's config"
    try:
        with TemporaryDirectory() as folder, source.quiet():
            own.save_config(folder)
            made = AutoencoderKL.from_single_file(str(file), config=folder)
    except Exception as error:  # diffusers fails in its own ways
        raise ExportError(f"{refusal}: {misfit(error)}") from error
    held = sum(name.startswith(_PARTS) for name in names)
    if any(weight.is_meta for weight in made.parameters()) or held != len(made.state_dict()):
        raise ExportError(f"{refusal}: it has {held} weights of one, of {len(made.state_dict())}")
    return made.float().eval()
