"""What a router's scores are worth on prompts with measured outcomes, at every routing rate.

Gains are qualities won over edge only. Headroom = (gain - random) / (oracle - random), the oracle cross-fitted over
seeds, and not a number at rates at which few prompts leave open whether the oracle wins more than random; dP in the
paper's form, a mean over metrics of gain / |gap of the means| in percent, over the metrics whose mean gap on the
training prompts is no smaller than SMALL (a rule that does not look at test prompts), also as a share of what
cloud-only makes of it; PGR = gain / gain of cloud only; win gain = how much more often than at random the better
image of the two, by PRS, is the one that is served, in percent points. At one rate all routers serve as many images
of the cloud, so where its image is the better one of nearly every pair, only the few other pairs move win gain.

Prompts that say the same scene in other words share its outcome, so they are no independent draws: intervals are 95 %
bootstraps over *scenes*. A router's value is the mean over its seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.bootstrap import Estimate, Floats, estimate, resampled
from export.errors import ExportError
from export.evaluate import paired_gaps, routed, tells_headroom
from export.outcomes import Outcomes

RATES = tuple(round(0.1 * step, 1) for step in range(1, 10))
RESAMPLES = 400
DELTA_P = (40, 50, 60)
"""Percent of dP at which the paper counts the cloud calls that are saved."""

MOST = 0.9  # of the variance of gaps
SMALL = 0.2
"""Standard deviations: Cohen's small effect. A gain divided by the mean gap of a metric on which the models differ by
less is a number about that division: a few hundred test scenes cannot tell such a gap from zero."""


def counted_metrics(train: Outcomes) -> NDArray[np.bool_]:
    """[M]: the metrics that make dP, on which the two models differ by more than SMALL between training prompts."""
    gap = train.cloud.astype(np.float64) - train.edge
    return np.asarray(np.abs(gap.mean(axis=0)) > SMALL * gap.std(axis=0))


def directions(gaps: NDArray[np.float32]) -> int:
    """How many principal directions of ``gaps`` [N, M], each in units of its own deviation, have MOST of their
    variance.
    """
    moving = gaps[:, np.ptp(gaps, axis=0) > 0]
    if not moving.shape[1]:
        return 0
    variances = np.linalg.eigvalsh(np.atleast_2d(np.corrcoef(moving.T)))[::-1]
    return 1 + int(np.searchsorted(np.cumsum(variances), MOST * variances.sum()))


@dataclass(frozen=True)
class Sampled(Estimate):
    """An estimate with what it was made of."""

    samples: Floats
    """[R], of all test prompts and then of each resample. All routers have the same resamples."""

    @classmethod
    def of(cls, samples: Floats) -> Sampled:
        """From all R of them."""
        found = estimate(samples)
        return cls(found.value, found.low, found.high, samples)


@dataclass(frozen=True)
class Point:
    """A router at one routing rate. ``quality`` is the mean of the images that are served, ``over_cloud_only`` dP as a
    share of what cloud-only makes of it.
    """

    rate: float
    quality: Estimate
    headroom: Sampled
    delta_p: Sampled
    over_cloud_only: Estimate
    pooled_dp: Estimate
    pgr: Sampled
    win_gain: Estimate
    inspector_accuracy: Estimate | None


class Bench:
    """Test prompts and their bootstrap resamples, which every router is measured on alike."""

    def __init__(
        self,
        test: Outcomes,
        superiority: Floats,
        counted: NDArray[np.bool_],
        scenes: NDArray[np.int64],
    ) -> None:
        """``superiority`` [N, S] is the PRS of every pair of images that counts, ``counted`` [M] see `counted_metrics`,
        ``scenes`` [N] numbers what each prompt says. Raises ExportError where there is nothing to choose between.
        """
        count = superiority.shape[1]  # the prompts of a part may all have more
        self.paired = paired_gaps(test)[:, :count]  # [N, S, M]
        self.gaps = self.paired.mean(axis=1)  # [N, M]
        # [N, S], 1 where the edge's image is the better one.
        self.better = np.sign(superiority - 0.5)
        self.counted = counted
        self.scenes = len(np.unique(scenes))
        self.verdicts: tuple[Floats, Floats] | None = None
        if test.edge_inspected is not None and test.cloud_inspected is not None:
            self.verdicts = (
                test.edge_inspected[:, :count].astype(np.float64),
                test.cloud_inspected[:, :count].astype(np.float64),
            )
        self.resamples = list(resampled(scenes, RESAMPLES))
        self.full = np.array([self.gaps[rows].mean(axis=0) for rows in self.resamples])  # [R, M]
        edge, cloud = (one.astype(np.float64).mean(axis=1) for one in (test.edge, test.cloud))
        self.edge = np.array([edge[rows].mean() for rows in self.resamples])  # [R]
        self.cloud = np.array([cloud[rows].mean() for rows in self.resamples])  # [R]
        self.oracle = {rate: self._oracle_shares(rate) for rate in RATES}
        self.oracle_gains = {rate: self._gains(shares) for rate, shares in self.oracle.items()}
        least = 1e-4 * np.abs(self.full).max()  # more than rounding makes of nothing
        above_random = {
            rate: made.mean(axis=1) - self._random(rate) for rate, made in self.oracle_gains.items()
        }
        if all((np.abs(won) <= least).all() for won in above_random.values()):
            raise ExportError("on these test prompts the oracle wins what random wins: label more prompts")
        self.told = {rate for rate, won in above_random.items() if tells_headroom(won, least)}

    def points(self, scores: Sequence[Floats]) -> list[Point]:
        """One a rate, of the scores [N] that a router's seeds gave."""
        return [self._point(rate, self._shares(scores, rate)) for rate in RATES]

    def oracle_points(self) -> list[Point]:
        """Of the cross-fitted oracle: it chooses by all seeds but one and is paid by that one."""
        return [self._point(rate, self.oracle[rate]) for rate in RATES]

    def cloud_only(self) -> Point:
        """Every prompt to the cloud, at a rate of 1; there is no headroom to capture."""
        return self._point(1.0, [np.ones((len(rows), 1)) for rows in self.resamples])

    def found_difference(
        self, ours: Sequence[Floats], theirs: Sequence[Floats] | None, rates: Sequence[float]
    ) -> Estimate | None:
        """Paired: how much more often the inspector finds in the served image what was asked for, a mean over
        ``rates``. Random routing, as it is expected to be, where nothing is said of ``theirs``.
        """
        if self.verdicts is None:
            return None
        apart = []
        for rate in rates:
            by_chance = [np.full((len(rows), 1), rate) for rows in self.resamples]
            other = by_chance if theirs is None else self._shares(theirs, rate)
            apart.append(self._found(self._shares(ours, rate)) - self._found(other))
        return estimate(np.mean(apart, axis=0))

    def _shares(self, scores: Sequence[Floats], rate: float) -> list[Floats]:
        """For each resample the share of each of its prompts that goes to the cloud, a mean over seeds: [n, 1]."""
        return [
            np.mean([routed(score[rows], rate) for score in scores], axis=0)[:, None]
            for rows in self.resamples
        ]

    def _oracle_shares(self, rate: float) -> list[Floats]:
        """For each resample what goes to the cloud when each seed in turn pays for the choice of the others: [n, S]."""
        quality = self.paired.mean(axis=2)
        others = quality.sum(axis=1, keepdims=True) - quality
        return [np.stack([routed(-turn, rate) for turn in others[rows].T], axis=1) for rows in self.resamples]

    def _gains(self, shares: Sequence[Floats]) -> Floats:
        """[R, M], of shares [n, S], or [n, 1] where all seeds share them."""
        made = []
        for share, rows in zip(shares, self.resamples, strict=True):
            if share.shape[1] == 1:
                made.append(share[:, 0] @ self.gaps[rows] / len(rows))
            else:
                made.append(np.einsum("ns,nsm->m", share, self.paired[rows]) / share.size)
        return np.array(made)

    def _headroom(self, rate: float, gains: Floats) -> Floats:
        if rate not in self.told:
            return np.full(len(gains), np.nan)
        random = self._random(rate)
        return np.asarray((gains.mean(axis=1) - random) / (self.oracle_gains[rate].mean(axis=1) - random))

    def _random(self, rate: float) -> Floats:
        """[R]: what random routing is expected to win."""
        return np.asarray(rate * self.full.mean(axis=1))

    def _found(self, shares: Sequence[Floats]) -> Floats:
        """[R]: how often the inspector finds in the served image what was asked for."""
        assert self.verdicts is not None
        edge, cloud = self.verdicts
        pairs = zip(shares, self.resamples, strict=True)
        return np.array([np.nanmean(share * cloud[rows] + (1 - share) * edge[rows]) for share, rows in pairs])

    def _point(self, rate: float, shares: Sequence[Floats]) -> Point:
        gains, full, counted = self._gains(shares), self.full, self.counted
        pairs = zip(shares, self.resamples, strict=True)
        wins = np.array([((rate - share) * self.better[rows]).mean() for share, rows in pairs])
        nothing = np.full(len(gains), np.nan)
        delta_p = over_cloud_only = nothing
        if counted.any():
            delta_p = (gains[:, counted] / np.abs(full[:, counted])).mean(axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):  # as many metrics may be worse as are better
                over_cloud_only = delta_p / np.sign(full[:, counted]).mean(axis=1)
        return Point(
            rate,
            estimate(self.edge + gains.mean(axis=1)),
            Sampled.of(self._headroom(rate, gains)),
            Sampled.of(100 * delta_p),
            estimate(over_cloud_only),
            estimate(100 * gains.sum(axis=1) / np.abs(full).sum(axis=1)),
            Sampled.of(gains.mean(axis=1) / full.mean(axis=1)),
            estimate(100 * wins),
            None if self.verdicts is None else estimate(self._found(shares)),
        )


