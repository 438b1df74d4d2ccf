"""Who may wait for the model, and for how long: a bounded queue before one worker, in which tenants take turns."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
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

    `position` is the number of requests that were to be served before it on arrival, the running one included.
    `steps_left` counts down while its image is made.
    """

    tenant: str
    shape: Shape
    steps_left: int
    position: int = 0
    turn: asyncio.Event = field(default_factory=asyncio.Event)


class Admission:
    """Lets one request at a time at the model and `max_queue` more wait; refuses the rest at once.

    The next turn is that of the tenant whose last one is the longest ago, and each tenant's requests keep their order:
    one who asks for much waits for its own. So that it does not keep others out either, a full queue takes one request
    of each tenant who has none there, running or waiting; not where `max_queue` is 0.

    It learns the model's pace for each shape of image, in seconds a denoising step, so that it can refuse a call
    whose deadline would pass. The estimate leaves out everything but steps of known pace and who may come yet: it is a
    lower bound, and who is refused could not have been served in time. A pace learnt while the machine slept or was
    busy is wrong, and whom it refuses cannot correct it: so it shrinks with each caller that it keeps from an idle
    server, until one is let in. For one event loop; not thread-safe.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self._running: Ticket | None = None
        self._waiting: list[Ticket] = []  # as they came
        self._turns = 0
        self._last_turn: dict[str, int] = {}  # of each tenant that had one: which it was
        self._pace_s: dict[Shape, float] = {}

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    @asynccontextmanager
    async def enter(
        self, tenant: str, shape: Shape, steps: int, remaining_s: float | None
    ) -> AsyncIterator[Ticket]:
        """A place in the queue, given back on leaving the block. Await `ticket.turn` before using the model.

        `remaining_s`: seconds to the caller's deadline, None when there is none.
        Raises QueueFull (with the seconds after which a place should be free) and DeadlineTooShort.
        """
        running = [self._running] if self._running else []
        if self._full_for(tenant):
            raise QueueFull(
                f"{self.waiting} requests already wait, which is all the queue holds; try again later",
                retry_after_s=self._estimate(running) or DEFAULT_RETRY_S,
            )
        ticket = Ticket(tenant, shape, steps)
        before = [*running, *self._in_turn([*self._waiting, ticket])]
        del before[before.index(ticket) :]
        ticket.position = len(before)
        estimate = self._estimate([*before, ticket])
        if remaining_s is not None and remaining_s < estimate:
            if not before and shape in self._pace_s:
                self._pace_s[shape] *= DOUBT
            raise DeadlineTooShort(
                f"the image would take {estimate:.1f} s or more, with {ticket.position} requests before it, and the "
                f"deadline is in {remaining_s:.1f} s; allow more time"
            )
        self._waiting.append(ticket)
        self._call_next()
        try:
            yield ticket
        finally:
            if ticket is self._running:
                self._running = None
                self._call_next()
            else:
                self._waiting.remove(ticket)

    def record(self, shape: Shape, step_s: float) -> None:
        """Tells how long a denoising step of an image of this shape took, in seconds."""
        known = self._pace_s.get(shape, step_s)
        self._pace_s[shape] = known + PACE_WEIGHT * (step_s - known)

    def _full_for(self, tenant: str) -> bool:
        if self._running is None or len(self._waiting) < self.max_queue:
            return False
        there = {self._running.tenant, *(ticket.tenant for ticket in self._waiting)}
        return not self.max_queue or tenant in there

    def _in_turn(self, tickets: list[Ticket]) -> list[Ticket]:
        """`tickets`, as they came, in the order in which they will have their turns if nobody else comes."""
        queues: dict[str, deque[Ticket]] = {}
        for ticket in tickets:
            queues.setdefault(ticket.tenant, deque()).append(ticket)
        # Tenants without a turn so far come first, in the order in which they came.
        heap = [(self._last_turn.get(tenant, 0), order, tenant) for order, tenant in enumerate(queues)]
        heapq.heapify(heap)
        found, turns = [], self._turns
        while heap:
            _, order, tenant = heapq.heappop(heap)
            found.append(queues[tenant].popleft())
            turns += 1
            if queues[tenant]:
                heapq.heappush(heap, (turns, order, tenant))
        return found

    def _call_next(self) -> None:
        if self._running is None and self._waiting:
            self._running = ticket = min(self._waiting, key=lambda each: self._last_turn.get(each.tenant, 0))
            self._waiting.remove(ticket)
            self._turns += 1
            self._last_turn[ticket.tenant] = self._turns
            ticket.turn.set()

    def _estimate(self, tickets: list[Ticket]) -> float:
        return sum(ticket.steps_left * self._pace_s.get(ticket.shape, 0.0) for ticket in tickets)
