"""The routers of the benchmark: simple ones, those of the literature on language models, the paper's, and ours.

None could be had with weights for images, so all of them are trained here, from scratch, on the same labels. They read
the token states of the edge's text encoder; the classifiers of the literature, ZOOTER and ours also the words
themselves. The differences are what each of them learns, and from which label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.bootstrap import Floats
from export.mixture import SENTENCE, WORDS, Inputs, Mixture, Own, Shape, Together
from export.routerbench.router import Prompts, Router, Scorer
from export.train import Recipe, Trained, knowing
from export.train import train as train_mixture

Settings = Sequence[Mapping[str, float]]
Space = Mapping[str, Sequence[float]]
NOTHING: Settings = ({},)
# What the settings of routers are drawn from. `falling` is whether the learning rate rises and falls as ours does, or
# stays; `masked` the share of tokens whose state the attentive layer does not see in training.
NEIGHBOURS: Space = {
    "k": (1, 2, 3, 4, 5, 7, 10, 14, 20, 25, 30, 35, 40, 50, 60, 70, 80, 100, 120, 150, 200, 300, 500, 1000)
}  # fmt: skip
FACTORS: Space = {
    "learning_rate": (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "falling": (0, 1),
    "weight_decay": (1e-3, 1e-2, 1e-1),
    "width": (32, 64, 128, 256),
}
ATTENTIVE: Space = {
    "learning_rate": (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "falling": (0, 1),
    "masked": (0.0, 0.25, 0.5),
    "weight_decay": (1e-3, 1e-2, 1e-1),
}
MIXTURE: Space = {
    "learning_rate": (2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2),
    "dropout": (0.0, 0.1, 0.2, 0.3, 0.5),
    "gap_weight": (0.0, 1.0, 3.0, 10.0),
    "weight_decay": (1e-3, 1e-2, 1e-1),
}
OURS: Space = {
    "learning_rate": (3e-3, 5e-3, 1e-2, 2e-2),
    "together_rate": (5e-4, 1e-3, 2e-3, 4e-3),
    "dropout": (0.1, 0.3, 0.5),
    "masked": (0.1, 0.25, 0.5),
    "gap_weight": (1.0, 3.0),
    "gain_weight": (1.0, 3.0, 10.0),
    "rank_weight": (0.0, 1.0, 3.0, 10.0),
}


class Tuned(Router, Protocol):
    """A router whose setting is the best of those that `export.routerbench.tune` drew from its space."""

    space: Space


class Random:
    """A fair coin."""

    name, settings = "random", NOTHING

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        """Learns nothing."""
        draw = np.random.default_rng(seed)
        return lambda prompts: draw.random(len(prompts))


class PromptLength:
    """Longer prompts go to the cloud."""

    name, settings = "prompt length", NOTHING

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        """Learns nothing."""
        return lambda prompts: -np.array([len(text.split()) for text in prompts.texts], np.float64)


class NumberOfObjects:
    """Prompts that ask for more objects go to the cloud."""

    name, settings = "number of objects", NOTHING

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        """Learns nothing."""
        return lambda prompts: -prompts.objects.astype(np.float64)


class NearestNeighbours:
    """Mean measured gain of the k training prompts whose mean token state points the same way."""

    name = "kNN"
    settings: Settings = ({"k": 100},)
    space = NEIGHBOURS

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        """Keeps the training prompts."""
        middle = train.pooled.mean(0)
        known, gain, k = _unit(train.pooled - middle), train.gain, int(setting["k"])

        def score(prompts: Prompts) -> Floats:
            alike = _unit(prompts.pooled - middle) @ known.T
            nearest = np.argpartition(-alike, min(k, len(gain)) - 1, axis=1)[:, :k]
            return -gain[nearest].mean(1)

        return score


class MatrixFactorisation:
    """RouteLLM's: a bilinear score of prompt and model, so that the better model of a pair scores higher."""

    name = "matrix factorisation (RouteLLM)"
    settings = ({"learning_rate": 3e-4, "falling": 0, "weight_decay": 0.1, "width": 256},)
    space = FACTORS

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        """Bradley-Terry loss on which model's image won."""
        torch.manual_seed(seed)
        inside = int(setting["width"])
        network = _Pooled(
            train.pooled, lambda width: nn.Sequential(nn.Linear(width, inside), nn.Linear(inside, 1))
        )
        _descend(network, train, validation, seed, setting, _entropy, lambda prompts: prompts.wins)
        return _scorer(network, lambda out: out[:, 0])


