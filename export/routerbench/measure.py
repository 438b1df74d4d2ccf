"""What a router's scores are worth on prompts with measured outcomes, at every routing rate.

Gains are qualities won over edge only. Headroom = (gain - random) / (oracle - random), the oracle cross-fitted over
seeds; dP in the paper's form, a mean over metrics of gain / |gap of the means| in percent, over the metrics whose mean
gap on the training prompts has a 95 % interval without 0 (a rule that does not look at test prompts); PGR = gain / gain
of cloud only; win gain = how much more often than at random the better image of the two, by PRS, is the one that is
served, in percent points. Intervals are 95 % bootstraps over prompts; a router's value is the mean over its seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.evaluate import Estimate, Paired, routed
from export.outcomes import Outcomes
from export.routerbench.router import Floats

RATES = tuple(round(0.1 * step, 1) for step in range(1, 10))
RESAMPLES = 400


def counted_metrics(train: Outcomes) -> NDArray[np.bool_]:
    """[M]: the metrics whose mean gap is not zero for all that the training prompts can say; they make dP."""
    gap = train.cloud.astype(np.float64) - train.edge
    error = gap.std(axis=0, ddof=1) / np.sqrt(len(gap))
    return np.asarray(np.abs(gap.mean(axis=0)) > 1.96 * error)


@dataclass(frozen=True)
class Point:
    """A router at one routing rate."""

    rate: float
    headroom: Estimate
    delta_p: Estimate
    pooled_dp: Estimate
    pgr: Estimate
    win_gain: Estimate
    inspector_accuracy: Estimate | None


class Bench:
    """Test prompts and their bootstrap resamples, which every router is measured on alike."""

    def __init__(
        self, test: Outcomes, superiority: Floats, counted: NDArray[np.bool_], seed: int = 0
    ) -> None:
        """``superiority`` [N] is the PRS of the measured mean qualities, ``counted`` [M] see `counted_metrics`."""
        self.paired = Paired.of(test)
        self.gaps = self.paired.gaps.mean(axis=1)  # [N, M]
        self.better = np.sign(superiority - 0.5)  # [N], 1 where the edge's image is the better one
        self.counted = counted
        self.verdicts: tuple[Floats, Floats] | None = None
        if test.edge_inspected is not None and test.cloud_inspected is not None:
            self.verdicts = _mean(test.edge_inspected), _mean(test.cloud_inspected)
        draw = np.random.default_rng(seed)
        size = len(self.gaps)
        self.resamples = [np.arange(size), *draw.integers(0, size, (RESAMPLES, size))]
        self.oracle = {
            rate: np.array([self.paired.rows(rows).oracle_gain(rate) for rows in self.resamples])
            for rate in RATES
        }

    def points(self, scores: Sequence[Floats]) -> list[Point]:
        """One a rate, of the scores [N] that a router's seeds gave."""
        return [self._point(rate, self._shares(scores, rate)) for rate in RATES]

    def oracle_points(self) -> list[Point]:
        """The cross-fitted oracle: only its gain is known."""
        points = []
        for rate in RATES:
            full = np.array([self.gaps[rows].mean() for rows in self.resamples])
            one = estimate(np.ones(len(self.resamples)))
            nothing = estimate(np.full(len(self.resamples), np.nan))
            points.append(
                Point(rate, one, nothing, nothing, estimate(self.oracle[rate] / full), nothing, None)
            )
        return points

    def difference(self, ours: Sequence[Floats], theirs: Sequence[Floats], rate: float) -> Estimate:
        """Paired: how much more of the headroom ``ours`` captures than ``theirs``."""
        one, other = (self._headroom(rate, self._shares(scores, rate)) for scores in (ours, theirs))
        return estimate(one - other)

    def _shares(self, scores: Sequence[Floats], rate: float) -> list[Floats]:
        """For each resample the share of each of its prompts that goes to the cloud, a mean over seeds."""
        return [np.mean([routed(score[rows], rate) for score in scores], axis=0) for rows in self.resamples]

    def _gains(self, shares: Sequence[Floats]) -> Floats:
        """[resamples, M]."""
        pairs = zip(shares, self.resamples, strict=True)
        return np.array([share @ self.gaps[rows] / len(rows) for share, rows in pairs])

    def _headroom(self, rate: float, shares: Sequence[Floats]) -> Floats:
        random = rate * np.array([self.gaps[rows].mean() for rows in self.resamples])
        return np.asarray((self._gains(shares).mean(axis=1) - random) / (self.oracle[rate] - random))

    def _point(self, rate: float, shares: Sequence[Floats]) -> Point:
        gains = self._gains(shares)
        full = np.array([self.gaps[rows].mean(axis=0) for rows in self.resamples])
        counted = self.counted
        pairs = list(zip(shares, self.resamples, strict=True))
        wins = [float(((0.5 - share) * self.better[rows]).mean()) for share, rows in pairs]
        chance = [float(((0.5 - rate) * self.better[rows]).mean()) for rows in self.resamples]
        found = None
        if self.verdicts is not None:
            edge, cloud = self.verdicts
            mixed = [share * cloud[rows] + (1 - share) * edge[rows] for share, rows in pairs]
            found = estimate(np.array([np.nanmean(row) for row in mixed]))
        return Point(
            rate,
            estimate(self._headroom(rate, shares)),
            estimate(100 * (gains[:, counted] / np.abs(full[:, counted])).mean(axis=1)),
            estimate(100 * gains.sum(axis=1) / np.abs(full).sum(axis=1)),
            estimate(gains.mean(axis=1) / full.mean(axis=1)),
            estimate(100 * (np.array(wins) - np.array(chance))),
            found,
        )


def apgr(points: Sequence[Point]) -> float:
    """Area under PGR over the rate, from (0, 0) to (1, 1), by trapezia."""
    rates, gains = _curve(points)
    return float(np.trapezoid(gains, rates))


def cpt(points: Sequence[Point], wanted: float) -> float:
    """The smallest share of cloud calls at which PGR reaches ``wanted``, between rates by a straight line."""
    return _reaches(*_curve(points), wanted)


def aiq(points: Sequence[Point], edge: float, cloud: float) -> float:
    """RouterBench's: area under the non-decreasing convex hull of mean quality over cost, by the largest cost."""
    rates, gains = _curve(points)
    hull: list[tuple[float, float]] = []
    for point in zip(rates, np.maximum.accumulate(edge + gains * (cloud - edge)), strict=True):
        while len(hull) > 1 and _turns_left(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    x, y = zip(*hull, strict=True)
    return float(np.trapezoid(y, x))


def share_at_dp(points: Sequence[Point], wanted: float) -> float:
    """The smallest share of cloud calls at which dP reaches ``wanted`` percent; NaN where it never does below 0.9."""
    rates = np.array([0.0, *(point.rate for point in points)])
    return _reaches(rates, np.array([0.0, *(point.delta_p.value for point in points)]), wanted)


def estimate(values: Floats) -> Estimate:
    """The first is the value itself, the others are the resamples'."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high))


def _mean(verdicts: NDArray[np.float32]) -> Floats:
    """[N], of each prompt's images [N, S]; NaN where the inspector says nothing."""
    known = (~np.isnan(verdicts)).sum(axis=1)
    return np.nansum(verdicts, axis=1, dtype=np.float64) / np.where(known, known, np.nan)


def _curve(points: Sequence[Point]) -> tuple[Floats, Floats]:
    rates = np.array([0.0, *(point.rate for point in points), 1.0])
    return rates, np.array([0.0, *(point.pgr.value for point in points), 1.0])


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
