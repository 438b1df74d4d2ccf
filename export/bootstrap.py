"""Values with 95 % bootstrap intervals, drawn by *scenes*: sentences that say the same scene share its outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def percent(self) -> Estimate:
        """What is a share, in percent."""
        return Estimate(100 * self.value, 100 * self.low, 100 * self.high)

    def __format__(self, form: str) -> str:
        """All three, each as ``form`` has it, such as ".2f"; nothing where the value is not a number."""
        if np.isnan(self.value):
            return ""
        value, low, high = (format(number, form) for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def resampled(scenes: NDArray[np.int64], number: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """All rows, and then those of ``number`` bootstrap samples: as many scenes as there are, drawn with replacement,
    with their rows. ``scenes`` [N] numbers what each row says.
    """
    yield np.arange(len(scenes))
    draw = np.random.default_rng(seed)
    order = np.argsort(scenes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(scenes[order])) + 1)
    for _ in range(number):
        yield np.concatenate([groups[one] for one in draw.integers(0, len(groups), len(groups))])


def interval(
    statistic: Callable[[NDArray[np.int64]], float], scenes: NDArray[np.int64], number: int, seed: int = 0
) -> Estimate:
    """The ``statistic`` of all rows, with its interval over those that are `resampled`."""
    return estimate(np.array([statistic(rows) for rows in resampled(scenes, number, seed)]))


def intervals(
    statistic: Callable[[NDArray[np.int64]], Floats], scenes: NDArray[np.int64], number: int, seed: int = 0
) -> list[Estimate]:
    """The same of a ``statistic`` of several numbers, each by itself."""
    return [estimate(column) for column in np.stack([*map(statistic, resampled(scenes, number, seed))]).T]


def estimate(values: Floats) -> Estimate:
    """From what was found of each of `resampled`, [1 + number]: the first is the value itself."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high))
