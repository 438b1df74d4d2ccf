"""A budget that lasts: the routing rate that it can pay for until its window ends.

By itself a budget goes to the first prompts that are worth the cloud, and once it is spent those that would gain most
stay on the edge too. Paced, it goes to the prompts that gain most throughout its window: to such a share of those still
to come as its money is enough for. How many are to come is what the same hours brought on the days before. However
wrong that is, the money lasts: the less of it is left, the smaller is the share. Only numbers of prompts are kept, no
prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edge_agent.budget import Budget, BudgetState, window_bounds
from edge_agent.notes import Notes

HOUR_S = 3_600
DAY_H = 24
KEPT_H = 7 * DAY_H
"""A week, whose days differ; few enough hours to follow a change."""
MOST = 2**53
"""More prompts an hour than ever come, and few enough to reckon with: a float holds no integer of 400 digits."""


class Arrivals:
    """How many prompts came in each of the last hours, numbered from 1970 on, and so how many are to come."""

    def __init__(self, by_hour: Iterable[tuple[int, int]] = ()) -> None:
        self._by_hour = dict(by_hour)

    @property
    def by_hour(self) -> list[tuple[int, int]]:
        """Hours with prompts, and how many."""
        return list(self._by_hour.items())

    def add(self, now: float) -> None:
        """One more, at `now`, in seconds since 1970."""
        hour = int(now // HOUR_S)
        if hour not in self._by_hour:
            self._by_hour = self._known(hour)
        self._by_hour[hour] = self._by_hour.get(hour, 0) + 1

    def expected(self, now: float, until: float) -> float:
        """Prompts from `now` until `until`, the end of an hour: in each hour as many as are the mean of those hours of
        the day that have passed since the first that is known, or, where none has, of all.
        """
        current, hours = int(now // HOUR_S), now / HOUR_S
        known = self._known(current)
        if not known:
            return 0.0
        first = min(known)
        on_average = sum(known.values()) / max(1.0, hours - first)
        of_day = []  # of the current hour, the next, ...
        for hour in range(current, current + DAY_H):
            passed = range(hour - DAY_H, first - 1, -DAY_H)
            of_day.append(sum(known.get(one, 0) for one in passed) / len(passed) if passed else on_average)
        days, rest = divmod(round(until / HOUR_S) - current, DAY_H)
        return days * sum(of_day) + sum(of_day[:rest]) - of_day[0] * (hours - current)

    def _known(self, current: int) -> dict[int, int]:
        """Those of the last week. Others are too old, or of a clock that was ahead."""
        return {hour: count for hour, count in self.by_hour if current - KEPT_H <= hour <= current}


class Pacing:
    """Budgets, and the prompts that each of them is for. With a `folder` what came outlives the process."""

    def __init__(self, budgets: Iterable[Budget], folder: Path | None = None) -> None:
        self._notes = Notes(folder / "arrivals.json" if folder else None)
        noted = _arrivals(self._notes.read())
        self._arrivals = {budget.app: noted.get(budget.app, Arrivals()) for budget in budgets}

    def add(self, app: str, now: float) -> bool:
        """One more prompt of `app` that the policy was free to send anywhere. Returns whether it is time to `save`."""
        for counted in {None, app} & self._arrivals.keys():
            self._arrivals[counted].add(now)
        return self._notes.changed()

    def save(self) -> None:
        """To the file, where there is one; waits for the disk, in any thread."""
        self._notes.save(lambda: [(app, arrivals.by_hour) for app, arrivals in self._arrivals.items()])

    def rate(
        self, states: Sequence[BudgetState], price_micro_usd: int, now: float, ceiling_micro_usd: int = 0
    ) -> float:
        """The largest share of prompts that all these budgets can pay for until their windows end, at most 1. One whose
        window is `total` never ends. Where a call costs less than the ceiling that it needs room for, the difference is
        left over in the end.
        """
        left_over = max(0, ceiling_micro_usd - price_micro_usd)
        rate = 1.0
        for state in states:
            _, end = window_bounds(state.window, now)
            if end is not None and price_micro_usd:
                expected = self._arrivals[state.app].expected(now, end)
                images = max(0, state.remaining_micro_usd - left_over) / price_micro_usd
                rate = min(rate, images / max(1.0, expected))
        return rate


def _arrivals(noted: Any) -> dict[str | None, Arrivals]:
    """What was noted for each app; nothing where the file holds something else."""
    try:
        return {
            app: Arrivals([(int(hour), int(count)) for hour, count in by_hour if 0 < count < MOST])
            for app, by_hour in noted
        }
    except (ValueError, TypeError, OverflowError):
        return {}
