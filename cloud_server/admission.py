"""Who may wait for the model, and for how long: a bounded first-come queue before one worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cloud_server.errors import DeadlineTooShort, QueueFull

UNKNOWN_PACE_RETRY_S = 1.0  # what RetryInfo says before the first image has been timed
PACE_WEIGHT = 0.3  # share of the newest image in the moving average of the pace


@dataclass(eq=False)
class Ticket:
    """A request's place.

    `position` is the number of requests before it on arrival, the running one included; `work` is what it asks of
    the model, in pixels x denoiser passes.
    """

    position: int
    work: float
    turn: asyncio.Event = field(default_factory=asyncio.Event)


class Admission:
    """Lets one request at a time at the model and `max_queue` more wait; refuses the rest at once.

    It learns the model's pace (seconds a pixel and denoiser pass, a moving average) from the images made, so
    that it can refuse a call whose deadline would pass before its image is there; before the first image it
    refuses none. For one event loop; not thread-safe.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self._tickets: list[Ticket] = []
        self._pace_s: float | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return max(0, len(self._tickets) - 1)

    @asynccontextmanager
    async def enter(self, work: float, remaining_s: float | None) -> AsyncIterator[Ticket]:
        """A place in the queue, given back on leaving the block. Await `ticket.turn` before using the model.

        `remaining_s`: seconds to the caller's deadline, None when there is none.
        Raises QueueFull (with the seconds after which one place should be free) and DeadlineTooShort.
        """
        if len(self._tickets) > self.max_queue:
            first = self._estimate(self._tickets[:1])
            raise QueueFull(
                f"{self.waiting} requests already wait, which is all the queue holds; try again later",
                retry_after_s=UNKNOWN_PACE_RETRY_S if first is None else first,
            )
        ticket = Ticket(position=len(self._tickets), work=work)
        estimate = self._estimate([*self._tickets, ticket])
        if remaining_s is not None and estimate is not None and remaining_s < estimate:
            raise DeadlineTooShort(
                f"the image would take about {estimate:.1f} s with {ticket.position} requests before it, and "
                f" the deadline is in {remaining_s:.1f} s; allow more time"
            )
        self._tickets.append(ticket)
        self._call_first()
        try:
            yield ticket
        finally:
            self._tickets.remove(ticket)
            self._call_first()

    def record(self, ticket: Ticket, seconds: float) -> None:
        """Tells how long the model took for `ticket`."""
        pace = seconds / ticket.work
        self._pace_s = pace if self._pace_s is None else self._pace_s + PACE_WEIGHT * (pace - self._pace_s)

    def _call_first(self) -> None:
        if self._tickets:
            self._tickets[0].turn.set()

    def _estimate(self, tickets: list[Ticket]) -> float | None:
        if self._pace_s is None:
            return None
        return self._pace_s * sum(ticket.work for ticket in tickets)
