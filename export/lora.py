"""LoRAs: files of pairs of small matrices, whose products are added to a model's weights.

diffusers reads their many layouts. What it passes over is refused here, and what scales a layer is taken from the file:
where layers differ in their alpha, diffusers takes that of most of them for all.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors.torch import load_file

from export import pipeline as pipelines
from export import source
from export.errors import ExportError, misfit

# How the names of both matrices of a layer end: as kohya-ss's trainer, peft, and the first diffusers write them.
_PAIRS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    (".down.weight", ".up.weight"),
)
_ADAPTER = "lora"


def located(lora: str) -> Path:
    """The file `lora`, or that of the hub's repository of this name, under the name that diffusers gives it.

    Raises ExportError where there is no such file, or it is damaged.
    """
    return source.located(lora, "a LoRA", LORA_WEIGHT_NAME_SAFE)


def fuse(pipeline: Any, file: Path, scale: float) -> None:
    """Add what `file` holds, times `scale`, to the weights of `pipeline`, which are in float32.

    Raises ExportError where it is no whole LoRA, of a kind that diffusers does not know, or was made for another model.
    """
    weights, scaled_by_peft = _read(file)
    layers = sum(name.endswith(down) for name in weights for down, _ in _PAIRS)
    try:
        with source.quiet(logging.ERROR):
            pipeline.load_lora_weights(str(file) if scaled_by_peft else weights, adapter_name=_ADAPTER)
            # The layers that peft has put in the place of plain ones.
            changed = [
                layer
                for network in pipelines.networks(pipeline).values()
                for layer in network.modules()
                if _ADAPTER in getattr(layer, "lora_A", ())
            ]
            for layer in changed if not scaled_by_peft else ():
                layer.scaling[_ADAPTER] = 1.0
            pipeline.fuse_lora(lora_scale=scale, safe_fusing=True)
            pipeline.unload_lora_weights()
    except Exception as error:  # each part's library fails in its own way
        raise ExportError(f"{file} cannot be fused with this model: {misfit(error)}") from error
    if len(changed) < layers:
        raise ExportError(
            f"{file} cannot be fused with this model, which has {len(changed)} of the {layers} layers that it changes, "
            f"named such as {next(iter(weights))}: it was made for another, or written in a layout that diffusers does "
            "not read"
        )


def _read(file: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Its matrices in float32, each layer's alpha worked into them, and whether peft's own account scales them instead,
    which diffusers and peft leave in newer files and diffusers follows.
    """
    with safetensors.safe_open(file, "pt") as held:
        scaled_by_peft = LORA_ADAPTER_METADATA_KEY in (held.metadata() or {})
    weights = {name: weight.float() for name, weight in load_file(file).items()}
    if dora := next((name for name in weights if name.endswith("dora_scale")), None):
        raise ExportError(
            f"{file} is a DoRA in a layout of which diffusers reads but half: it has the scale {dora}"
        )
    found = False
    for down, up in _PAIRS:
        stems = {name.removesuffix(end) for end in (down, up) for name in weights if name.endswith(end)}
        for stem in sorted(stems):
            found = True
            if lacking := [stem + end for end in (down, up) if stem + end not in weights]:
                raise ExportError(f"{file} has no {lacking[0]}: it is incomplete; get it again")
            alpha = None if scaled_by_peft else weights.pop(stem.removesuffix(".") + ".alpha", None)
            if alpha is not None:
                weights[stem + up] *= alpha / weights[stem + down].shape[0]  # by its rank
    if not found:
        raise ExportError(
            f"{file} is no LoRA that is read here: none of its names ends in {' or '.join(down for down, _ in _PAIRS)}"
        )
    if odd := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ExportError(f"{file} is damaged: {odd[0]} holds what is no number; get it again")
    return weights, scaled_by_peft
