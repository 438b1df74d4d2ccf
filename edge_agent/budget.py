"""Budgets and rates of cloud calls, and whether they have room for one more. Pure: what has been spent comes from the
ledger, the time from its clock.

Money is whole micro-dollars. Windows are calendar hours, days and months in UTC.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal, NamedTuple, get_args

from edge_agent.errors import QuotaExhausted
from edge_agent.money import MAX_MICRO_USD, dollars

Window = Literal["hour", "day", "month", "total"]

_HELD_RETRY_S = 5.0
"""When to come back where only calls under way fill a budget: they hold the most they may cost, and most cost less."""


@dataclass(frozen=True)
class Budget:
    """At most `cap_micro_usd` in each window; of one `app` alone, or of all apps together when it is None.

    A cap of 0 lets no call through, whatever it costs. One that is merely used up lets calls through that cost nothing.
    """

    name: str
    window: Window
    cap_micro_usd: int
    app: str | None = None

    def __post_init__(self) -> None:
        if self.window not in get_args(Window):
            raise ValueError(f"budget {self.name!r}: a window is one of {', '.join(get_args(Window))}")
        if not 0 <= self.cap_micro_usd <= MAX_MICRO_USD:
            raise ValueError(f"budget {self.name!r}: the cap must not be negative, nor above {MAX_MICRO_USD}")


@dataclass(frozen=True)
class Rate:
    """At most `max_calls` cloud calls in any `per_seconds` seconds, all apps together."""

    name: str
    max_calls: int
    per_seconds: float

    def __post_init__(self) -> None:
        if self.max_calls < 0 or not self.per_seconds > 0:
            raise ValueError(f"rate {self.name!r}: needs a number of calls, not negative, and a time above 0")

    def recent(self, reserved_at: tuple[float, ...], now: float) -> tuple[float, ...]:
        """Those of the ascending times that it counts now."""
        return reserved_at[bisect.bisect_right(reserved_at, now - self.per_seconds) :]

    def refusal(self, reserved_at: tuple[float, ...], now: float) -> QuotaExhausted | None:
        """Why it has no room for one more call after those of these ascending times; None when it has."""
        recent = self.recent(reserved_at, now)
        if len(recent) < self.max_calls:
            return None
        # There is room again once the last `max_calls` calls but one are all that is recent.
        leaves = recent[len(recent) - self.max_calls] if self.max_calls else None
        return QuotaExhausted(
            f"the rate {self.name!r} allows {self.max_calls} cloud calls in {self.per_seconds:.10g} s, "
            f"and there were {len(recent)}",
            budget=self.name,
            retry_after_s=leaves + self.per_seconds - now if leaves is not None else None,
        )


class BudgetState(NamedTuple):
    """A budget in its current window; remaining = cap - spent - reserved, and never below 0."""

    name: str
    window: Window
    cap_micro_usd: int
    spent_micro_usd: int
    reserved_micro_usd: int
    remaining_micro_usd: int
    app: str | None = None

    @property
    def closed(self) -> bool:
        """Whether it is for no cloud at all, also where a call costs nothing."""
        return self.cap_micro_usd == 0

    def refusal(self, ceiling_micro_usd: int, now: float) -> QuotaExhausted | None:
        """Why it has no room for a call at this ceiling; None when it has."""
        cap, spent, reserved = self.cap_micro_usd, self.spent_micro_usd, self.reserved_micro_usd
        closed = self.closed
        if not closed and spent + reserved <= cap and ceiling_micro_usd <= self.remaining_micro_usd:
            return None
        held, retry_after_s = "", None
        if not closed and spent + ceiling_micro_usd <= cap:
            held = f"; {dollars(reserved)} is set aside for other calls until they end"
            retry_after_s = _HELD_RETRY_S
        elif not closed and ceiling_micro_usd <= cap:
            _, end = window_bounds(self.window, now)
            retry_after_s = end - now if end is not None else None
        return QuotaExhausted(
            f"the budget {self.name!r} ({self.window}) has {dollars(self.remaining_micro_usd)} left of {dollars(cap)}, "
            f"and this call may cost {dollars(ceiling_micro_usd)}{held}",
            budget=self.name,
            retry_after_s=retry_after_s,
        )


@dataclass(frozen=True)
class RateState:
    """A rate, and how many calls it counts in the time that ends now."""

    name: str
    max_calls: int
    per_seconds: float
    calls: int


def window_bounds(window: Window, now: float) -> tuple[float, float | None]:
    """Start and end, in seconds since 1970, of the window that `now` lies in; `total` has no end (None)."""
    if window == "total":
        return -math.inf, None
    if window == "month":
        today = datetime.fromtimestamp(now, timezone.utc)
        first = datetime(today.year, today.month, 1, tzinfo=timezone.utc)
        later = (today.year, today.month + 1) if today.month < 12 else (today.year + 1, 1)
        return first.timestamp(), datetime(*later, 1, tzinfo=timezone.utc).timestamp()
    seconds = 3_600 if window == "hour" else 86_400  # UTC days have no daylight saving
    start = now // seconds * seconds
    return start, start + seconds