def difference(ours: Sequence[Point], theirs: Sequence[Point], rates: Sequence[float]) -> Estimate:
    """Paired: how much more of the headroom ``ours`` captures than ``theirs``, a mean over ``rates``.

    Both are points of one `Bench`, whose resamples they share.
    """
    pairs = zip(ours, theirs, strict=True)
    apart = [one.headroom.samples - other.headroom.samples for one, other in pairs if one.rate in rates]
    return estimate(np.mean(apart, axis=0))


def apgr(points: Sequence[Point]) -> Estimate:
    """Area under PGR over the rate, from (0, 0) to (1, 1), by trapezia."""
    rates, curves = _curves(points)
    return estimate(np.trapezoid(curves, rates, axis=1))


def cpt(points: Sequence[Point], wanted: float) -> Estimate:
    """The smallest share of cloud calls at which PGR reaches ``wanted``, between rates by a straight line."""
    rates, curves = _curves(points)
    return estimate(np.array([_reaches(rates, curve, wanted) for curve in curves]))


def aiq(points: Sequence[Point], edge: Floats, cloud: Floats) -> Estimate:
    """RouterBench's: area under the non-decreasing convex hull of mean quality over cost, by the largest cost.

    ``edge`` and ``cloud`` [R] are the models' mean qualities, as `Bench` has them.
    """
    rates, curves = _curves(points)
    qualities = edge[:, None] + curves * (cloud - edge)[:, None]
    return estimate(np.array([_under_hull(rates, curve) for curve in qualities]))