class Classifier:
    """A network on the token states that says which model's image wins: RouteLLM's BERT router, from scratch."""

    name = "classifier (RouteLLM, from scratch)"
    settings: Settings = ({"learning_rate": 1e-4, "falling": 1, "masked": 0.0, "weight_decay": 1e-2},)
    space = ATTENTIVE

    def labels(self, prompts: Prompts) -> Floats:
        """[N], in [0, 1]: how surely the edge will do."""
        return prompts.wins

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        """Cross-entropy with ``labels``."""
        torch.manual_seed(seed)
        network = _Attentive(train, 1, setting["masked"])
        _descend(network, train, validation, seed, setting, _entropy, self.labels)
        return _scorer(network, lambda out: out[:, 0])


class HybridDeterministic(Classifier):
    """Hybrid LLM with hard labels: is the edge's mean quality at least the cloud's?"""

    name = "Hybrid LLM, deterministic"

    def labels(self, prompts: Prompts) -> Floats:
        """[N], 0 or 1."""
        return (prompts.gain <= 0).astype(np.float64)


class HybridProbabilistic(Classifier):
    """Hybrid LLM with soft labels: how probably is it? Of few images a model, the noise taken as that of all gains."""

    name = "Hybrid LLM, probabilistic"
    settings = ({"learning_rate": 2e-3, "falling": 1, "masked": 0.0, "weight_decay": 1e-3},)

    def labels(self, prompts: Prompts) -> Floats:
        """[N], in (0, 1)."""
        return 1 / (1 + np.exp(prompts.gain / prompts.gain.std()))


class HybridTransformed(Classifier):
    """Hybrid LLM, labels moved by the margin that makes them differ most: half of the prompts on each side."""

    name = "Hybrid LLM, transformed"
    settings = ({"learning_rate": 3e-4, "falling": 0, "masked": 0.0, "weight_decay": 1e-3},)

    def labels(self, prompts: Prompts) -> Floats:
        """[N], 0 or 1."""
        return (prompts.gain <= np.median(prompts.gain)).astype(np.float64)


class Zooter:
    """ZOOTER: distils the normalised rewards of both models' images."""

    name = "ZOOTER"
    settings = ({"learning_rate": 1e-3, "falling": 1, "masked": 0.25, "weight_decay": 0.1},)
    space = ATTENTIVE

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        """Kullback-Leibler divergence from the softmax of the standardised mean qualities."""
        torch.manual_seed(seed)
        network = _Attentive(train, 2, setting["masked"])
        spread = float(train.gain.std())

        def rewards(prompts: Prompts) -> Floats:
            both = torch.stack([prompts.examples.edge.mean(1), prompts.examples.cloud.mean(1)], dim=1)
            return torch.softmax(both / spread, dim=1).double().numpy()

        def divergence(out: Tensor, wanted: Tensor) -> Tensor:
            return F.kl_div(F.log_softmax(out, dim=1), wanted, reduction="batchmean")

        _descend(network, train, validation, seed, setting, divergence, rewards)
        return _scorer(network, lambda out: out[:, 0] - out[:, 1])


