"""How layers are called in the code that Stable Diffusion was first published with, and still in files of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def unet_names(unet: Any) -> dict[str, str]:
    """Of the layers of an UNet2DConditionModel, by their names there. Within an attention the two are alike."""
    blocks = dict(_ENDS)
    row = 1
    for level, block in enumerate(unet.down_blocks):
        for place in range(len(block.resnets)):
            blocks[f"down_blocks.{level}.resnets.{place}"] = f"input_blocks.{row}.0"
            blocks[f"down_blocks.{level}.attentions.{place}"] = f"input_blocks.{row}.1"
            row += 1
        if block.downsamplers:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{row}.0.op"
            row += 1
    row = 0
    for level, block in enumerate(unet.up_blocks):
        for place in range(len(block.resnets)):
            blocks[f"up_blocks.{level}.resnets.{place}"] = f"output_blocks.{row}.0"
            blocks[f"up_blocks.{level}.attentions.{place}"] = f"output_blocks.{row}.1"
            row += 1
        if block.upsamplers:
            at = 2 if hasattr(block, "attentions") else 1
            blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{row - 1}.{at}.conv"
    return {name: _renamed(name, blocks) for name, _ in unet.named_modules()}


def _renamed(name: str, blocks: Mapping[str, str]) -> str:
    """`down_blocks.0.resnets.1.conv1` -> `input_blocks.2.0.in_layers.2`."""
    block, rest = name, ""
    while block and block not in blocks:
        block, _, last = block.rpartition(".")
        rest = f".{last}{rest}"
    if not block:
        return name
    within = rest[1:]
    return blocks[block] + (f".{_RESNET.get(within, within)}" if within else "")
