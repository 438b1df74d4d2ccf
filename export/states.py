"""The token states the predictor learns from: those of the bundle's own tokenizer and text encoder, as in serving."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.diffusion.sessions import Runtime
from edge_agent.diffusion.text_encoder import TextEncoder
from edge_agent.tokens import Tokenizer, Tokens
from export.errors import DAMAGED_NPZ
from export.output import replacing
from export.terminal import progress


@dataclass(frozen=True)
class TokenStates:
    """States and ids of each prompt's own tokens, one prompt after the other."""

    tokens: NDArray[np.float32]
    """[tokens of all prompts, d]"""
    ids: NDArray[np.int64]
    """[tokens of all prompts]"""
    starts: NDArray[np.int64]
    """[N + 1]; prompt i owns ``tokens[starts[i]:starts[i + 1]]``."""

    @classmethod
    def join(cls, prompts: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]]) -> TokenStates:
        """From one [tokens, d] and one [tokens] array a prompt."""
        states, ids = zip(*prompts, strict=True)
        return cls(np.concatenate(states), np.concatenate(ids), np.cumsum([0, *map(len, states)]))

    def means(self) -> NDArray[np.float32]:
        """[N, d], the mean state of each prompt's own tokens."""
        return np.stack([one.mean(axis=0) for one in np.split(self.tokens, self.starts[1:-1])])

    def padded(self, width: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
        """States [N, n, d], mask [N, n] and ids [N, n], n being the longest prompt's tokens or ``width``, if more."""
        counts = np.diff(self.starts)
        mask = np.arange(max(width, counts.max())) < counts[:, None]
        states = np.zeros((*mask.shape, self.tokens.shape[1]), np.float32)
        states[mask] = self.tokens
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = self.ids
        return states, mask, ids


SHORTER_SEED = 0  # draws the token that a shorter prompt lacks
Arrays = Mapping[str, NDArray[Any]]
Encoded = Iterator[tuple[NDArray[np.float32], list[int], NDArray[np.int64]]]
"""States [1, L, d], positions of the own tokens and ids [1, L] of one prompt after the other."""


def encode(bundle: Bundle, prompts: Sequence[str]) -> Encoded:
    """What the daemon reads of the prompts; with a bar."""
    return _encoded(bundle, _tokenized(bundle, prompts), "token states")


def of_prompts(cache: Path, bundle: Bundle, prompts: Sequence[str]) -> TokenStates:
    """The states of `prompts`, read from the folder `cache` when they were made before, made when not."""
    kept = _kept(_file(cache, "states", bundle, prompts), lambda: _joined(encode(bundle, prompts)))
    return TokenStates(kept["tokens"], kept["ids"], kept["starts"])


def of_shorter_prompts(
    cache: Path, bundle: Bundle, prompts: Sequence[str]
) -> tuple[TokenStates, NDArray[np.int64]]:
    """The same of each prompt without one of its own tokens, and which [N] that is, counted from 0.

    A prompt without any stays as it is.
    """

    def make() -> Arrays:
        draw = np.random.default_rng(SHORTER_SEED)
        tokens = _tokenized(bundle, prompts)
        deleted = [int(draw.integers(max(1, len(one.own)))) for one in tokens]
        pairs = zip(tokens, deleted, strict=True)
        shorter = [one.without(one.own[place]) if one.own else one for one, place in pairs]
        made = _encoded(bundle, shorter, "token states of shorter prompts")
        return {**_joined(made), "deleted": np.array(deleted)}

    kept = _kept(_file(cache, f"shorter-{SHORTER_SEED}", bundle, prompts), make)
    return TokenStates(kept["tokens"], kept["ids"], kept["starts"]), kept["deleted"]


def _tokenized(bundle: Bundle, prompts: Sequence[str]) -> list[Tokens]:
    tokenizer = Tokenizer.open(bundle)
    return [tokenizer.encode(prompt) for prompt in prompts]


def _encoded(bundle: Bundle, prompts: Sequence[Tokens], description: str) -> Encoded:
    encoder = TextEncoder(bundle, Runtime(threads=1))
    with progress() as bars:
        for tokens in bars.track(prompts, description=description):
            yield encoder.encode(tokens).tokens, tokens.own, tokens.ids


def _file(cache: Path, kind: str, bundle: Bundle, prompts: Sequence[str]) -> Path:
    key = hashlib.sha256("\0".join((bundle.model_digest, *prompts)).encode()).hexdigest()
    return cache / f"{kind}-{key[:16]}.npz"


def _joined(made: Encoded) -> Arrays:
    states = TokenStates.join([(states[0][own], ids[0][own]) for states, own, ids in made])
    return {"tokens": states.tokens, "ids": states.ids, "starts": states.starts}


def _kept(file: Path, make: Callable[[], Arrays]) -> Arrays:
    """What the file holds, or else what is made, and kept there."""
    if kept := _read(file):
        return kept
    made = make()
    with replacing(file) as partial:
        np.savez(partial, **made)
    return made


def _read(file: Path) -> Arrays:
    try:
        with np.load(file) as kept:
            return dict(kept)
    except DAMAGED_NPZ:
        return {}  # A cache that cannot be read is made again.
