"""Train the predictor on measured qualities: labels and a bundle in, `predictor.safetensors` out.

    edge-export train LABELS BUNDLE OUT [--steps N] [--ablate single-metric|no-selection|single-gate]

The bundle's tokenizer and text encoder make the token states, as they do in serving; the states are cached beside
the weights, also when the work ends before its time, and so is each mixture that is trained. Training takes some
minutes on one core with short prompts, however many there are; encoding them comes before it, and takes longer with
any but small text encoders.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_agent.bundle import Bundle
from edge_agent.settings import MAX_THREADS
from edge_agent.tokens import Tokenizer
from export.arguments import MAX_WIDTH, at_least
from export.errors import ExportError
from export.mixture import SENTENCE, WORDS, Ensemble, Mixture, Shape, Together
from export.outcomes import CLOUD_DIGEST, EDGE_DIGEST, JUDGE_DIGEST, Outcomes
from export.output import replacing
from export.states import TokenStates, of_prompts, of_shorter_prompts
from export.terminal import console, progress

WEIGHTS = "predictor.safetensors"
LOSS_WEIGHTS = ("deletion_weight", "gain_weight", "rank_weight")  # of `Recipe`, that the command takes
MIXTURES = 3
"""Of a predictor of one's own. Each learns other noise from few labels, and their mean less (docs/routers-tried.md). A
decision takes 0.3 to 1.5 ms longer than with one, after a text encoder 768 or 1,024 wide, which takes far more."""


@dataclass(frozen=True)
class Recipe:
    """How a mixture is trained. The paper's own (Adam, 2e-5, 10 epochs) is for 58 M weights; here are 212,000.

    Both rates, dropout, what is masked and the weights of gap, gain and rank are the best of 24 settings on validation
    and calibration prompts (docs/tuning.csv, made by `export.routerbench.tune`).
    """

    steps: int = 1750
    """About so many, in whole epochs: 5 of 22,400 prompts. The weights of the epoch with the best validation loss are
    kept. Every network of the benchmark may train as long, and all of them have ten minutes."""
    batch: int = 64
    """Prompts a step."""
    learning_rate: float = 1e-2
    """Peak, after a warm-up over a tenth of the steps; it then falls to zero along a cosine."""
    together_rate: float = 2e-3
    """The same for the layer that reads tokens together."""
    weight_decay: float = 1e-2
    dropout: float = 0.5
    """Share of a token's dimensions hidden from the experts: there are more of them than a few per prompt allow."""
    gap_weight: float = 3.0
    """Weight of the paired gap's error beside that of the two qualities."""
    gain_weight: float = 10.0
    """Weight of the gap's mean over metrics, which routes in the end."""
    rank_weight: float = 10.0
    """Weight of the pairs of prompts that predicted gains put in the wrong order: which of two goes first is all that a
    routing rate asks."""
    sharpness: float = 3.0
    """How soon a pair counts as put in order: by a third of the gain's standard deviation."""
    masked: float = 0.1
    """Share of the tokens whose state the layer that reads them together does not see in training."""
    deletions: float = 0.125
    """Share of the prompts of a step, above 0, that are also read without one of their tokens."""
    deletion_weight: float = 20.0
    """Weight of what a token's pull has to be: what the gap loses when the token is deleted and the rest encoded again.
    With earlier labels and 20 the tokens that a decision of one mixture named moved PRS of validation prompts 3.0 times
    as much as others, with 6 2.4 times, with 60 2.8 times; gains were predicted about as well."""
    seeds: int = 1
    """Mixtures, averaged: what each has learnt from the noise of its labels is not what the others have. A decision
    waits for all of them, and training too."""

    def epochs(self, prompts: int) -> int:
        """How many there are of so many training prompts."""
        return max(1, round(self.steps / -(-prompts // self.batch)))


@dataclass(frozen=True)
class Shorter:
    """Prompts without one of their tokens: states [N, n, d], mask and ids [N, n], and which of their own it is, [N]."""

    states: Tensor
    mask: Tensor
    ids: Tensor
    deleted: Tensor

    def rows(self, chosen: Tensor) -> Shorter:
        """Some of the prompts, by index."""
        parts = (self.states, self.mask, self.ids, self.deleted)
        return Shorter(*(part.index_select(0, chosen) for part in parts))


@dataclass(frozen=True)
class Examples:
    """Prompts with what the mixture reads and should say: states [N, n, d], mask and ids [N, n], qualities [N, M]."""

    states: Tensor
    mask: Tensor
    ids: Tensor
    edge: Tensor
    cloud: Tensor
    shorter: Shorter | None = None
    """The same prompts less one token, where pulls are to be learnt of that."""

    @classmethod
    def of(cls, states: TokenStates, edge: NDArray[np.float32], cloud: NDArray[np.float32]) -> Examples:
        """From the prompts' states and their mean qualities."""
        return cls(*map(torch.from_numpy, (*states.padded(), edge, cloud)))

    def measuring(self, shape: Shape) -> Examples:
        """The same for a mixture of this shape: with one metric (an ablation) the mean over all is the only one."""
        if shape.metrics > 1:
            return self
        edge, cloud = (part.mean(1, keepdim=True) for part in (self.edge, self.cloud))
        return replace(self, edge=edge, cloud=cloud)

    def beside(self, states: TokenStates, deleted: NDArray[np.int64]) -> Examples:
        """The same with the states of the prompts less one token each."""
        padded = states.padded(self.mask.shape[1])
        return replace(self, shorter=Shorter(*map(torch.from_numpy, (*padded, deleted))))

    def __len__(self) -> int:
        return len(self.mask)

    def rows(self, chosen: Tensor) -> Examples:
        """Some of the prompts, by index; the shorter ones are left behind."""
        parts = (self.states, self.mask, self.ids, self.edge, self.cloud)
        return Examples(*(part.index_select(0, chosen) for part in parts))


@dataclass(frozen=True)
class Epoch:
    """Losses are in units of the training variance: predicting the means costs 1 + gap_weight + gain_weight on the
    training prompts, and on others what `Loss.of_means` says, as they vary otherwise and more images of each are less
    noisy. Only the loss of training contains the terms of deleted tokens and of pairs.
    """

    number: int
    training_loss: float
    validation_loss: float
    best: bool


class Loss:
    """Squared error of both qualities, of their gap and of the gap's mean over metrics, in units of their variance in
    training; and of the deleted tokens' pulls, as gaps. In training also a logistic loss on the order of each two
    prompts, by how much their gains differ.
    """

    def __init__(self, train: Examples, recipe: Recipe) -> None:
        # A metric that never varies must not divide by zero; nothing can be learnt from it either.
        self.edge = train.edge.var(0).clamp_min(1e-8)
        self.cloud = train.cloud.var(0).clamp_min(1e-8)
        self.gap = (train.cloud - train.edge).var(0).clamp_min(1e-8)
        self.gain = (train.cloud - train.edge).mean(1).var().clamp_min(1e-8)
        self.means = train.edge.mean(0), train.cloud.mean(0)
        # How much quality a logit is, at the mean of both models.
        middle = (self.means[0] + self.means[1]) / 2
        self.steepness = middle * (1 - middle)
        self.recipe = recipe

    def __call__(
        self, mixture: Mixture | Ensemble, batch: Examples, shorter: Shorter | None = None
    ) -> Tensor:
        """Mean over the batch's prompts and metrics. `shorter` are the first of them less a token each."""
        read = (batch.states, batch.mask, batch.ids)
        if shorter is not None:
            less = (shorter.states, shorter.mask, shorter.ids)
            read = tuple(torch.cat(pair) for pair in zip(read, less, strict=True))
        edge, cloud, pull = mixture(*read)
        count = len(batch)
        low, high = edge[:count], cloud[:count]
        loss = self._error(low, high, batch)
        if mixture.training and self.recipe.rank_weight:
            loss = loss + self.recipe.rank_weight * self._disorder(high - low, batch.cloud - batch.edge)
        if shorter is not None:
            few = torch.arange(len(shorter.deleted))
            gaps = pull.sum(1)  # in logits, less the bias
            error = (gaps[few] - gaps[count:] - pull[few, shorter.deleted]) * self.steepness
            loss = loss + self.recipe.deletion_weight * (error**2 / self.gap).mean()
        return loss

    def of_means(self, batch: Examples) -> float:
        """What it costs to predict the means of the training prompts for each of the batch's. Who reads prompts in vain
        does no better.
        """
        return float(self._error(*self.means, batch))

    def _error(self, low: Tensor, high: Tensor, batch: Examples) -> Tensor:
        """Of the qualities of edge and cloud, [N, M] or [M] each."""
        level = (low - batch.edge) ** 2 / self.edge + (high - batch.cloud) ** 2 / self.cloud
        missed = (high - low) - (batch.cloud - batch.edge)
        loss: Tensor = (level / 2 + self.recipe.gap_weight * missed**2 / self.gap).mean()
        return loss + self.recipe.gain_weight * (missed.mean(1) ** 2 / self.gain).mean()

    def _disorder(self, predicted: Tensor, measured: Tensor) -> Tensor:
        """Of gaps [N, M]: mean over all pairs of prompts."""
        ahead, truly = (
            (gain[:, None] - gain) / self.gain.sqrt() for gain in (predicted.mean(1), measured.mean(1))
        )
        margin = self.recipe.sharpness * ahead * truly.sign()
        return (torch.nn.functional.softplus(-margin) * truly.abs()).mean()


def fit(
    mixture: Mixture, train: Examples, validation: Examples, recipe: Recipe, seed: int
) -> Iterator[Epoch]:
    """Train `mixture` in place, an epoch a step; it holds the weights of the best epoch once this has ended.

    ValueError where the recipe has a weight for deleted tokens, and `train` no prompts without them.
    """
    if recipe.deletion_weight > 0 and train.shorter is None:
        raise ValueError("a deletion_weight above 0 needs the prompts less one token: see Examples.beside")
    draw = torch.Generator().manual_seed(seed)
    mixture.start_from(train.states[train.mask], train.ids[train.mask], train.edge, train.cloud)
    loss_of = Loss(train, recipe)
    epochs = recipe.epochs(len(train))
    together = [] if mixture.together is None else list(mixture.together.parameters())
    experts = [weights for name, weights in mixture.named_parameters() if not name.startswith("together.")]
    rates = [(recipe.learning_rate, experts)]
    if together:
        rates.append((recipe.together_rate, together))
    optimiser = torch.optim.AdamW(
        [{"params": weights} for _, weights in rates], weight_decay=recipe.weight_decay, fused=True
    )
    steps = epochs * -(-len(train) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        [rate for rate, _ in rates],
        total_steps=steps,
        pct_start=0.1 if steps != 10 else 0.2,  # torch divides by one less than these steps
    )
    best, kept, best_epoch = float("inf"), mixture.state_dict(), 0
    for number in range(1, epochs + 1):
        mixture.train()
        total = 0.0
        for chosen in torch.randperm(len(train), generator=draw).split(recipe.batch):
            shorter = None
            if train.shorter is not None and recipe.deletion_weight > 0:
                shorter = train.shorter.rows(chosen[: math.ceil(recipe.deletions * len(chosen))])
            loss = loss_of(mixture, train.rows(chosen), shorter)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        mixture.eval()
        with torch.no_grad():
            now = float(loss_of(mixture, validation))
        if now < best:
            best, best_epoch = now, number
            kept = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
        yield Epoch(number, total / len(train), now, best_epoch == number)
    mixture.load_state_dict(kept)


@dataclass(frozen=True)
class Trained:
    """The mixture of one seed and its course."""

    mixture: Mixture
    seed: int
    epochs: tuple[Epoch, ...]

    @property
    def validation_loss(self) -> float:
        """Of the epoch whose weights were kept."""
        return min(epoch.validation_loss for epoch in self.epochs)

    @property
    def record(self) -> dict[str, Any]:
        """What files of weights say of it."""
        return {"seed": self.seed, "epochs": [asdict(epoch) for epoch in self.epochs]}


def train(
    train: Examples, validation: Examples, shape: Shape, recipe: Recipe, seed: int
) -> Iterator[Epoch | Trained]:
    """Train one mixture: yields the epochs as they pass, and at last what came of them."""
    torch.manual_seed(seed)  # initial weights and dropout
    mixture = Mixture(shape, dropout=recipe.dropout, masked=recipe.masked)
    epochs = []
    for epoch in fit(mixture, train, validation, recipe, seed):
        if not math.isfinite(epoch.validation_loss):
            raise ExportError(
                f"the mixture of seed {seed} diverges: in epoch {epoch.number} its validation loss is no number; "
                "lower what weighs its loss, or how fast it learns"
            )
        epochs.append(epoch)
        yield epoch
    yield Trained(mixture, seed, tuple(epochs))


def knowing(shape: Shape, train: Examples, vocabulary: int) -> Shape:
    """The same for the words of these prompts; ``vocabulary`` is one more than the largest id that there can be."""
    return replace(shape, vocabulary=vocabulary, met=len(torch.unique(train.ids[train.mask])))


ABLATIONS = {
    "single-metric": lambda shape: replace(shape, metrics=1),
    "no-selection": lambda shape: replace(shape, selection=False),
    "single-gate": lambda shape: replace(shape, dual_gate=False),
}


def _parser(recipe: Recipe) -> argparse.ArgumentParser:
    """Whose defaults are those of ``recipe``."""
    parser = argparse.ArgumentParser("edge-export train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("labels", type=Path, help="labels.parquet of `edge-export label`")
    parser.add_argument("bundle", type=Path, help="bundle whose text encoder the predictor reads")
    parser.add_argument("out", type=Path, help=f"folder for {WEIGHTS} and the cached token states")
    parser.add_argument(
        "--seeds",
        type=at_least(1),
        default=recipe.seeds,
        help="mixtures to train and average (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=recipe.steps,
        help="training steps of each mixture, rounded to whole epochs (default: %(default)s)",
    )
    parser.add_argument(
        "--kept",
        type=at_least(1),
        default=Shape.kept,
        help="tokens an expert keeps, the paper's K (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=at_least(1, MAX_WIDTH),
        default=Shape.rank,
        help="rank of a gate, the paper's l (default: %(default)s)",
    )
    parser.add_argument(
        "--hidden",
        type=at_least(1, MAX_WIDTH),
        default=Shape.hidden,
        help="width behind the gates, the paper's h (default: %(default)s)",
    )
    parser.add_argument(
        "--ablate",
        choices=sorted(ABLATIONS),
        action="append",
        default=[],
        help="leave this part out; may repeat",
    )
    parser.add_argument(
        "--words",
        type=at_least(0, MAX_WIDTH),
        default=WORDS,
        help="length of each token's own embedding beside its state, 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--sentence",
        type=at_least(0, MAX_WIDTH),
        default=SENTENCE,
        help="width of the layer that reads tokens together, 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--deletion-weight",
        type=float,
        default=recipe.deletion_weight,
        metavar="WEIGHT",
        help="how strictly a token's pull must equal what deleting it costs, 0 not at all (default: %(default)s)",
    )
    parser.add_argument(
        "--gain-weight",
        type=float,
        default=recipe.gain_weight,
        metavar="WEIGHT",
        help="how much the mean of the gap over metrics counts beside each metric's (default: %(default)s)",
    )
    parser.add_argument(
        "--rank-weight",
        type=float,
        default=recipe.rank_weight,
        metavar="WEIGHT",
        help="how much the order of any two prompts' gains counts, 0 not at all (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=at_least(1, MAX_THREADS), default=1, help="CPU threads (default: %(default)s)"
    )
    return parser


def _runs(
    folder: Path, examples: Sequence[Examples], shape: Shape, recipe: Recipe, facts: Mapping[str, str]
) -> list[Trained]:
    """A mixture a seed, with a bar. Each is kept in ``folder``, and not trained again on the same ``facts`` by the same
    recipe.
    """
    learning, validating = examples
    one = replace(recipe, seeds=1)
    made = [{"recipe": asdict(one), **facts, "seed": seed} for seed in range(recipe.seeds)]
    files = [folder / f"mixture-{seed}.safetensors" for seed in range(recipe.seeds)]
    runs = [_kept(file, shape, how) for file, how in zip(files, made, strict=True)]
    missing = [seed for seed, run in enumerate(runs) if run is None]
    if len(missing) < len(runs):
        kept = len(runs) - len(missing)
        console.print(
            f"{kept} of {len(runs)} mixtures are in {folder} already, of these labels and by this recipe; delete their "
            "files to train them anew"
        )
    with progress() as bars:
        bar = bars.add_task("epochs of training", total=len(missing) * recipe.epochs(len(learning)))
        for seed in missing:
            for event in train(learning, validating, shape, one, seed):
                if isinstance(event, Trained):
                    runs[seed] = event
                    with replacing(files[seed]) as partial:
                        Ensemble([event.mixture]).save(partial, made[seed] | event.record)
                else:
                    note = f"loss {event.training_loss:.3f}, validation {event.validation_loss:.3f}"
                    bars.update(bar, advance=1, note=note)
    return [run for run in runs if run is not None]


def _kept(file: Path, shape: Shape, made: Mapping[str, Any]) -> Trained | None:
    """The mixture in ``file``; None where there is none of this shape that was ``made`` so, or the file is damaged."""
    try:
        ensemble, record = Ensemble.load(file)
    except ExportError:
        return None
    # Earlier versions did not note the judge; the labels' hash stands for it.
    noted = {name: record.get(name, made[name] if name == JUDGE_DIGEST else None) for name in made}
    if ensemble.shape != shape or noted != made:
        return None
    return Trained(ensemble.members[0], record["seed"], tuple(Epoch(**epoch) for epoch in record["epochs"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    recipe = Recipe(seeds=MIXTURES)
    parser = _parser(recipe)
    options = parser.parse_args(argv)
    for name in LOSS_WEIGHTS:
        if not 0 <= getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if options.sentence % Together.HEADS:
        parser.error(f"--sentence must be a multiple of {Together.HEADS}")

    torch.set_num_threads(options.threads)
    recipe = replace(recipe, **{name: getattr(options, name) for name in ("seeds", "steps", *LOSS_WEIGHTS)})
    outcomes, bundle = Outcomes.read(options.labels), Bundle.open(options.bundle)
    outcomes.must_be_of(bundle)
    learning, validating = outcomes.split("train"), outcomes.split("validation")
    if options.out.exists() and not options.out.is_dir():
        raise ExportError(f"{options.out} is no folder; name one")
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    shape = Shape(
        bundle.manifest.text_hidden,
        outcomes.edge.shape[1],
        options.kept,
        options.rank,
        options.hidden,
        words=options.words,
        sentence=options.sentence,
    )
    for name in options.ablate:
        shape = ABLATIONS[name](shape)

    again = ", these again less a token each" if recipe.deletion_weight else ""
    readings = len(learning) * (2 if again else 1) + len(validating)
    console.print(
        f"the text encoder reads {readings:,} prompts: {len(learning):,} to learn from{again}, and {len(validating):,} "
        f"to validate on; not again what {options.out} holds of them"
    )
    examples = [
        Examples.of(of_prompts(options.out, bundle, part.prompts), part.edge, part.cloud).measuring(shape)
        for part in (learning, validating)
    ]
    if recipe.deletion_weight:
        examples[0] = examples[0].beside(*of_shorter_prompts(options.out, bundle, learning.prompts))
    if options.words or options.sentence:
        shape = knowing(shape, examples[0], Tokenizer.open(bundle).vocabulary)
    facts = {
        "labels_sha256": hashlib.sha256(options.labels.read_bytes()).hexdigest(),
        EDGE_DIGEST: bundle.model_digest,
        **{name: outcomes.facts.get(name, "") for name in (CLOUD_DIGEST, JUDGE_DIGEST)},
        "torch": torch.__version__,
    }
    runs = _runs(options.out, examples, shape, recipe, facts)
    ensemble = Ensemble([run.mixture for run in runs]).eval()
    loss_of = Loss(examples[0], recipe)
    with torch.no_grad():
        loss = float(loss_of(ensemble, examples[1]))
    means = loss_of.of_means(examples[1])
    record = {
        "recipe": asdict(recipe),
        "validation_loss": loss,
        "validation_loss_of_means": means,
        "members": [run.record for run in runs],
        "prompts": {"train": len(learning), "validation": len(validating)},
        **facts,
        "threads": options.threads,
        "seconds": round(time.monotonic() - started, 1),
    }
    with replacing(options.out / WEIGHTS) as partial:
        ensemble.save(partial, record)
    count = sum(weights.numel() for weights in ensemble.parameters())
    mixtures = "1 mixture"
    if len(runs) > 1:
        alone = ", ".join(f"{run.validation_loss:.3f}" for run in runs)
        mixtures = f"{len(runs)} mixtures, whose validation losses are {alone}"
    console.print(
        f"{options.out / WEIGHTS}: {count:,} weights in {mixtures}; validation loss {loss:.3f}, where the means of "
        f"the training prompts cost {means:.3f}; {record['seconds']} s"
    )
    if not loss < means:
        console.print(
            "the means predict the validation prompts as well as the predictor does, which may have learnt nothing "
            "that holds for other prompts: `calibrate` and `evaluate` tell whether it ranks them all the same. Where "
            "not, label more prompts, or more images of each (`edge-export label --draws 4`), and train again"
        )
    return 0
