"""Tiny seeded pipelines: of Stable Diffusion 1.5's shape (77 tokens, cross-attention, guidance, an autoencoder), of
Stable Diffusion 2's, of latent consistency models', of Stable Diffusion XL's, of Playground 2.5's and of Stable
Diffusion 3's, with an ordinary autoencoder or a tiny one.

Random weights, made by code in a second. Everything that runs Stable Diffusion runs on them.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

TOKENS = 77
HIDDEN = 32
HIDDEN_2, POOLED = 24, 16  # of the second text encoder of Stable Diffusion XL and 3
POOLED_1, JOINT = 8, 64  # of the first text encoder of Stable Diffusion 3, and of what its transformer reads

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# Enough merges that common words become one token, others several.
_WORDS = ("cat", "dog", "the", "and", "red", "beach", "moon", "two", "a", "on", "of")


def miniature_pipeline(
    seed: int = 0, size: int = 64, factor: int = 8, tokens: int = TOKENS
) -> StableDiffusionPipeline:
    """A pipeline for images of `size` pixels a side, whose autoencoder shrinks by `factor` (4 or 8)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer(tokens)
        text_encoder = CLIPTextModel(_text_config(tokenizer, HIDDEN, tokens))
        unet = _unet(size // factor)
        vae = _autoencoder(size, factor)
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    return _pipeline(
        StableDiffusionPipeline,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
    )


def miniature_v2(seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 2.1 at 768 pixels: OpenCLIP's text encoder, and a denoiser of another make that predicts v."""
    plain = miniature_pipeline(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        tokenizer = _tokenizer(pad="!")
        # Its config names other tokens than its tokenizer has, of which 2 for the end is the one that matters: a prompt
        # as one vector is looked for at the highest id.
        config = _text_config(tokenizer, HIDDEN, TOKENS, hidden_act="gelu")
        config.bos_token_id, config.pad_token_id, config.eos_token_id = 0, 1, 2
        text_encoder = CLIPTextModel(config)
        unet = _unet(
            8,
            block_out_channels=(16, 32, 32),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=[2, 4, 4],  # despite its name how many heads each block has
            use_linear_projection=True,
            upcast_attention=True,
        )
    return _pipeline(
        StableDiffusionPipeline,
        vae=plain.vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            **BETAS,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        ),
    )


def miniature_lcm(seed: int = 0) -> LatentConsistencyModelPipeline:
    """A latent consistency model: its denoiser takes the guidance scale as an input."""
    plain = miniature_pipeline(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _unet(8, time_cond_proj_dim=16)
        # Random networks hear little of it; made louder, a test can see that it was told.
        with torch.no_grad():
            unet.time_embedding.cond_proj.weight.mul_(4.0)
    return _pipeline(
        LatentConsistencyModelPipeline,
        vae=plain.vae,
        text_encoder=plain.text_encoder,
        tokenizer=plain.tokenizer,
        unet=unet,
        scheduler=LCMScheduler(**BETAS),
    )


def miniature_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders, the prompt as one vector and the sizes as added conditioning."""
    plain = miniature_pipeline(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        tokenizer_2 = _tokenizer(pad="!")
        config = _text_config(tokenizer_2, HIDDEN_2, TOKENS, projection_dim=POOLED, hidden_act="gelu")
        text_encoder_2 = CLIPTextModelWithProjection(config)
        unet = _unet(
            8,
            cross_attention_dim=HIDDEN + HIDDEN_2,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=POOLED + 6 * 8,
            use_linear_projection=True,
        )
    return _pipeline(
        StableDiffusionXLPipeline,
        vae=plain.vae,
        text_encoder=plain.text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=plain.tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=plain.scheduler,
        add_watermarker=False,
    )


def miniature_edm(seed: int = 0) -> StableDiffusionXLPipeline:
    """Playground 2.5: Stable Diffusion XL trained by EDM, its latents with a mean and a deviation for each channel."""
    pipeline = miniature_xl(seed)
    vae = copy.deepcopy(pipeline.vae)
    vae.register_to_config(
        latents_mean=[-1.6574, 1.886, -1.383, 2.5155],
        latents_std=[8.4927, 5.9022, 6.5498, 5.2299],
        scaling_factor=0.5,
    )
    pipeline.vae, pipeline.scheduler = vae, EDMDPMSolverMultistepScheduler(solver_type="midpoint")
    return pipeline


def miniature_v3(seed: int = 0) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 without its third text encoder: a transformer that attends to tokens and latents together and
    predicts a velocity, latents of 16 channels with a shift.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 3)
        tokenizer, tokenizer_2 = _tokenizer(), _tokenizer(pad="!")
        config = _text_config(tokenizer, HIDDEN, TOKENS, projection_dim=POOLED_1)
        config_2 = _text_config(tokenizer_2, HIDDEN_2, TOKENS, projection_dim=POOLED, hidden_act="gelu")
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=JOINT,
            caption_projection_dim=32,
            pooled_projection_dim=POOLED_1 + POOLED,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),  # as in 3.5 medium
            qk_norm="rms_norm",
        )
        vae = _autoencoder(
            64,
            8,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        return _pipeline(
            StableDiffusion3Pipeline,
            vae=vae,
            text_encoder=CLIPTextModelWithProjection(config),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(config_2),
            tokenizer_2=tokenizer_2,
            text_encoder_3=None,
            tokenizer_3=None,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def miniature_tiny_autoencoder() -> AutoencoderTiny:
    """An autoencoder of TAESD's kind: plain convolutions, a factor of 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
        with torch.no_grad():
            vae.decoder.layers[-1].weight.mul_(4.0)
    return vae.eval()


def save_miniature(folder: str | Path, seed: int = 0) -> Path:
    """Write `miniature_pipeline(seed)` as a diffusers folder and return it."""
    miniature_pipeline(seed).save_pretrained(folder)
    return Path(folder)


def as_transformers_5_saves(folder: Path, words: Sequence[str] = ()) -> Any:
    """The tokenizer in `folder`, with `words` added, which is one tokenizer.json there then.

    Its class has the name that was that of two other files.
    """
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(list(words), special_tokens=True)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["added_tokens_decoder"]
    named = {
        "tokenizer_class": "CLIPTokenizer",
        "extra_special_tokens": list(words),
        "backend": "tokenizers",
    }
    file.write_text(json.dumps(config | named))
    return tokenizer


def forget(part: Path, beginning: str) -> None:
    """Take the weights whose names begin so out of the file in the folder `part` of a saved pipeline."""
    file = next(part.glob("*.safetensors"))
    weights = load(file.read_bytes())  # not mapped: Windows writes over no file that is
    # transformers 5 saves without the first part of the name, and knows both.
    beginnings = (beginning, beginning.removeprefix("text_model."))
    kept = {name: weight for name, weight in weights.items() if not name.startswith(beginnings)}
    assert len(kept) < len(weights)
    save_file(kept, file, {"format": "pt"})


def _pipeline(made: Any, **parts: Any) -> Any:
    """A pipeline of class `made`, its networks in evaluation mode, without bars and a safety checker."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    if made in (StableDiffusionPipeline, LatentConsistencyModelPipeline):
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = made(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer(tokens: int = TOKENS, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A `miniature_tokenizer` that has forgotten its files."""
    with tempfile.TemporaryDirectory() as folder:
        return miniature_tokenizer(Path(folder), tokens, pad)


def _text_config(tokenizer: CLIPTokenizer, hidden: int, tokens: int, **options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def _unet(latents: int, **options: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "cross_attention_dim": HIDDEN,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
    } | options
    return UNet2DConditionModel(
        sample_size=latents,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        **settings,
    )


def _autoencoder(size: int, factor: int, **options: Any) -> AutoencoderKL:
    levels = {4: 3, 8: 4}[factor]
    settings: dict[str, Any] = {"latent_channels": 4} | options
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8, 16, 16)[-levels:],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        sample_size=size,
        **settings,
    )
    _brighten(vae)
    return vae


def miniature_tokenizer(folder: Path, tokens: int = TOKENS, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-level BPE of CLIP's kind: every byte, each again at a word's end, a few merges, start, end."""
    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            left, right = pieces[0], pieces[1]
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                vocabulary.append(left + right)
            pieces[:2] = [left + right]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token=pad,
        model_max_length=tokens,
    )


def _brighten(vae: AutoencoderKL) -> None:
    """Random decoders give nearly one colour; a stronger last layer lets a test see differences."""
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(4.0)
