"""Embeddings: concepts that a text encoder learnt as one vector or several, by textual inversion, each with a name that
stands for it in prompts.

They are added here and not by diffusers, which takes names that other concepts' vectors have, or would have next, and a
fast tokenizer then finds those of small letters alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.loaders.textual_inversion import TEXT_INVERSION_NAME, TEXT_INVERSION_NAME_SAFE
from tokenizers import AddedToken

from edge_agent import tokens
from export import source, support, weights_file
from export.errors import ExportError

# How the vectors for each text encoder are called in files that people pass around. Where there is but one encoder they
# have one of two names, or the concept's, which diffusers gives them.
_OF_ONE = ("emb_params", "*")
_OF_TWO = ("clip_l", "clip_g")


def located(embedding: str) -> Path:
    """The file `embedding`, or that of the hub's repository of this name, under the names that diffusers gives it.

    Raises ExportError where there is no such file, or it is damaged.
    """
    return source.located(embedding, "an embedding", TEXT_INVERSION_NAME_SAFE, TEXT_INVERSION_NAME)


def refuse_class(made: type) -> None:
    """Raises ExportError where pipelines of class `made` read no embeddings."""
    if not issubclass(made, TextualInversionLoaderMixin):
        raise ExportError(f"{made.__name__} reads no embeddings: leave --embedding out")


def add(pipeline: Any, file: Path, name: str | None = None) -> str:
    """Teach the text encoders of `pipeline`, which are in float32, the concept in `file`; returns the name that stands
    for it from now on: `name`, or the one that diffusers wrote into the file, or the file's own.

    Raises ExportError where the file holds no vectors for these text encoders, or the name is taken.
    """
    weights = weights_file.read_floating(file)
    two = "text_encoder_2" in support.kind(pipeline).parts
    wanted = _OF_TWO if two else _OF_ONE[:1]
    if not two and len(weights) == 1 and not weights.keys() & {*_OF_TWO}:
        wanted = tuple(weights)
        name = name or (None if wanted[0] in _OF_ONE else wanted[0])
    name = (name or file.stem).strip()
    if not name or not name.isprintable():
        raise ExportError(
            f"{file}: {name!r} cannot be written in a prompt; give it a name with {file.name}=NAME"
        )
    if set(wanted) != weights.keys():
        raise ExportError(
            f"{file} holds {_listed(weights)}, and an embedding for {type(pipeline).__name__} holds {_listed(wanted)}: "
            "it was made for another model, or is none"
        )
    encoders = [
        (getattr(pipeline, "tokenizer" + number), getattr(pipeline, "text_encoder" + number), weights[key])
        for number, key in zip(("", "_2"), wanted, strict=False)
    ]
    learnt = [_vectors(file, encoder, vectors) for _, encoder, vectors in encoders]
    if len({len(vectors) for vectors in learnt}) > 1:
        raise ExportError(
            f"{file} holds {' and '.join(str(len(vectors)) for vectors in learnt)} vectors for the two text encoders, "
            "and as many for both are supported"
        )
    for tokenizer, _, _ in encoders:
        _refuse_taken(file, name, len(learnt[0]), tokenizer.added_tokens_encoder, tokenizer.get_vocab())
    names = [name, *(f"{name}_{number}" for number in range(1, len(learnt[0])))]
    for (tokenizer, encoder, _), vectors in zip(encoders, learnt, strict=True):
        # Not normalized: found as it is written, before the text is put into small letters.
        tokenizer.add_tokens([AddedToken(one, normalized=False) for one in names])
        known = encoder.get_input_embeddings().num_embeddings
        with source.quiet():
            encoder.resize_token_embeddings(max(known, len(tokenizer)), mean_resizing=False)
        encoder.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(names)] = vectors
        _end_at(encoder, tokenizer.eos_token_id)
    return name


def _end_at(encoder: Any, token: int) -> None:
    """Have `encoder` take its pooled state at the first such token. Configs of before transformers 4.31, XL's too, name
    another, and it is then taken at the largest, which a concept's is.
    """
    encoder.config.eos_token_id = token
    for part in encoder.modules():
        if hasattr(part, "eos_token_id"):
            part.eos_token_id = token


def _vectors(file: Path, encoder: Any, vectors: torch.Tensor) -> torch.Tensor:
    """[V, hidden] in float32, of a concept for this encoder."""
    hidden = encoder.get_input_embeddings().embedding_dim
    if vectors.dim() not in (1, 2) or vectors.shape[-1] != hidden or not vectors.numel():
        raise ExportError(
            f"{file} was made for another model: it holds {'x'.join(map(str, vectors.shape)) or 'one'} numbers, and a "
            f"text encoder of this one reads vectors of {hidden}"
        )
    vectors = vectors.float()
    if not vectors.isfinite().all():
        raise ExportError(f"{file} is damaged: it holds what is no number; get it again")
    return vectors.reshape(-1, hidden)


def _refuse_taken(
    file: Path, name: str, vectors: int, added: Collection[str], vocabulary: Mapping[str, int]
) -> None:
    """Where a prompt would not be read as it was meant: with tokens that stand for something else, too."""
    cure = f"give it another name with {file.name}=NAME"
    for one in (name, *(f"{name}_{number}" for number in range(1, vectors + 1))):
        if one in vocabulary or f"{one.lower()}</w>" in vocabulary:
            raise ExportError(
                f"{file} cannot be added as {name!r}: {one!r} is a token of the model already; {cure}"
            )
    several = tokens.concepts(added)
    for other in added:
        if name == f"{other}_{len(several.get(other, [other]))}":
            raise ExportError(
                f"{file} cannot be added as {name!r}, which would be one more vector of {other!r}; {cure}"
            )
    inner = [other for other in several if other in name] + [
        other for other in added if vectors > 1 and name in other
    ]
    if inner:
        raise ExportError(
            f"{file} cannot be added as {name!r} beside {inner[0]!r}: one is part of the other's name, where diffusers "
            f"would write it out; {cure}"
        )


def _listed(names: Collection[str]) -> str:
    return " and ".join(sorted(names)[:3]) or "nothing"
