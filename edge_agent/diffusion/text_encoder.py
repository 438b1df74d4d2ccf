"""Token ids to token states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.diffusion.sessions import Runtime, Session, Stop
from edge_agent.errors import BundleError, GenerationFailed
from edge_agent.manifest import TEXT_ENCODER, TEXT_ENCODER_2, TOKENIZER, TOKENIZER_2
from edge_agent.tokens import Tokenizer, Tokens

Floats = NDArray[np.float32]

SMALL_BYTES = 10_000_000
"""A graph smaller than this is done before a second thread has woken up: the starter's, of 2 MB, takes half as long on
one as on two. At 14 MB two are as fast as one, at 44 MB 1.6 times as fast. What else is done to it below makes no
difference at 500 MB."""


@dataclass(frozen=True)
class TextStates:
    """What the denoiser knows of a prompt."""

    tokens: Floats  # [1, L, d]; the quality predictor reads these too
    pooled: Floats | None = None  # [1, p], the whole prompt as one vector, where the denoiser takes it


class TextEncoder:
    """The bundle's text encoder. Its states drive the denoiser and are what the quality predictor reads.

    Stable Diffusion XL and 3 have two: each token's state is then the first's with the second's behind it.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        """Raises BundleError when a graph cannot be loaded or has another signature."""
        facts = bundle.manifest
        self._shape = (facts.text_tokens, facts.text_hidden)
        self._zero_negative = facts.added is not None and facts.added.zero_negative
        self._folder = bundle.folder

        def session_of(graph: str, hidden: int | None, states: str, *pooled: str) -> Session:
            on, tokens, files = runtime, facts.text_tokens, bundle.files_of(graph)
            if bundle.size_of(graph) < SMALL_BYTES:
                # Told what the graph leaves open, it need not compute sizes and mask in every run: 9 % less time.
                sizes = {**runtime.sizes, "batch_size": 1, "sequence_length": tokens}
                # On a CPU adding and normalising in two steps takes 6 % less than onnxruntime's kernel for both.
                unfused = ("SkipLayerNormFusion",) if runtime.on_cpu else ()
                on = replace(runtime, threads=1, sizes=sizes, unfused=unfused)
            session = Session(bundle.path(graph), ["input_ids"], [states, *pooled], on, files)
            session.expect({"input_ids": (None, tokens), states: (None, tokens, hidden)})
            return session

        # Where there is a second encoder, only the sum of both sizes is known.
        hidden = facts.text_hidden if facts.second is None else None
        pooled = (facts.joint.pooled_output,) if facts.joint else ()
        self._session = session_of(TEXT_ENCODER, hidden, facts.text_output, *pooled)
        self._second = None
        if facts.second is not None:
            outputs = facts.second.text_output, facts.second.pooled_output
            self._second = session_of(TEXT_ENCODER_2, None, *outputs)

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Its graphs."""
        return (self._session,) if self._second is None else (self._session, self._second)

    def check(self, tokenizer: Tokenizer) -> None:
        """Read the largest ids of the bundle's `tokenizer` once: a graph with a smaller vocabulary fails on them.

        Raises BundleError, naming both files.
        """
        names = (TOKENIZER, TOKENIZER_2)
        for session, name, largest in zip(self.sessions, names, tokenizer.largest, strict=False):
            _check_ids(session, self._folder / name, np.full((1, self._shape[0]), largest))

    def encode(self, tokens: Tokens, stop: Stop | None = None) -> TextStates:
        """The states of a prompt. `stop` ends the work early, as in `Session.run`.

        Raises:
            BundleError: the graphs give states of another size than the manifest says.
            GenerationFailed: onnxruntime failed.
            Cancelled: `stop` was set.
        """
        # No shrinking: this arena is small, and the encoder also runs for prompts that only want a decision.
        states, *vectors = self._session.run({"input_ids": tokens.ids}, stop=stop)
        if self._second is not None and tokens.ids_2 is not None:
            more, vector = self._second.run({"input_ids": tokens.ids_2}, stop=stop)
            vectors.append(vector)
            # Before they are put together, which takes what fits alone.
            shapes = [vector.shape for vector in vectors]
            if states.shape[:-1] != more.shape[:-1] or any(
                len(shape) != 2 or shape[0] != 1 for shape in shapes
            ):
                raise BundleError(
                    f"{self._session.path} and {self._second.path} give states {states.shape} and {more.shape}, and "
                    f"vectors {shapes}, which do not fit together; export the bundle again"
                )
            states = np.concatenate((states, more), axis=-1)
        if states.shape != (1, *self._shape):
            raise BundleError(
                f"{self._session.path} gives states {states.shape}, the manifest says {(1, *self._shape)}"
            )
        return TextStates(states, np.concatenate(vectors, axis=-1) if vectors else None)

    def encode_negative(self, tokens: Tokens, *, empty: bool, stop: Stop | None = None) -> TextStates:
        """The states of a negative prompt, see `encode`; all zeros for an `empty` one where the model wants that. White
        space, which has no tokens of its own either, is not empty: so has it diffusers.
        """
        states = self.encode(tokens, stop)
        if not (self._zero_negative and empty):
            return states
        pooled = None if states.pooled is None else np.zeros_like(states.pooled)
        return TextStates(np.zeros_like(states.tokens), pooled)


def _check_ids(session: Session, tokenizer: Path, ids: NDArray[np.int64]) -> None:
    try:
        session.run({"input_ids": ids})
    except GenerationFailed as error:
        why = (
            f"{tokenizer} gives token ids up to {np.max(ids)}, on which {session.path} fails: they are not of one "
            "model; export the bundle again"
        )
        try:
            session.run({"input_ids": np.zeros_like(ids)})
        except GenerationFailed:  # on an id that every vocabulary has: what runs it cannot
            why = error.message
        raise BundleError(why) from error
