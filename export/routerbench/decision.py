"""What the bundle's own decisions are worth on prompts that nothing was chosen on.

- *Calibration*: the share of prompts that alpha really sends to the cloud, for every wanted routing rate. While alpha
  is below 1/2 the wanted rate should lie within the interval of the realised one; beyond, the realised one stays below.
- *Reliability*: is a predicted PRS realised, on the mean, by the prompts that got it?
- *Explanations*: the token that a decision names first (the largest pull on PRS) is deleted, the prompt is encoded
  again without it, and PRS moves. It should move much further than without any other token.
- *Domain*: how far a prompt lies from the training prompts, and whether decisions are worse out there.

Intervals are 95 % bootstraps over scenes, see `export.routerbench.measure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.calibration import Calibration
from edge_agent.diffusion.sessions import Runtime
from edge_agent.diffusion.text_encoder import TextEncoder
from edge_agent.predictor import Prediction, Predictor
from edge_agent.recent import Recent
from edge_agent.superiority import ALPHA_BOUND, largest_alpha, realised_rate, relative_superiority
from edge_agent.tokens import Tokenizer, Tokens
from export.bootstrap import Estimate, Floats, estimate, interval, resampled
from export.calibrate import familiar
from export.evaluate import spearman
from export.outcomes import Outcomes
from export.routerbench.bundled import calibrated
from export.routerbench.measure import RATES, RESAMPLES
from export.states import mean, of_prompts

EXPLAINED = 800  # test prompts whose tokens are deleted, one after the other
BINS = 8  # of predicted PRS, with equally many prompts
STREAM, EARLY = 1000, 100
SEED = 0


@dataclass(frozen=True)
class Rate:
    """What became of one wanted routing rate on one split."""

    wanted: float
    alpha: float
    realised: Estimate

    @property
    def bounded(self) -> bool:
        """Whether alpha stopped at 1/2."""
        return self.alpha >= ALPHA_BOUND

    @property
    def kept(self) -> bool:
        """Whether the calibration's promise holds for all that these prompts can say."""
        return self.realised.low <= self.wanted and (self.bounded or self.wanted <= self.realised.high)


@dataclass(frozen=True)
class Bin:
    """Prompts of about the same predicted PRS."""

    predicted: float
    realised: Estimate


@dataclass(frozen=True)
class Explanations:
    """How far PRS moves, mean over prompts, when one token is deleted."""

    prompts: int
    named: Estimate
    others: Estimate
    """Any other token, in expectation."""
    ratio: Estimate
    """``named`` over ``others``."""
    over_any: Estimate
    """``named`` over any token in expectation, the named one among them."""
    measured: Estimate
    """The same ratio for the token whose deletion moves PRS most, which is the one `RouteRequest.explain` names.
    A maximum: no name can exceed it."""


@dataclass(frozen=True)
class Domain:
    """How foreign the prompts of one split are."""

    with_unknown: float
    """Share of prompts with a token that fewer than FAMILIAR training prompts have."""
    far: float
    """Share of prompts further from the nearest training prompt than 95 % of the calibration prompts are."""
    correlation: Estimate
    """Rank correlation of predicted with realised PRS, over the split's prompts."""


@dataclass(frozen=True)
class Followed:
    """Share of prompts in the cloud when half of them should go there, over STREAM prompts drawn of one split."""

    fixed: float
    """By the calibration's alpha."""
    early: float
    """By one that follows them, of the first EARLY."""
    later: float
    """Of those after them."""


@dataclass(frozen=True)
class Decisions:
    """All of it; splits by name."""

    rates: Mapping[str, Sequence[Rate]]
    followed: Mapping[str, Followed]
    reachable: Mapping[str, float]
    """Largest share that can go to the cloud, at alpha = 1/2; of `calibration` as the bundle promises it."""
    bins: Sequence[Bin]
    slope: Estimate
    """Of realised over predicted PRS, least squares; 1 would be reliable."""
    offset: Estimate
    """Mean realised less mean predicted PRS; 0 would be reliable."""
    edge_wins: float
    """Share of the test prompts with a realised PRS above 1/2: the edge's images are the better ones."""
    kept_back: float
    """Share of the test prompts with a predicted one above 1/2, which no routing rate sends to the cloud."""
    explanations: Explanations
    domains: Mapping[str, Domain]


