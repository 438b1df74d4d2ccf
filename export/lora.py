"""LoRAs: files of small matrices that are multiplied and added to a model's weights.

Those in the layout of kohya-ss's trainer are `export.kohya`'s; diffusers reads the others. What it passes over is
refused here, and what scales a layer is taken from the file: where layers differ in their alpha, it takes that of most
of them for all.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.loaders.lora_base import (
    LORA_ADAPTER_METADATA_KEY,
    LORA_WEIGHT_NAME,
    LORA_WEIGHT_NAME_SAFE,
)
from safetensors.torch import save_file

from export import kohya, source, weights_file
from export import pipeline as pipelines
from export.errors import ExportError, misfit

# How the names of both matrices of a layer end: as peft and the first diffusers write them.
_PAIRS = (("lora_A.weight", "lora_B.weight"), (".down.weight", ".up.weight"))
# Until its version 0.16 diffusers trained the attention of a denoiser alone, and left out which part that is.
_PROCESSOR, _PARTS = ".processor.", ("unet.", "text_encoder.")
# transformers 5 leaves out `text_model` in the names of a CLIP that ends in no projection.
_SHORT = re.compile(r"^(text_encoder(?:_2)?\.)(?=encoder\.)")
_ADAPTER = "lora"
_LENGTHS = "lora_magnitude_vector"  # of a DoRA as peft writes it: of the weights to an output


def located(lora: str) -> Path:
    """The file `lora`, or that of the hub's repository of this name, under the names that diffusers gives it.

    Raises ExportError where there is no such file, or it is damaged.
    """
    return source.located(lora, "a LoRA", LORA_WEIGHT_NAME_SAFE, LORA_WEIGHT_NAME)


def fuse(pipeline: Any, file: Path, scale: float) -> None:
    """Add what `file` holds, times `scale`, to the weights of `pipeline`, which are in float32.

    Raises ExportError where it is no whole LoRA, of a kind that is not known, or was made for another model.
    """
    weights_file.refuse_quantized(file)
    weights = {_in_full(name): weight.float() for name, weight in weights_file.read(file).items()}
    if all(_PROCESSOR in name for name in weights) and not any(name.startswith(_PARTS) for name in weights):
        weights = {f"unet.{name}": weight for name, weight in weights.items()}
    if any(name.startswith("bundle_emb.") for name in weights):
        raise ExportError(
            f"{file} holds embeddings beside a LoRA: save each by itself, and add it with --embedding"
        )
    if odd := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ExportError(f"{file} is damaged: {odd[0]} holds what is no number; get it again")
    if weights and all(name.startswith(kohya.BEGINNING) for name in weights):
        kohya.fuse(pipeline, file, weights, scale)
    else:
        _fuse_by_peft(pipeline, file, weights, scale)


def _in_full(name: str) -> str:
    return _SHORT.sub(r"\1text_model.", name)


def _fuse_by_peft(pipeline: Any, file: Path, weights: dict[str, torch.Tensor], scale: float) -> None:
    # Newer files hold peft's own account of what scales the layers, which diffusers and peft follow.
    told = weights_file.metadata(file)
    accounted = LORA_ADAPTER_METADATA_KEY in told
    layers = _scaled(file, weights, by_alpha=not accounted)
    dora = any(name.endswith(_LENGTHS) for name in weights)
    try:
        with source.quiet(logging.ERROR):
            if accounted:
                _load_file(pipeline, weights, told)
            else:
                pipeline.load_lora_weights(weights, adapter_name=_ADAPTER)
            # The layers that peft has put in the place of plain ones.
            changed = [
                layer
                for network in pipelines.networks(pipeline).values()
                for layer in network.modules()
                if _ADAPTER in getattr(layer, "lora_A", ())
            ]
            for layer in changed if not accounted else ():
                layer.scaling[_ADAPTER] = 1.0
            # peft scales what a DoRA adds, but not how it stretches the sum: of its whole change the share is taken.
            before = [(layer.base_layer, layer.base_layer.weight.data.clone()) for layer in changed if dora]
            pipeline.fuse_lora(lora_scale=1.0 if dora else scale, safe_fusing=True)
            pipeline.unload_lora_weights()
            for layer, weight in before:
                layer.weight.data = torch.lerp(weight, layer.weight.data, scale)
    except Exception as error:  # each part's library fails in its own way
        raise ExportError(f"{file} cannot be fused with this model: {misfit(error)}") from error
    if len(changed) < layers:
        raise ExportError(
            f"{file} cannot be fused with this model, which has {len(changed)} of the {layers} layers that it changes, "
            f"named such as {next(iter(weights))}: it was made for another, or written in a layout that diffusers does "
            "not read"
        )


def _load_file(pipeline: Any, weights: dict[str, torch.Tensor], told: dict[str, str]) -> None:
    """Load `weights` through a file, the one place where diffusers reads what it is `told` of them."""
    # Windows deletes no file whose weights are in use.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        save_file(weights, Path(folder, LORA_WEIGHT_NAME_SAFE), told)
        # With its name, for which diffusers would ask the hub.
        pipeline.load_lora_weights(folder, weight_name=LORA_WEIGHT_NAME_SAFE, adapter_name=_ADAPTER)


def _scaled(file: Path, weights: dict[str, torch.Tensor], *, by_alpha: bool) -> int:
    """How many layers `weights` change, once each one's alpha was worked into them, where that scales them."""
    if half := next((name for name in weights if name.endswith("dora_scale")), None):
        raise ExportError(
            f"{file} is a DoRA in a layout of which diffusers reads but half: it has the scale {half}"
        )
    dora = any(name.endswith(_LENGTHS) for name in weights)
    layers, known = 0, set()
    for down, up in _PAIRS:
        stems = {name.removesuffix(end) for end in (down, up) for name in weights if name.endswith(end)}
        for stem in sorted(stems):
            layers += 1
            wanted = (down, up, _LENGTHS) if dora else (down, up)
            if lacking := [stem + end for end in wanted if stem + end not in weights]:
                raise ExportError(f"{file} has no {lacking[0]}: it is incomplete; get it again")
            alpha_name = stem.removesuffix(".") + ".alpha"
            known |= {*(stem + end for end in wanted), alpha_name, stem + up.replace("weight", "bias")}
            alpha = weights.pop(alpha_name, None) if by_alpha else None
            if alpha is not None:
                weights[stem + up] *= alpha / weights[stem + down].shape[0]  # by its rank
    if not layers:
        raise ExportError(
            f"{file} is no LoRA that is read here: of its names none ends in "
            f"{' or '.join(down for down, _ in _PAIRS)}, and not all begin with {kohya.BEGINNING}"
        )
    if others := weights.keys() - known:
        raise ExportError(f"{file} holds {min(others)}, a kind of change that is not known here")
    return layers
