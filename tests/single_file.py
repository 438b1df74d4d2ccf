"""A pipeline's weights as fine-tunes are passed around: in one file, under the names of the code that Stable Diffusion
was first published with. diffusers reads such files and writes none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from export import first_code

Weights = dict[str, torch.Tensor]

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def save_single_file(pipeline: Any, file: Path, **more: torch.Tensor) -> Path:
    """Write the weights of Stable Diffusion 1.x or XL, and `more`, to `file` and return it."""
    xl = hasattr(pipeline, "text_encoder_2")
    first = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    weights = _under("model.diffusion_model.", _denoiser(pipeline.unet))
    weights |= _under("first_stage_model.", autoencoder_weights(pipeline.vae))
    weights |= _under(first, pipeline.text_encoder.state_dict())
    if not xl:  # which transformers kept with the weights then
        positions = torch.arange(pipeline.text_encoder.config.max_position_embeddings)
        weights[f"{first}text_model.embeddings.position_ids"] = positions[None]
    if xl:
        weights |= _under("conditioner.embedders.1.model.", _open_clip(pipeline.text_encoder_2))
    save_file({name: weight.contiguous() for name, weight in (weights | more).items()}, file)
    return file


def _under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: weight for name, weight in weights.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    return name


def _denoiser(unet: Any) -> Weights:
    names = first_code.unet_names(unet)
    found = {}
    for name, weight in unet.state_dict().items():
        layer, _, kind = name.rpartition(".")
        found[f"{names[layer]}.{kind}"] = weight
    return found


def _split(name: str, kind: str) -> tuple[str, str, str]:
    """`down_blocks.0.resnets.1.conv1.weight` -> `down_blocks.0.resnets.1`, `.`, `conv1.weight`."""
    parts = name.split(".")
    if kind not in parts:
        return name, "", ""
    end = parts.index(kind) + 2
    return ".".join(parts[:end]), ".", ".".join(parts[end:])


def autoencoder_weights(vae: Any) -> Weights:
    """Under their names in a single file, without what all of them begin with there."""
    levels = len(vae.config.block_out_channels)
    names = {"encoder.conv_norm_out": "encoder.norm_out", "decoder.conv_norm_out": "decoder.norm_out"}
    for half in ("encoder", "decoder"):
        for place in (0, 1):
            names[f"{half}.mid_block.resnets.{place}"] = f"{half}.mid.block_{place + 1}"
        names[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
    for level in range(levels):
        names[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        names[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{levels - 1 - level}.upsample"
        for place in range(vae.config.layers_per_block + 1):
            names[f"encoder.down_blocks.{level}.resnets.{place}"] = f"encoder.down.{level}.block.{place}"
            names[f"decoder.up_blocks.{level}.resnets.{place}"] = (
                f"decoder.up.{levels - 1 - level}.block.{place}"
            )
    found = {}
    for name, weight in vae.state_dict().items():
        block, dot, rest = _split(name, "resnets")
        if not dot:
            block, dot, rest = _split(name, "attentions")
            rest = _renamed(rest, _ATTENTION)
            if rest.endswith("weight") and not rest.startswith("norm"):
                weight = weight[:, :, None, None]  # once a convolution
        found[_renamed(block, names) + dot + _renamed(rest, {"conv_shortcut": "nin_shortcut"})] = weight
    return found


def _open_clip(encoder: Any) -> Weights:
    weights = encoder.state_dict()
    found = {theirs: weights[ours] for ours, theirs in _OPEN_CLIP_ENDS.items()}
    found["text_projection"] = weights["text_projection.weight"].T
    for layer in range(encoder.config.num_hidden_layers):
        ours, theirs = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            joined = [weights[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{theirs}attn.in_proj_{kind}"] = torch.cat(joined)
            for name, their_name in _OPEN_CLIP.items():
                found[f"{theirs}{their_name}.{kind}"] = weights[f"{ours}{name}.{kind}"]
    return found