class Decider:
    """The bundle's line from a prompt to its PRS."""

    def __init__(self, bundle: Bundle, calibration: Calibration) -> None:
        assert bundle.predictor is not None
        self.calibration = calibration
        self.tokenizer = Tokenizer.open(bundle)
        self._encoder = TextEncoder(bundle, Runtime(threads=1))
        self._predictor = Predictor.load(bundle.predictor, bundle.manifest.text_hidden)

    def decide(self, tokens: Tokens) -> tuple[float, Prediction, NDArray[np.float32]]:
        """PRS, the prediction it comes from, and the mean state [d] of the prompt's own tokens."""
        states = self._encoder.encode(tokens).tokens
        prediction = self._predictor.predict(states, tokens.own, tokens.ids)
        return self.prs(prediction.edge, prediction.cloud), prediction, mean(states[0][tokens.own])

    def prs(self, edge: Sequence[float], cloud: Sequence[float]) -> float:
        """Of qualities [M]."""
        return float(relative_superiority(edge, cloud, self.calibration.scale, self.calibration.weights))

    def pull_on_prs(self, prediction: Prediction) -> Floats:
        """[T]: what PRS would be more without each token's pull, all else equal: what a decision names tokens by."""
        qualities = np.array((prediction.edge, prediction.cloud))
        ours, theirs = np.log(qualities / (1 - qualities))
        level = (ours + theirs) / 2
        without = theirs - ours - np.array(prediction.pull)  # [T, M]
        edge, cloud = (1 / (1 + np.exp(-(level + sign * without / 2))) for sign in (-1, 1))
        without_each = relative_superiority(edge, cloud, self.calibration.scale, self.calibration.weights)
        return without_each - self.prs(prediction.edge, prediction.cloud)


def decisions(
    bundle: Bundle, outcomes: Outcomes, scenes: Mapping[str, NDArray[np.int64]], cache: Path
) -> Decisions | None:
    """Measure them; None where the bundle has no predictor or no calibration for these labels' models and judge, or
    they hold no calibration prompts.

    ``scenes`` numbers what each prompt says, split by split; its keys are the splits that are looked at. The training
    prompts' token states are read from the folder ``cache``, or made and kept there.
    """
    calibration = calibrated(bundle, outcomes)
    if calibration is None or "calibration" not in scenes:
        return None
    decider = Decider(bundle, calibration)
    parts = {split: outcomes.split(split) for split in scenes}
    tokens = {
        split: [decider.tokenizer.encode(text) for text in part.prompts] for split, part in parts.items()
    }
    measured = [split for split in scenes if split != "train"]
    made = {split: [decider.decide(one) for one in tokens[split]] for split in measured}
    explanations = _explanations(decider, tokens["test"][:EXPLAINED], scenes["test"][:EXPLAINED])
    predicted = {split: np.array([prs for prs, _, _ in rows]) for split, rows in made.items()}
    realised = {
        split: np.array(
            [decider.prs(*pair) for pair in zip(parts[split].edge, parts[split].cloud, strict=True)]
        )
        for split in measured
    }
    middles = {split: np.stack([middle for _, _, middle in rows]) for split, rows in made.items()}
    known = of_prompts(cache, bundle, parts["train"].prompts).means()
    border = np.quantile(_nearest(known, middles["calibration"]), 0.95)
    met = {*familiar(tokens["train"])}
    bins, slope, offset = _reliability(predicted["test"], realised["test"], scenes["test"])
    return Decisions(
        rates={
            split: _rates(calibration, predicted, scenes, split)
            for split in measured
            if split != "calibration"
        },
        followed={split: _followed(calibration, predicted[split]) for split in measured},
        reachable={split: realised_rate(predicted[split], ALPHA_BOUND) for split in measured},
        bins=bins,
        slope=slope,
        offset=offset,
        edge_wins=float((realised["test"] > ALPHA_BOUND).mean()),
        kept_back=float((predicted["test"] >= ALPHA_BOUND).mean()),
        explanations=explanations,
        domains={
            split: Domain(
                with_unknown=float(
                    np.mean([not met.issuperset(one.ids[0][one.own]) for one in tokens[split]])
                ),
                far=float(np.mean(_nearest(known, middles[split]) > border)),
                correlation=_correlation(predicted[split], realised[split], scenes[split]),
            )
            for split in measured
        },
    )


