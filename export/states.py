"""The token states the predictor learns from: those of the bundle's own tokenizer and text encoder, as in serving."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.diffusion.sessions import Runtime
from edge_agent.diffusion.text_encoder import TextEncoder
from edge_agent.tokens import Tokenizer
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

    def padded(self) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
        """States [N, n, d], mask [N, n] and ids [N, n], n being the longest prompt's tokens."""
        counts = np.diff(self.starts)
        mask = np.arange(counts.max()) < counts[:, None]
        states = np.zeros((*mask.shape, self.tokens.shape[1]), np.float32)
        states[mask] = self.tokens
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = self.ids
        return states, mask, ids


def encode(
    bundle: Bundle, prompts: Sequence[str]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]]:
    """States [1, L, d], mask [L] and ids [1, L] of one prompt after the other, as the daemon makes them; with a bar."""
    tokenizer = Tokenizer.open(bundle)
    encoder = TextEncoder(bundle, Runtime(threads=1))
    with progress() as bars:
        for prompt in bars.track(prompts, description="token states"):
            tokens = tokenizer.encode(prompt)
            yield encoder.encode(tokens).tokens, tokens.mask, tokens.ids


def of_prompts(cache: Path, bundle: Bundle, prompts: Sequence[str]) -> TokenStates:
    """The states of `prompts`, read from the folder `cache` when they were made before, made when not."""
    key = hashlib.sha256("\0".join((bundle.model_digest, *prompts)).encode()).hexdigest()
    file = cache / f"states-{key[:16]}.npz"
    if kept := _read(file):
        return kept
    joined = TokenStates.join(
        [(states[0][mask], ids[0][mask]) for states, mask, ids in encode(bundle, prompts)]
    )
    part = file.with_name(file.name + ".part")
    with part.open("wb") as out:
        np.savez(out, tokens=joined.tokens, ids=joined.ids, starts=joined.starts)
    part.replace(file)
    return joined


def _read(file: Path) -> TokenStates | None:
    try:
        with np.load(file) as kept:
            return TokenStates(kept["tokens"], kept["ids"], kept["starts"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # A cache that cannot be read is made again.
