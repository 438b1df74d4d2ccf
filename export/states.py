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
        return np.stack([mean(one) for one in np.split(self.tokens, self.starts[1:-1])])

    def padded(self, width: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
        """States [N, n, d], mask [N, n] and ids [N, n], n being the longest prompt's tokens or ``width``, if more."""
        counts = np.diff(self.starts)
        mask = np.arange(max(width, counts.max())) < counts[:, None]
        states = np.zeros((*mask.shape, self.tokens.shape[1]), np.float32)
        states[mask] = self.tokens
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = self.ids
        return states, mask, ids


def mean(own: NDArray[np.float32]) -> NDArray[np.float32]:
    """[d], of the states [T, d] of a prompt's own tokens; zeros where it has none."""
    return own.sum(axis=0) / max(1, len(own))


SHORTER_SEED = 0  # draws the token that a shorter prompt lacks
PIECE = 100  # prompts; what an interruption loses at most, a minute of an encoder 1,024 wide
Arrays = Mapping[str, NDArray[Any]]
Encoded = Iterator[tuple[NDArray[np.float32], list[int], NDArray[np.int64]]]
"""States [1, L, d], positions of the own tokens and ids [1, L] of one prompt after the other."""


def encode(bundle: Bundle, prompts: Sequence[str]) -> Encoded:
    """What the daemon reads of the prompts; with a bar."""
    encoder = TextEncoder(bundle, Runtime(threads=1))
    with progress() as bars:
        for tokens in bars.track(_tokenized(bundle, prompts), description="token states"):
            yield encoder.encode(tokens).tokens, tokens.own, tokens.ids


def of_prompts(cache: Path, bundle: Bundle, prompts: Sequence[str]) -> TokenStates:
    """The states of `prompts`, read from the folder `cache` as far as they were made before, made when not."""

    def make(file: Path) -> Arrays:
        return _made(file, bundle, _tokenized(bundle, prompts), "token states")

    kept = _kept(_file(cache, "states", bundle, prompts), make)
    return TokenStates(kept["tokens"], kept["ids"], kept["starts"])


def of_shorter_prompts(
    cache: Path, bundle: Bundle, prompts: Sequence[str]
) -> tuple[TokenStates, NDArray[np.int64]]:
    """The same of each prompt without one of its own tokens, and which [N] that is, counted from 0.

    A prompt without any stays as it is.
    """

    def make(file: Path) -> Arrays:
        draw = np.random.default_rng(SHORTER_SEED)
        tokens = _tokenized(bundle, prompts)
        deleted = [int(draw.integers(max(1, len(one.own)))) for one in tokens]
        pairs = zip(tokens, deleted, strict=True)
        shorter = [one.without(one.own[place]) if one.own else one for one, place in pairs]
        made = _made(file, bundle, shorter, "token states of shorter prompts")
        return {**made, "deleted": np.array(deleted)}

    kept = _kept(_file(cache, f"shorter-{SHORTER_SEED}", bundle, prompts), make)
    return TokenStates(kept["tokens"], kept["ids"], kept["starts"]), kept["deleted"]


def _tokenized(bundle: Bundle, prompts: Sequence[str]) -> list[Tokens]:
    tokenizer = Tokenizer.open(bundle)
    return [tokenizer.encode(prompt) for prompt in prompts]


def _file(cache: Path, kind: str, bundle: Bundle, prompts: Sequence[str]) -> Path:
    key = hashlib.sha256("\0".join((bundle.model_digest, *prompts)).encode()).hexdigest()
    return cache / f"{kind}-{key[:16]}.npz"


def _made(file: Path, bundle: Bundle, prompts: Sequence[Tokens], description: str) -> Arrays:
    """What `file` is to hold of the prompts. Each PIECE of them is kept beside it when made, for whoever goes on."""
    parts = {
        file.with_name(f"{file.stem}-{start}-{start + PIECE}{file.suffix}"): prompts[start : start + PIECE]
        for start in range(0, len(prompts), PIECE)
    }
    found = {part: _read(part) for part in parts}
    encoder = TextEncoder(bundle, Runtime(threads=1))
    with progress() as bars:
        before = sum(len(parts[part]) for part, kept in found.items() if kept)
        task = bars.add_task(description, total=len(prompts), completed=before)
        for part in (part for part, kept in found.items() if not kept):
            states = []
            for tokens in parts[part]:
                encoded = encoder.encode(tokens).tokens
                states.append((encoded[0][tokens.own], tokens.ids[0][tokens.own]))
                bars.advance(task)
            joined = TokenStates.join(states)
            found[part] = {"tokens": joined.tokens, "ids": joined.ids, "starts": joined.starts}
            _keep(part, found[part])
    counts = np.concatenate([np.diff(kept["starts"]) for kept in found.values()])
    return {
        "tokens": np.concatenate([kept["tokens"] for kept in found.values()]),
        "ids": np.concatenate([kept["ids"] for kept in found.values()]),
        "starts": np.cumsum([0, *counts]),
    }


def _kept(file: Path, make: Callable[[Path], Arrays]) -> Arrays:
    """What the file holds, or else what is made, and kept there."""
    made = _read(file)
    if not made:
        made = make(file)
        _keep(file, made)
    for part in file.parent.glob(f"{file.stem}-*{file.suffix}"):
        part.unlink(missing_ok=True)
    return made


def _keep(file: Path, made: Arrays) -> None:
    with replacing(file) as partial:
        np.savez(partial, **made)


def _read(file: Path) -> Arrays:
    try:
        with np.load(file) as kept:
            return dict(kept)
    except DAMAGED_NPZ:
        return {}  # A cache that cannot be read is made again.