def _rates(
    calibration: Calibration,
    predicted: Mapping[str, Floats],
    scenes: Mapping[str, NDArray[np.int64]],
    split: str,
) -> list[Rate]:
    """Both the calibration prompts and the split's are samples: both are drawn again for the interval."""
    here = [predicted[split][rows] for rows in resampled(scenes[split], RESAMPLES, SEED)]
    there = [predicted["calibration"][rows] for rows in resampled(scenes["calibration"], RESAMPLES, SEED + 1)]
    rates = []
    for wanted in RATES:
        alphas = [largest_alpha(scores, wanted) for scores in there]
        alphas[0] = calibration.alpha(wanted)
        realised = [realised_rate(scores, alpha) for scores, alpha in zip(here, alphas, strict=True)]
        rates.append(Rate(wanted, alphas[0], estimate(np.array(realised))))
    return rates


def _followed(calibration: Calibration, predicted: Floats) -> Followed:
    stream = np.random.default_rng(SEED).choice(predicted, STREAM)
    recent, routed = Recent(calibration, 0.5, follow=True), []
    for prs in stream.tolist():
        routed.append(prs < recent.alpha)
        recent.add(prs)
    fixed = realised_rate(stream, calibration.alpha(0.5))
    return Followed(fixed, float(np.mean(routed[:EARLY])), float(np.mean(routed[EARLY:])))


def _reliability(
    predicted: Floats, realised: Floats, scenes: NDArray[np.int64]
) -> tuple[list[Bin], Estimate, Estimate]:
    samples = list(resampled(scenes, RESAMPLES, SEED))
    edges = np.quantile(predicted, np.linspace(0, 1, BINS + 1)[1:-1])
    number = np.searchsorted(edges, predicted, side="right")
    bins = []
    for one in range(BINS):
        inside = [rows[number[rows] == one] for rows in samples]
        means = np.array([realised[rows].mean() for rows in inside if len(rows)])
        if len(means):
            bins.append(Bin(float(predicted[number == one].mean()), estimate(means)))
    slopes = [
        float(np.cov(predicted[rows], realised[rows])[0, 1] / max(float(predicted[rows].var(ddof=1)), 1e-12))
        for rows in samples
    ]
    offsets = [float((realised[rows] - predicted[rows]).mean()) for rows in samples]
    return bins, estimate(np.array(slopes)), estimate(np.array(offsets))


def _explanations(decider: Decider, prompts: Sequence[Tokens], scenes: NDArray[np.int64]) -> Explanations:
    named, others, most, kept = [], [], [], []
    for row, tokens in enumerate(prompts):
        own = tokens.own
        if len(own) < 2:
            continue  # nothing to name among
        prs, prediction, _ = decider.decide(tokens)
        moved = np.array([abs(decider.decide(tokens.without(position))[0] - prs) for position in own])
        first = int(np.argmax(np.abs(decider.pull_on_prs(prediction))))
        named.append(moved[first])
        others.append((np.delete(moved, first).mean(), moved.mean()))
        most.append((moved.max(), np.delete(moved, moved.argmax()).mean()))
        kept.append(row)
    columns = np.column_stack([named, others, most])  # [prompts, 5]
    means = np.array([columns[rows].mean(axis=0) for rows in resampled(scenes[kept], RESAMPLES, SEED)])
    return Explanations(
        prompts=len(kept),
        named=estimate(means[:, 0]),
        others=estimate(means[:, 1]),
        ratio=estimate(means[:, 0] / means[:, 1]),
        over_any=estimate(means[:, 0] / means[:, 2]),
        measured=estimate(means[:, 3] / means[:, 4]),
    )


def _correlation(predicted: Floats, realised: Floats, scenes: NDArray[np.int64]) -> Estimate:
    return interval(lambda rows: spearman(predicted[rows], realised[rows]), scenes, RESAMPLES, SEED)


def _nearest(known: NDArray[np.float32], rows: NDArray[np.float32]) -> Floats:
    """Distance [N] of each row to the nearest of ``known``, in deviations of its dimensions."""
    mean, deviation = known.mean(axis=0), known.std(axis=0) + 1e-6
    one, other = ((part - mean) / deviation for part in (known, rows))
    squares = (other**2).sum(1)[:, None] + (one**2).sum(1) - 2 * other @ one.T
    return np.sqrt(np.maximum(squares.min(axis=1), 0)).astype(np.float64)
