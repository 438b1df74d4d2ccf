"""What the calls to the cloud so far say of the next one: whether to make it, and who has to find out.

No probe is ever sent: everything here was learnt from calls that were wanted for their images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REMEMBERED_S = 60.0
"""How long a price and the size of a refused image are taken for what the cloud still says."""

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
"""After a failed connection the cloud counts as unhealthy for 1 s, then 2, 4, ... up to a minute."""

SLOW_CONNECTION_S = 1.0
"""Who has waited so long for a connection has found out something about the cloud, however soon he leaves."""


class TrackRecord:
    """A cloud's, as this process has come to know it. `monotonic` is a clock, in seconds."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._failures = 0  # in a row
        self._retry_at = -math.inf
        self._tried_until = -math.inf  # a call that is about to be sent finds out whether the cloud is back
        # Calls that wait for their connection or to be accepted: since when, and for how long that says nothing.
        self._waiting: list[tuple[float, float]] = []
        self._price_micro_usd, self._price_until = 0, -math.inf
        self._refused_sizes: dict[tuple[int, int], float] = {}  # until when

    @property
    def healthy(self) -> bool:
        """False for a while after a connection failed, or for as long as the cloud asked to be left alone.

        And while a call finds out whether it is back, or already waits for long: the others need not wait with it.
        """
        now = self._monotonic()
        return now >= max(self._retry_at, self._tried_until) and not any(
            self._failures or now - since >= patience_s for since, patience_s in self._waiting
        )

    def lets_through(self, size: tuple[int, int], ceiling_micro_usd: int) -> bool:
        """Whether nothing that is known speaks against a call for an image of that size, at that price or below."""
        return self.healthy and self.affordable(ceiling_micro_usd) and self.makes(size)

    def affordable(self, ceiling_micro_usd: int) -> bool:
        """False for a minute after the cloud has told a price above `ceiling_micro_usd`."""
        return ceiling_micro_usd >= self._price_micro_usd or self._monotonic() >= self._price_until

    def makes(self, size: tuple[int, int]) -> bool:
        """False for a minute after the cloud has refused an image of that size."""
        return self._monotonic() >= self._refused_sizes.get(size, -math.inf)

    @contextmanager
    def expected(self) -> Iterator[None]:
        """A call comes once the block has set its money aside: where the last one failed, the others leave it to that
        one to find out whether the cloud is back.
        """
        if self._failures:
            self._tried_until = self._monotonic() + SLOW_CONNECTION_S
        try:
            yield
        except BaseException:
            self._tried_until = -math.inf
            raise

    @contextmanager
    def waits(self, patience_s: float) -> Iterator[None]:
        """In the block a call waits for the cloud. After `patience_s` seconds that says something of it."""
        waiting = self._monotonic(), patience_s
        self._tried_until = -math.inf
        self._waiting.append(waiting)
        try:
            yield
        finally:
            self._waiting.remove(waiting)

    def failed(self) -> None:
        """A connection failed. Several calls that fail together count once."""
        now = self._monotonic()
        if now >= self._retry_at:
            self._retry_at = now + min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self._failures, 16))
            self._failures += 1

    def leave_alone(self, seconds: float) -> None:
        """The cloud asked for that."""
        self._retry_at = max(self._retry_at, self._monotonic() + seconds)

    def accepted(self, price_micro_usd: int, size: tuple[int, int]) -> None:
        """The cloud takes a request for an image of that size, at that price."""
        self.recovered()
        self.told_price(price_micro_usd)
        self._refused_sizes.pop(size, None)

    def recovered(self) -> None:
        """The cloud does what it should, whatever failed before."""
        self._failures, self._retry_at = 0, -math.inf

    def told_price(self, price_micro_usd: int) -> None:
        """The cloud says what an image costs."""
        self._price_micro_usd, self._price_until = price_micro_usd, self._monotonic() + REMEMBERED_S

    def refused_size(self, size: tuple[int, int]) -> None:
        """The cloud takes no request for an image of that size."""
        self._refused_sizes[size] = self._monotonic() + REMEMBERED_S
