"""Who may wait for the model, and for how long: a bounded first-come queue before one worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cloud_server.errors import DeadlineTooShort, QueueFull

DEFAULT_RETRY_S = 1.0  # what RetryInfo says while the pace is not known
PACE_WEIGHT = 0.3  # share of the newest image in the moving average of the pace
DOUBT = 0.8  # what is left of a pace after it has turned somebody away from an idle server

Shape = Hashable  # whatever images of the same cost a step have in common


@dataclass(eq=False)
class Ticket:
    """A request's place.

    `position` is the number of requests before it on arrival, the running one included. `steps_left` counts down
    while its image is made.
    """

    position: int
    shape: Shape
    steps_left: int
    turn: asyncio.Event = field(default_factory=asyncio.Event)


class Admission:
    """Lets one request at a time at the model and `max_queue` more wait; refuses the rest at once.

    It learns the model's pace for each shape of image, in seconds a denoising step, so that it can refuse a call
    whose deadline would pass. The estimate leaves out everything but steps of known pace: it is a lower bound,
    and who is refused could not have been served in time. A pace learnt while the machine slept or was busy is
    wrong, and whom it refuses cannot correct it: so it shrinks with each caller that it keeps from an idle
    server, until one is let in. For one event loop; not thread-safe.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self._tickets: list[Ticket] = []
        self._pace_s: dict[Shape, float] = {}

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return max(0, len(self._tickets) - 1)

    @asynccontextmanager
    async def enter(self, shape: Shape, steps: int, remaining_s: float | None) -> AsyncIterator[Ticket]:
        """A place in the queue, given back on leaving the block. Await `ticket.turn` before using the model.

        `remaining_s`: seconds to the caller's deadline, None when there is none.
        Raises QueueFull (with the seconds after which a place should be free) and DeadlineTooShort.
        """
        if len(self._tickets) > self.max_queue:
            raise QueueFull(
                f"{self.waiting} requests already wait, which is all the queue holds; try again later",
                retry_after_s=self._estimate(self._tickets[:1]) or DEFAULT_RETRY_S,
            )
        ticket = Ticket(position=len(self._tickets), shape=shape, steps_left=steps)
        estimate = self._estimate([*self._tickets, ticket])
        if remaining_s is not None and remaining_s < estimate:
            if not self._tickets and shape in self._pace_s:
                self._pace_s[shape] *= DOUBT
            raise DeadlineTooShort(
                f"the image would take {estimate:.1f} s or more, with {ticket.position} requests before it, and the "
                f"deadline is in {remaining_s:.1f} s; allow more time"
            )
        self._tickets.append(ticket)
        self._call_first()
        try:
            yield ticket
        finally:
            self._tickets.remove(ticket)
            self._call_first()

    def record(self, shape: Shape, step_s: float) -> None:
        """Tells how long a denoising step of an image of this shape took, in seconds."""
        known = self._pace_s.get(shape, step_s)
        self._pace_s[shape] = known + PACE_WEIGHT * (step_s - known)

    def _call_first(self) -> None:
        if self._tickets:
            self._tickets[0].turn.set()

    def _estimate(self, tickets: list[Ticket]) -> float:
        return sum(ticket.steps_left * self._pace_s.get(ticket.shape, 0.0) for ticket in tickets)
