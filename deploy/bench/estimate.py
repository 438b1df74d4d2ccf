"""A median, or another quantile, with the interval that the same run can vouch for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """`value` of `n` measurements, with a 95 % bootstrap interval over them."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def exact(cls, value: float, n: int = 1) -> Estimate:
        """A value that has no interval, such as a maximum."""
        return cls(value, value, value, n)


def quantile(values: Sequence[float], q: float = 0.5) -> Estimate:
    """The `q` quantile of `values`; the median by default."""
    found = np.asarray(values, np.float64)
    draws = np.random.default_rng(0).choice(found, (RESAMPLES, len(found)))
    low, high = np.quantile(np.quantile(draws, q, axis=1), (0.025, 0.975))
    return Estimate(float(np.quantile(found, q)), float(low), float(high), len(found))


def calm(values: Sequence[float]) -> float:
    """The fastest tenth's border: what a machine that is busy otherwise leaves of the real cost.

    Not computing time, which virtual machines may count far too high over a millisecond.
    """
    return float(np.quantile(values, 0.1))


def calm_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The same, ours over theirs."""
    return calm(ours) / calm(theirs)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Median of the ratios of pairs measured one right after the other, so that both met the same weather."""
    return quantile([our / their for our, their in zip(ours, theirs, strict=True)])


def ratio_both_ways(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The same of pairs that take turns in which of both comes first, two of them together: who is second finds the
    processor's caches full of the other, which can weigh as much as what is measured.
    """
    return ratio(_by_twos(ours), _by_twos(theirs))


def _by_twos(values: Sequence[float]) -> list[float]:
    return [first + second for first, second in zip(values[::2], values[1::2], strict=False)]
