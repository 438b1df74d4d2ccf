"""What a router is to the benchmark, and what it may see of a prompt.

A router joins with one class: give it the three attributes of ``Router``, and name it in ``routers.ROUTERS`` (or pass
``--router package.module:Class``). It is fitted on the training prompts with each of its settings, the best of them on
the validation prompts is fitted with more seeds, and only then are test prompts scored, without their outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.superiority import relative_superiority
from edge_agent.tokens import Tokenizer
from export.bootstrap import Floats
from export.calibrate import scale_of
from export.outcomes import Outcomes
from export.states import of_prompts, of_shorter_prompts
from export.train import Examples


@dataclass(frozen=True)
class Prompts:
    """Prompts with what a router may read of them, and (except when it scores) what came of them."""

    texts: tuple[str, ...]
    objects: NDArray[np.int64]
    """[N], how many objects each asks for."""
    examples: Examples
    """Token states [N, n, d] of the edge model's text encoder, mask and ids, mean qualities [N, M] of both models."""
    scale: Floats
    """[M], of PRS, from the training split."""
    scenes: NDArray[np.int64]
    """[N], the same number for prompts that say the same scene in other words."""
    vocabulary: int
    """One more than the largest id of a token."""

    @classmethod
    def of(
        cls,
        outcomes: Outcomes,
        bundle: Bundle,
        scenes: NDArray[np.int64],
        cache: Path,
        splits: Sequence[str],
    ) -> dict[str, Prompts]:
        """Those of each of ``splits``, of the training prompts also less a token each; ``scenes`` [N] numbers what each
        prompt of the matrix says. Token states are kept in the folder ``cache``.
        """
        scale = scale_of(outcomes.split("train"), 1.0)
        vocabulary = Tokenizer.open(bundle).vocabulary
        found = {}
        for split in splits:
            part = outcomes.split(split)
            states = of_prompts(cache, bundle, part.prompts)
            examples = Examples.of(states, part.edge, part.cloud)
            if split == "train":
                examples = examples.beside(*of_shorter_prompts(cache, bundle, part.prompts))
            said = scenes[outcomes.splits == split]
            found[split] = cls(part.prompts, part.objects, examples, scale, said, vocabulary)
        return found

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def unseen(self) -> Prompts:
        """The same before anything came of them: their qualities are NaN."""
        unknown = torch.full_like(self.examples.edge, torch.nan)
        return replace(self, examples=replace(self.examples, edge=unknown, cloud=unknown))

    @property
    def gain(self) -> Floats:
        """[N], measured quality of the cloud's image less that of the edge's, a mean over metrics."""
        gap = self.examples.cloud - self.examples.edge
        return gap.mean(1).double().numpy()

    @property
    def pooled(self) -> NDArray[np.float32]:
        """[N, d], mean state of each prompt's own tokens."""
        mask = self.examples.mask[..., None]
        total = (self.examples.states * mask).sum(1) / mask.sum(1).clamp_min(1)
        return total.numpy().astype(np.float32)

    def superiority(self, edge: torch.Tensor, cloud: torch.Tensor) -> Floats:
        """PRS [N] of qualities [N, M], all metrics weighing the same."""
        weights = np.full(len(self.scale), 1 / len(self.scale))
        return relative_superiority(edge.numpy(), cloud.numpy(), self.scale, weights)

    @property
    def wins(self) -> Floats:
        """[N], 1 where the edge's image is at least as good by PRS, else 0: the label of routers that classify."""
        return (self.superiority(self.examples.edge, self.examples.cloud) >= 0.5).astype(np.float64)


Scorer = Callable[[Prompts], Floats]
"""Scores [N] of prompts; the lowest go to the cloud first. ``examples.edge`` and ``examples.cloud`` are NaN there."""


class Router(Protocol):
    """A way of choosing the prompts that go to the cloud."""

    name: str
    settings: Sequence[Mapping[str, float]]
    """What is tried on validation. Those of `routers` have one each; those that learn had theirs
    chosen of 24 by `tune`."""

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        """Learn from ``train``; ``validation`` is for early stopping. The same seed makes the same scorer."""
