"""Embeddings: concepts that a text encoder learnt as one vector or several, by textual inversion, each with a name that
stands for it in prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.loaders.textual_inversion import TEXT_INVERSION_NAME_SAFE
from safetensors.torch import load_file

from export import pipeline as pipelines
from export.errors import ExportError, misfit

# How the vectors for each text encoder are called in files that people pass around; diffusers gives them the concept's
# name, in a file for a single encoder.
_OF_ONE = ("emb_params",)
_OF_TWO = ("clip_l", "clip_g")


def located(embedding: str) -> Path:
    """The file `embedding`, or that of the hub's repository of this name, under the name that diffusers gives it.

    Raises ExportError where there is no such file, or it is damaged.
    """
    return pipelines.located(embedding, "an embedding", TEXT_INVERSION_NAME_SAFE)


def add(pipeline: Any, file: Path, name: str | None = None) -> str:
    """Teach the text encoders of `pipeline`, which are in float32, the concept in `file`; returns the name that stands
    for it from now on: `name`, or the one that diffusers wrote into the file, or the file's own.

    Raises ExportError where the file holds no vectors for these text encoders, or the name is taken.
    """
    if not isinstance(pipeline, TextualInversionLoaderMixin):
        raise ExportError(f"{type(pipeline).__name__} reads no embeddings")
    weights = load_file(file)
    two = "text_encoder_2" in pipelines.kind(pipeline).parts
    wanted = _OF_TWO if two else _OF_ONE
    if not two and len(weights) == 1 and not weights.keys() & {*_OF_ONE, *_OF_TWO}:
        wanted = tuple(weights)
        name = name or wanted[0]
    name = name or file.stem
    if set(wanted) != weights.keys():
        raise ExportError(
            f"{file} holds {_listed(weights)}, and an embedding for {type(pipeline).__name__} holds {_listed(wanted)}: "
            "it was made for another model, or is none"
        )
    for number, vectors in zip(("", "_2"), map(weights.get, wanted), strict=False):
        tokenizer, encoder = (getattr(pipeline, part + number) for part in ("tokenizer", "text_encoder"))
        hidden = encoder.get_input_embeddings().embedding_dim
        if vectors.dim() not in (1, 2) or vectors.shape[-1] != hidden or not vectors.numel():
            raise ExportError(
                f"{file} was made for another model: it holds {'x'.join(map(str, vectors.shape))} numbers, and the "
                f"text_encoder{number} of this one reads vectors of {hidden}"
            )
        if not vectors.isfinite().all():
            raise ExportError(f"{file} is damaged: it holds what is no number; get it again")
        learnt = vectors.float() if vectors.dim() == 2 else vectors.float()[None]
        try:
            with pipelines.quiet():
                pipeline.load_textual_inversion(
                    {name: learnt}, token=name, tokenizer=tokenizer, text_encoder=encoder
                )
        except Exception as error:  # such as that the name is a token already
            raise ExportError(f"{file} cannot be added as {name!r}: {misfit(error)}") from error
    return name


def _listed(names: Any) -> str:
    return " and ".join(sorted(names)[:3]) or "nothing"