class RouteT2I:
    """The paper's: token-level prediction of all metrics for both models, ranked by PRS. One mixture."""

    name = "routet2i"
    settings: Settings = ({"learning_rate": 2e-2, "dropout": 0.2, "gap_weight": 1.0, "weight_decay": 1e-3},)
    space = MIXTURE
    # Without the terms that are not the paper's.
    recipe = Recipe(gain_weight=0.0, rank_weight=0.0, deletion_weight=0.0)

    def shape(self, prompts: Prompts) -> Shape:
        """Of the mixture."""
        return Shape(prompts.examples.states.shape[-1], prompts.examples.edge.shape[1])

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        """As `edge-export train` does, by the recipe of this class."""
        shape = self.shape(train)
        known, held_out = (part.examples.measuring(shape) for part in (train, validation))
        *_, trained = train_mixture(known, held_out, shape, replace(self.recipe, **setting), seed)
        assert isinstance(trained, Trained)
        return Ranked(trained.mixture.eval(), self.ranked)

    def ranked(self, prompts: Prompts, edge: Tensor, cloud: Tensor) -> Floats:
        """Scores [N] of predicted qualities [N, M]."""
        return prompts.superiority(edge, cloud)


@dataclass(frozen=True)
class Ranked:
    """A scorer: predicted qualities, ranked by ``rank``."""

    mixture: Mixture
    rank: Callable[[Prompts, Tensor, Tensor], Floats]

    def __call__(self, prompts: Prompts) -> Floats:
        """Scores [N]."""
        read = prompts.examples
        with torch.inference_mode():
            edge, cloud, _ = self.mixture(read.states, read.mask, read.ids)
        return self.rank(prompts, edge, cloud)


class ByGain(RouteT2I):
    """The paper's networks, ranked by the expected gain in quality in place of PRS: what headroom is made of."""

    name = "routet2i, by expected gain"

    def ranked(self, prompts: Prompts, edge: Tensor, cloud: Tensor) -> Floats:
        """Expected quality lost by staying on the edge, all metrics weighing the same in their own units."""
        return (edge - cloud).mean(1).double().numpy()

    def again(self, scorer: Ranked) -> Ranked:
        """What `fit` would give, of the networks that `RouteT2I` has trained already."""
        return replace(scorer, rank=self.ranked)


class SingleMetric(RouteT2I):
    """Ablation: predicts and compares one metric, the mean of all. Its gap is the gain, so `ByGain` is what it is
    compared with.
    """

    name = "routet2i, single metric"

    def shape(self, prompts: Prompts) -> Shape:
        """Of the mixture."""
        return replace(super().shape(prompts), metrics=1)

    def ranked(self, prompts: Prompts, edge: Tensor, cloud: Tensor) -> Floats:
        """PRS of one metric is a monotonous function of its gap."""
        return (edge - cloud)[:, 0].double().numpy()


class NoSelection(RouteT2I):
    """Ablation: every expert reads every token."""

    name = "routet2i, no token selection"

    def shape(self, prompts: Prompts) -> Shape:
        """Of the mixture."""
        return replace(super().shape(prompts), selection=False)


class SingleGate(RouteT2I):
    """Ablation: one gate an expert."""

    name = "routet2i, single gate"

    def shape(self, prompts: Prompts) -> Shape:
        """Of the mixture."""
        return replace(super().shape(prompts), dual_gate=False)


class Ours(ByGain):
    """The predictor that ships: a mixture that also reads words, and all of them together, that learns the order of
    prompts, and whose pulls are learnt of deleted tokens. Ranked by the expected gain in quality in place of PRS.
    """

    name = "ours"
    space = OURS
    recipe = Recipe()
    settings = ({name: value for name, value in asdict(recipe).items() if name in OURS},)

    def shape(self, prompts: Prompts) -> Shape:
        """Of each mixture."""
        shape = replace(super().shape(prompts), words=WORDS, sentence=SENTENCE)
        return knowing(shape, prompts.examples, prompts.vocabulary)


ROUTERS: tuple[type[Router], ...] = (
    Random,
    PromptLength,
    NumberOfObjects,
    NearestNeighbours,
    MatrixFactorisation,
    Classifier,
    HybridDeterministic,
    HybridProbabilistic,
    HybridTransformed,
    Zooter,
    RouteT2I,
    ByGain,
    SingleMetric,
    NoSelection,
    SingleGate,
    Ours,
)
BASELINES = ROUTERS[1:10]
"""What the paper's method and ours are compared with; the best of them is chosen on validation."""