def share_at_dp(points: Sequence[Point], wanted: float) -> Estimate:
    """The smallest share of cloud calls at which dP reaches ``wanted`` percent; NaN where it never does up to 0.9.

    The interval is of the resamples in which it does.
    """
    return _where_reached(_shares_at_dp(points, wanted))


def saved_at_dp(points: Sequence[Point], cloud_only: Point, wanted: float) -> Estimate:
    """Share of cloud calls that random routing needs to reach a dP of ``wanted`` percent and the router does not.

    NaN where either of them never reaches it; the interval is of the resamples in which both do.
    """
    random = wanted / cloud_only.delta_p.samples
    shares = _shares_at_dp(points, wanted)
    return _where_reached(np.where((random > 0) & (random <= 1), 1 - shares / random, np.nan))


def _where_reached(samples: Floats) -> Estimate:
    if np.isnan(samples[0]):
        return Estimate(np.nan, np.nan, np.nan)
    return estimate(samples[~np.isnan(samples)])


def _shares_at_dp(points: Sequence[Point], wanted: float) -> Floats:
    """[R], see `share_at_dp`."""
    rates = np.array([0.0, *(point.rate for point in points)])
    inner = [point.delta_p.samples for point in points]
    curves = np.stack([np.zeros_like(inner[0]), *inner], axis=1)
    return np.array([_reaches(rates, curve, wanted) for curve in curves])


def _curves(points: Sequence[Point]) -> tuple[Floats, Floats]:
    """Rates [T] from 0 to 1, and PGR there [R, T]."""
    rates = np.array([0.0, *(point.rate for point in points), 1.0])
    inner = [point.pgr.samples for point in points]
    return rates, np.stack([np.zeros_like(inner[0]), *inner, np.ones_like(inner[0])], axis=1)


def _under_hull(rates: Floats, qualities: Floats) -> float:
    hull: list[tuple[float, float]] = []
    for point in zip(rates.tolist(), np.maximum.accumulate(qualities).tolist(), strict=True):
        while len(hull) > 1 and _turns_left(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    x, y = zip(*hull, strict=True)
    return float(np.trapezoid(y, x))


def _reaches(rates: Floats, values: Floats, wanted: float) -> float:
    above = np.flatnonzero(values >= wanted)
    if not above.size:
        return float("nan")
    first = int(above[0])
    if first == 0:
        return float(rates[0])
    step = (wanted - values[first - 1]) / (values[first] - values[first - 1])
    return float(rates[first - 1] + step * (rates[first] - rates[first - 1]))


def _turns_left(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) >= 0
