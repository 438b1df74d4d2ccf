"""Random weights at Stable Diffusion 1.5's real size, as a diffusers folder and as the bundle that our export makes.

    python deploy/bench/full_size.py FOLDER [--divide BY] [--pixels N] [--half]

What a runtime costs depends on the sizes of the weights and not on their values, so nothing need be downloaded. The
export takes some minutes, 8 GB of memory and 9 GB of disk, half precision as long again and 2 GB more. FOLDER keeps it
for the next run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS = 2  # PNDM calls the UNet three times for them
GUIDANCE = 7.5
TOKENIZER = Path(__file__).resolve().parents[2] / "export" / "starter" / "weights" / "edge" / "tokenizer"


def pipeline(divide: int = 1, pixels: int = 512) -> Any:
    """`StableDiffusionPipeline` in the shape of Stable Diffusion 1.5, every width divided by `divide`: 1, 2, 4 or 8.

    The configurations are those published with the model; the tokenizer, which costs next to nothing, is the starter's.
    """
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768 // divide,
        intermediate_size=3072 // divide,
        num_hidden_layers=12,
        num_attention_heads=12 if divide < 8 else 8,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=pixels // 8,
        block_out_channels=tuple(width // divide for width in (320, 640, 1280, 1280)),
        cross_attention_dim=768 // divide,
        attention_head_dim=8,
        norm_num_groups=32 // divide,
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(width // divide for width in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 // divide,
        sample_size=pixels,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def folders(root: Path) -> tuple[Path, Path]:
    """Where the diffusers folder and the bundle lie, once made."""
    return root / "model", root / "bundle"


def half_folder(root: Path) -> Path:
    """Where the bundle in half precision lies, once made."""
    return root / "half"


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is not there yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--divide", type=int, default=1, choices=(1, 2, 4, 8), help="every width by so much")
    parser.add_argument("--pixels", type=int, default=512, help="of a side")
    parser.add_argument("--half", action="store_true", help="also a bundle in half precision")
    options = parser.parse_args(argv)
    (model, bundle), half = folders(options.folder), half_folder(options.folder)
    whole = (bundle / "manifest.json").exists() and (model / "model_index.json").exists()
    halved = (half / "manifest.json").exists() or not options.half
    if whole and halved:
        return 0
    from export.diffusion_onnx import export_bundle

    ours = options.folder / ".made-by-the-benchmark"
    if not ours.exists() and options.folder.exists() and any(options.folder.iterdir()):
        print(f"full-size: {options.folder} holds other things; name an empty folder", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)  # it may be a link to a disk that has room
    ours.touch()
    facts = {"steps": (STEPS,), "guidance": GUIDANCE, "name": "full-size", "licence": "none: random weights"}
    if not whole:
        for broken_off in (model, bundle):
            shutil.rmtree(broken_off, ignore_errors=True)
        pipeline(options.divide, options.pixels).save_pretrained(model)
        export_bundle(model, bundle, **facts)
    if not halved:
        export_bundle(model, half, dtype="fp16", **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