TUNED: tuple[type[Tuned], ...] = (*BASELINES[2:], RouteT2I, Ours)
"""Those that learn, but for the ablations: they have the setting of what they are compared with."""

ABLATIONS: Mapping[type[Router], type[Router]] = {
    ByGain: RouteT2I,
    SingleMetric: ByGain,
    NoSelection: RouteT2I,
    SingleGate: RouteT2I,
}
"""Each with what it is compared with: they differ in one thing."""

# --- networks of the baselines ----------------------------------------------------------------------------------

STEPS = Recipe.steps  # as many as ours
BATCH = 64
PATIENCE = 4  # of the epochs a quarter may pass without a better validation loss


class _Pooled(nn.Module):
    """A network on the standardised mean token state."""

    def __init__(self, states: np.ndarray, build: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(states.mean(0)))
        self.register_buffer("deviation", torch.from_numpy(states.std(0) + 1e-6))
        self.network = build(states.shape[1])

    def forward(self, states: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        own = mask[..., None]
        pooled = (states * own).sum(1) / own.sum(1).clamp_min(1)
        out: Tensor = self.network((pooled - self.mean) / self.deviation)
        return out


class _Attentive(nn.Module):
    """One transformer layer over token states and words, pooled by attention: what a classifier's own top would be. The
    layer is ours (`export.mixture.Together`).
    """

    def __init__(self, train: Prompts, outputs: int, masked: float) -> None:
        super().__init__()
        examples = train.examples
        shape = Shape(examples.states.shape[-1], outputs, sentence=SENTENCE)
        shape = knowing(shape, examples, train.vocabulary)
        self.inputs = Inputs(shape)
        self.inputs.start_from(examples.states[examples.mask], examples.ids[examples.mask])
        self.together = Together(shape, outputs, masked)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, states: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        own = Own(mask)
        read = self.inputs(own.packed(states), own.packed(ids))
        return own.summed(self.together(*read, own)) + self.bias


def _descend(
    network: nn.Module,
    train: Prompts,
    validation: Prompts,
    seed: int,
    setting: Mapping[str, float],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    labels: Callable[[Prompts], Floats],
) -> None:
    """AdamW, keeping the epoch with the best validation loss and, where the rate stays, stopping early.

    ``loss_of(outputs, labels)`` is of some prompts, whose labels are rows of what ``labels`` makes of all.
    """
    known, held_out = (torch.from_numpy(labels(part)).float() for part in (train, validation))
    draw = torch.Generator().manual_seed(seed)
    rate, decay = setting["learning_rate"], setting["weight_decay"]
    optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=decay, fused=True)
    best, kept, waited = float("inf"), network.state_dict(), 0
    epochs = Recipe(steps=STEPS).epochs(len(train))
    falling = None
    if setting["falling"]:
        total = epochs * -(-len(train) // BATCH)
        falling = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=total, pct_start=0.1)
    held = validation.examples
    for _ in range(epochs):
        network.train()
        for rows in torch.randperm(len(train), generator=draw).split(BATCH):
            batch = train.examples.rows(rows)
            loss = loss_of(network(batch.states, batch.mask, batch.ids), known[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if falling is not None:
                falling.step()
        network.eval()
        with torch.inference_mode():
            now = float(loss_of(network(held.states, held.mask, held.ids), held_out))
        if now < best:
            best, waited = now, 0
            kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        else:
            waited += 1
            if falling is None and waited * PATIENCE >= epochs:
                break
    network.load_state_dict(kept)
    network.eval()


def _scorer(network: nn.Module, read: Callable[[Tensor], Tensor]) -> Scorer:
    def score(prompts: Prompts) -> Floats:
        with torch.inference_mode():
            examples = prompts.examples
            return read(network(examples.states, examples.mask, examples.ids)).double().numpy()

    return score


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits[:, 0], labels)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
