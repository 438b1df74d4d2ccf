"""Reads a prompt: from its text to token states, predicted quality of both models' images, and PRS."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from edge_agent.budget import BudgetState
from edge_agent.bundle import Bundle
from edge_agent.diffusion.sessions import Runtime, Session, Stop
from edge_agent.diffusion.text_encoder import TextEncoder, TextStates
from edge_agent.manifest import PREDICTOR
from edge_agent.policy import Decision, Reason, Route, TokenPull
from edge_agent.predictor import Prediction, Predictor
from edge_agent.recent import Recent
from edge_agent.superiority import Superiority
from edge_agent.tokens import Tokenizer, Tokens


class Reading(NamedTuple):
    """What is known of a prompt before anything is generated.

    `prediction` is None where the bundle has no predictor, `prs` also where its calibration is not for this model.
    `unfamiliar` are those of the prompt's own tokens that the calibration does not name among those met in training.
    """

    tokens: Tokens
    states: TextStates  # they also drive the local image
    prediction: Prediction | None
    prs: float | None
    unfamiliar: tuple[str, ...]
    timings_ms: Mapping[str, float]

    def decision(
        self,
        route: Route,
        reason: Reason,
        alpha: float | None,
        quota: tuple[BudgetState, ...] = (),
        stages_ms: Mapping[str, float] = MappingProxyType({}),
    ) -> Decision:
        """The decision with everything the reading says for it, the quota's account, and the stages after reading."""
        edge, cloud, pull = self.prediction or ((), (), ())
        timings_ms = {**self.timings_ms, **stages_ms}
        return Decision(
            route=route,
            reason=reason,
            prs=self.prs if alpha is not None else None,
            alpha=alpha,
            edge_quality=tuple(edge),
            cloud_quality=tuple(cloud),
            tokens=tuple(map(TokenPull, self.tokens.texts, map(tuple, pull))),
            quota=quota,
            timings_ms={**timings_ms, "total": sum(timings_ms.values())},
            prompt_truncated=self.tokens.truncated,
            unfamiliar=self.unfamiliar,
        )


class Reader:
    """Tokenizer, text encoder and predictor of a bundle, with its calibration.

    `advice` says what to run when prompts cannot be routed; it is empty when they can.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        routing_rate: float,
        followed: Path | None = None,
    ) -> None:
        """Alpha follows the scores in the folder `followed`, where one is named. Raises BundleError, naming the file
        that does not fit.
        """
        self.bundle = bundle
        self.routing_rate = routing_rate
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._predictor: Predictor | None = None
        self.sessions: tuple[Session, ...] = text_encoder.sessions  # every graph
        if bundle.predictor is not None:
            width, files = bundle.manifest.text_hidden, bundle.files_of(PREDICTOR)
            self._predictor = Predictor.load(bundle.predictor, width, files)
            self.sessions += (self._predictor.session,)
        self.calibration = bundle.calibration
        self.advice = bundle.advice
        fitting = self.calibration if not self.advice else None
        self._familiar = frozenset(fitting.familiar) if fitting else frozenset[int]()
        self._superiority = Superiority(fitting.scale, fitting.weights) if fitting else None
        self.recent = (
            Recent(fitting, routing_rate, follow=followed is not None, folder=followed) if fitting else None
        )

    @classmethod
    def open(cls, bundle: Bundle, routing_rate: float, runtime: Runtime | None = None) -> Reader:
        """Load what reading needs and no more. Raises BundleError, naming the file that cannot be used."""
        tokenizer = Tokenizer.open(bundle)
        text_encoder = TextEncoder(bundle, runtime or Runtime())
        text_encoder.check(tokenizer)
        return cls(bundle, tokenizer, text_encoder, routing_rate)

    @property
    def alpha(self) -> float | None:
        """Prompts with PRS below it are worth the cloud; None where no calibration fits."""
        return self.recent.alpha if self.recent else None

    @property
    def calibration_id(self) -> str:
        """Of the bundle's calibration, be it for these models or others; empty where it has none."""
        return self.calibration.calibration_id if self.calibration else ""

    @property
    def calibrated_for(self) -> str:
        """Digest of the cloud model that it was made for; empty where there is none."""
        return self.calibration.cloud_digest if self.calibration else ""

    def succeed(self, former: Reader) -> None:
        """Go on with what `former` knows of recent prompts, where their scores mean the same."""
        if self.recent and former.recent and self.recent.calibration_id == former.recent.calibration_id:
            self.recent = former.recent

    def save(self) -> None:
        """Keep what is to outlive the process."""
        if self.recent is not None:
            self.recent.save()

    @property
    def loaded(self) -> bool:
        """Whether every graph is in memory, so that reading need not load one."""
        return all(session.loaded_at is not None for session in self.sessions)

    @property
    def takes_turns(self) -> bool:
        """Whether reading may have to wait for a call of the denoiser."""
        return any(session.takes_turns for session in self.sessions)

    def read(self, prompt: str, stop: Stop | None = None) -> Reading:
        """Some milliseconds of work with a small text encoder, half a second with the largest, and longer where it has
        to be loaded; `stop` ends it early. Safe to call from several threads.

        Raises Cancelled, GenerationFailed, BundleError, and Busy (OutOfMemory among it).
        """
        began = time.perf_counter()
        tokens = self._tokenizer.encode(prompt)
        tokenized = time.perf_counter()
        states = self._text_encoder.encode(tokens, stop)
        encoded = time.perf_counter()
        prediction, prs = self._predict(states, tokens)
        unfamiliar = self._unfamiliar(tokens)
        predicted = time.perf_counter()
        timings_ms = {
            "tokenize": (tokenized - began) * 1e3,
            "encode": (encoded - tokenized) * 1e3,
            "predict": (predicted - encoded) * 1e3,
        }
        return Reading(tokens, states, prediction, prs, unfamiliar, timings_ms)

    def prs_without(self, tokens: Tokens, position: int, stop: Stop | None = None) -> float | None:
        """PRS of the prompt without the token at `position` of L; reads it anew. Raises what `read` raises."""
        shorter = tokens.without(position)
        return self._predict(self._text_encoder.encode(shorter, stop), shorter)[1]

    def _predict(self, states: TextStates, tokens: Tokens) -> tuple[Prediction | None, float | None]:
        if self._predictor is None:
            return None, None
        prediction = self._predictor.predict(states.tokens, tokens.own, tokens.ids)
        if self._superiority is None:
            return prediction, None
        return prediction, self._superiority.of(prediction.edge, prediction.cloud)

    def _unfamiliar(self, tokens: Tokens) -> tuple[str, ...]:
        if not self._familiar:
            return ()
        ids = tokens.ids[0].tolist()
        own = zip(tokens.own, tokens.texts, strict=True)
        return tuple([text for position, text in own if ids[position] not in self._familiar])
