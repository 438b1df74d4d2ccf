"""A single file with the weights of a whole model, as people pass fine-tunes around; its configs and tokenizers are
another's.

diffusers converts; this refuses what it passes over: a weight that the file lacks, and one that the configs have no
place for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from cloud_server import complete, hub
from export import denoiser as denoisers
from export import pipeline as pipelines
from export import source, support, weights_file
from export.errors import ExportError, misfit
from export.terminal import Report

# Merges of 2022 name the layers of the text encoder without what transformers has come to wrap them in.
_UNWRAPPED = re.compile(r"(?<=^cond_stage_model\.transformer\.)(?=(embeddings|encoder|final_layer_norm)\.)")

_LAYER = re.compile(rf"((?:{'|'.join(map(re.escape, source.ENCODERS))}).*?)\.encoder\.layers\.(\d{{1,4}})\.")

_CONFIGS = ("*.json", "*.txt", "*.model")  # in all folders of a repository, tokenizers too


def base_of(file: Path, names: list[str], named: str | None, report: Report) -> str:
    """Where configs and tokenizers for the weights in `file`, under `names`, come from: `named`, or the model of the
    hub that diffusers takes the file to descend from, of which `report` gets a line.

    Raises ExportError where these are no weights of a whole model.
    """
    if names and all("lora" in name for name in names):
        raise ExportError(
            f"{file} is a LoRA, which changes a model: name that model, and this file with --lora"
        )
    if denoisers.is_alone(names):
        raise ExportError(
            f"{file} is a denoiser alone: name the model that it was made for, and this file with --denoiser"
        )
    if not any(name.startswith(source.ENCODERS) for name in names):
        raise ExportError(
            f"{file} is no whole model: it has no weights of a text encoder; an autoencoder is for "
            "--autoencoder, when a model is exported"
        )
    if named is not None:
        return named
    found = fetch_diffusers_config(weights_file.read(file))
    base = str(found["pretrained_model_name_or_path"])
    report(f"taking configs and tokenizers from {base}; --base names another model's")
    return base


def load(file: Path, names: list[str], base: str, made: Any, parts: Mapping[str, Any], scratch: Path) -> Any:
    """The pipeline of class `made` whose weights, but for those of `parts`, `file` holds under `names`; on the CPU in
    float32. The folder `scratch` is for a copy.

    Raises ExportError where it lacks weights, or has some that the configs have no place for.
    """
    weights_file.refuse_quantized(file)
    readable = _renamed(file, names, scratch)
    refusal = f"{file} makes no {made.__name__} with the configs of {base}"
    try:
        with source.quiet(), complete.bars_on_terminals_alone():
            configs = base
            if not Path(base).is_dir():
                kept = hub.out_of_reach(base)
                configs = snapshot_download(base, allow_patterns=_CONFIGS, local_files_only=kept)
            newer = complete.newer_tokenizers(Path(configs), made.load_config(configs))
            options = newer | pipelines.left_out(made) | parts
            with weights_file.alone(file):
                pipeline = made.from_single_file(str(readable), config=configs, **options)
    except Exception as error:  # each part's library fails in its own way
        raise ExportError(f"{refusal}: {misfit(error)}") from error
    for part, network in pipelines.networks(pipeline).items():
        if missing := [name for name, weight in network.named_parameters() if weight.is_meta]:
            raise ExportError(f"{refusal}: it has no weights {source.listed(missing)} of the {part}")
    for part in {support.denoiser_part(made), "vae"} - parts.keys():
        held = sum(name.startswith(source.BEGINNINGS[part]) for name in names)
        used = len(getattr(pipeline, part).state_dict())
        if held > used:
            raise ExportError(f"{refusal}: it has {held} weights of the {part}, of which they name {used}")
    encoders = [
        part for name, part in pipelines.networks(pipeline).items() if name.startswith("text_encoder")
    ]
    known = {encoder.config.num_hidden_layers for encoder in encoders}
    if others := {*_depths(names).values()} - known:
        named = " or ".join(map(str, sorted(known)))
        raise ExportError(
            f"{refusal}: it has {others.pop()} layers of a text encoder, where they name {named}"
        )
    return pipeline


def _depths(names: Collection[str]) -> dict[str, int]:
    """How many layers the text encoders have in a file of these names, each by what its names begin with. Of one in
    OpenCLIP's layout diffusers leaves out the last layer where Stable Diffusion 2 does: of such nothing is said.
    """
    depths: dict[str, int] = {}
    for name in names:
        if found := _LAYER.match(name):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    return depths


def _renamed(file: Path, names: list[str], scratch: Path) -> Path:
    """`file`, or where it has names that diffusers does not know, a copy without them in the folder `scratch`."""
    if not any(map(_UNWRAPPED.search, names)):
        return file
    # Copied, as some may share memory, which a file in this format cannot say.
    weights = {
        _UNWRAPPED.sub("text_model.", name): one.clone(memory_format=torch.contiguous_format)
        for name, one in weights_file.read(file).items()
    }
    copy = scratch / "renamed.safetensors"
    save_file(weights, copy)
    return copy
