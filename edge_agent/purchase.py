"""Buying an image: the reservation before the cloud call, and what becomes of it, whatever happens to the call.

A reservation is *settled* when the image has arrived; *released* when the call was never sent or the cloud says
that it never ran; and in every other case (broken off, cancelled, killed in between) the *resolver* asks the cloud
by request id and settles or releases. Until it knows, the reservation counts as spent. Only the cloud that the call
went to can know: another server, or the same one asked by another tenant, has never heard of it.

Who repeats a request whose reservation is settled gets the image that was paid for, as long as the cloud keeps it.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import datetime, timezone
from functools import partial
from typing import Any

from edge_agent.cloud import CloudClient
from edge_agent.cloud_image import CloudAccepted, CloudImage
from edge_agent.errors import (
    CloudError,
    CloudRefused,
    DuplicateRequest,
    LedgerError,
    QuotaExhausted,
    RouteT2IError,
)
from edge_agent.image import Progress
from edge_agent.log import events
from edge_agent.money import dollars
from edge_agent.quota import OUTCOME_RETRY_S, Ledger, Reservation
from edge_agent.request import ImageRequest

log = events(__name__)

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
"""The resolver asks again after 1 s, then 2, 4, ... up to a minute, while an outcome is unknown."""

MOST_UNDER_WAY = 64
"""Cloud calls at a time. Each has a connection, and a service often may have 1,024 files open for all that it does."""

FORGOTTEN = (
    "the cloud accepted this call and now has never heard of it: does more than one cloud server answer at its "
    "address, or was its journal deleted?"
)

CloudEvents = AsyncGenerator[CloudAccepted | Progress | CloudImage, None]


class Purchases:
    """The ledger and the cloud client, kept in step. `cloud` is None where no cloud server is configured."""

    def __init__(self, ledger: Ledger, cloud: CloudClient | None) -> None:
        self.ledger = ledger
        self.cloud = cloud
        self._under_way: set[str] = set()  # ids that a Purchase of this process holds, or the resolver
        self._began = time.monotonic()
        # By when, on time.monotonic(), a call of this process has reached the cloud or never will; of one that was
        # accepted, never: a cloud that has not heard of it is another server than the one that may have charged it.
        self._arrived_by: dict[str, float] = {}
        self._unsent: set[str] = set()  # ids left to the resolver whose call was never opened
        self._asked: set[str] = set()  # ids that the cloud was asked about since the resolver last paused
        self._told: dict[str, str] = {}  # what the log was last told of an id that is not resolved
        self._wake = asyncio.Event()
        self._resolver: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Resolve what an earlier run left behind. Opens no connection when there is nothing. Raises LedgerError."""
        if await asyncio.to_thread(self.ledger.unresolved):
            self._wake.set()
        self._resolver = asyncio.create_task(self._resolve())

    @property
    def full(self) -> bool:
        """Whether as many calls are under way as there may be."""
        return len(self._under_way) >= MOST_UNDER_WAY

    async def reserve(self, request: ImageRequest, ceiling_micro_usd: int, timeout_s: float) -> Purchase:
        """Set the money aside for a call of `timeout_s` seconds at most, from now on.

        The caller closes the purchase, whatever comes of it.

        Raises QuotaExhausted, DuplicateRequest and LedgerError.
        """
        assert self.cloud is not None  # noqa: S101  # `policy.decide` has looked
        key = self.key(request)
        if key in self._under_way:
            raise DuplicateRequest(
                f"the request id {request.request_id!r} is under way: repeat it in a moment, or use a new one "
                "for a new image",
                retry_after_s=OUTCOME_RETRY_S,
            )
        if self.full:
            raise QuotaExhausted(
                f"{MOST_UNDER_WAY} cloud calls are under way, as many as there may be at a time; try again later",
                budget="calls under way",
                retry_after_s=OUTCOME_RETRY_S,
            )
        self._under_way.add(key)
        deadline = time.monotonic() + timeout_s
        reserving = asyncio.ensure_future(
            asyncio.to_thread(
                self.ledger.reserve,
                key,
                request.app,
                ceiling_micro_usd,
                self.cloud.identity,
                timeout_s,
                _asked(request),
            )
        )
        try:
            with self.cloud.record.expected():
                await asyncio.shield(reserving)
        except asyncio.CancelledError:
            # The thread may still reserve: once it has, the resolver gives the money back.
            reserving.add_done_callback(lambda done: self.hand_over(key, sent=done.exception() is not None))
            raise
        except QuotaExhausted:
            self._under_way.discard(key)
            raise
        except DuplicateRequest as error:
            # It may be the resolver's, which meanwhile has passed it over as under way.
            self.hand_over(key, sent=True)
            # The ledger knows it by a key that the caller never gave.
            more = (
                ", and what became of it is not known yet: repeat it in a moment"
                if error.retry_after_s
                else "; use a new one for a new image"
            )
            raise DuplicateRequest(
                f"the request id {request.request_id!r} was used before{more}",
                retry_after_s=error.retry_after_s,
            ) from error
        except BaseException:
            # Where the write itself failed, the money may be set aside all the same: the resolver looks.
            self.hand_over(key, sent=True)
            raise
        self._unsent.discard(key)  # that was an earlier call of this id, released since; this one may be sent
        self._arrived_by[key] = deadline
        return Purchase(
            self, self.cloud, request._replace(request_id=key), ceiling_micro_usd, timeout_s, deadline
        )

    async def redeliver(self, request: ImageRequest, timeout_s: float) -> Redelivery | None:
        """The image that this request id has paid for, once more and for nothing, within `timeout_s` seconds. None
        where it has paid for none, as far as is known.

        The caller closes it. Raises LedgerError.
        """
        assert self.cloud is not None  # noqa: S101  # as in `reserve`
        key, deadline = self.key(request), time.monotonic() + timeout_s
        look = partial(self.ledger.charged, key, self.cloud.identity, _asked(request))
        # At once where nobody writes: turning to a thread and back takes ten times as long as looking.
        paid = look() if self.ledger.idle else await asyncio.to_thread(look)
        if paid is None or self.full or key in self._under_way:
            return None
        self._under_way.add(key)
        return Redelivery(self, self.cloud, request._replace(request_id=key), paid, timeout_s, deadline)

    async def advice(self, ceiling_micro_usd: int) -> list[str]:
        """One sentence for each thing that keeps calls of this ceiling, or what is unresolved, from their end.

        Raises LedgerError.
        """
        found = []
        unresolved = await asyncio.to_thread(self.ledger.unresolved)
        if lost := [left for left in unresolved if not self._knows(left)]:
            clouds = ", ".join(sorted({reservation.cloud for reservation in lost}))
            found.append(
                f"{len(lost)} cloud calls of unknown outcome count as spent, and only the cloud server that they "
                f"went to can tell: start once more with the --cloud and --cloud-token of then ({clouds}) to have "
                "them resolved"
            )
        if self.cloud is not None:
            found += [
                f"the budget {budget.name!r} is {dollars(budget.cap_micro_usd)} and one cloud image may cost "
                f"{dollars(ceiling_micro_usd)}, so that it never has room for one: raise --budget, or lower --max-price"
                for budget in self.ledger.budgets
                if budget.cap_micro_usd < ceiling_micro_usd
            ]
        calls, until = await asyncio.to_thread(self.ledger.ahead)
        if calls:
            date = datetime.fromtimestamp(until, timezone.utc).date().isoformat()
            found.append(
                f"{calls} cloud calls bear a date that is still to come, the last of them {date}, so that they count "
                "in every window until then: check this machine's clock; if it is right and was not, stop edge-agent "
                f"and move {self.ledger.path} away, with the -wal beside it, which forgets what was spent"
            )
        return found

    async def settle(self, key: str, charged_micro_usd: int) -> bool:
        """Record the charge, also when the caller is cancelled meanwhile. False when the ledger could not."""
        return await self._write(key, self.ledger.settle, charged_micro_usd)

    async def release(self, key: str) -> bool:
        """Give the money back, also when the caller is cancelled meanwhile. False when the ledger could not."""
        return await self._write(key, self.ledger.release)

    def key(self, request: ImageRequest) -> str:
        """The request's id towards ledger and cloud, which serves other devices too: ids are unique for each app of
        each device only.
        """
        whole = "\0".join((self.ledger.device, request.app, request.request_id))
        return hashlib.sha256(whole.encode()).hexdigest()[:32]

    def seed(self, request: ImageRequest) -> int:
        """For who gives none: a request that is repeated asks for the same image."""
        return int(self.key(request)[:8], 16)  # 32 bits, as a seed has

    def accepted(self, key: str) -> None:
        """The cloud has taken the call `key`: from now on it is released only where the cloud knows that it ended."""
        self._arrived_by[key] = math.inf

    def concluded(self, key: str) -> None:
        """Nothing is open under `key` any more."""
        self._under_way.discard(key)

    def hand_over(self, key: str, *, sent: bool) -> None:
        """From now on the reservation `key`, if it is still open, is the resolver's."""
        self._under_way.discard(key)
        self._asked.discard(key)
        if not sent:
            self._unsent.add(key)
        self._wake.set()

    async def close(self) -> None:
        """Stop resolving and close cloud and ledger. What is unresolved stays so until the next start."""
        if self._resolver is not None:
            self._resolver.cancel()
            await asyncio.gather(self._resolver, return_exceptions=True)
        if self.cloud is not None:
            await self.cloud.close()
        await asyncio.to_thread(self.ledger.close)

    async def _write(self, key: str, write: Callable[..., Any], *arguments: Any) -> bool:
        def written(done: asyncio.Future[Any]) -> None:  # perhaps after the caller was cancelled
            if not done.cancelled() and done.exception() is None:
                self._arrived_by.pop(key, None)
                self._told.pop(key, None)
                self._unsent.discard(key)

        writing = asyncio.ensure_future(asyncio.to_thread(write, key, *arguments))
        writing.add_done_callback(written)
        try:
            await asyncio.shield(writing)
        except LedgerError as error:
            log.error("unresolved", purchase=key, error=error.message)
            return False
        return True

    async def _resolve(self) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_RETRY_S
        timer: asyncio.TimerHandle | None = None  # until the cloud is asked about the same ids again

        def again() -> None:
            nonlocal pause, timer
            pause, timer = min(2 * pause, LONGEST_RETRY_S), None
            self._asked.clear()
            self._wake.set()

        while True:
            await self._wake.wait()  # also within a pause: what is handed over then may need nobody asked
            self._wake.clear()
            if timer is not None:
                timer.cancel()
            if await self._all_resolved():
                pause, timer = FIRST_RETRY_S, None
                self._asked.clear()
            else:
                # However often it is woken meanwhile: that neither asks again sooner nor puts it off.
                timer = loop.call_at(loop.time() + pause if timer is None else timer.when(), again)

    async def _all_resolved(self) -> bool:
        """Go once through the open reservations; False when some have to be asked for again later."""
        try:
            later = 0
            found = await asyncio.to_thread(self.ledger.unresolved)
            # First those that nobody has to be asked about: a cloud out of reach does not hold them up.
            for reservation in sorted(found, key=lambda left: left.request_id not in self._unsent):
                key = reservation.request_id
                # Those before it may have taken long, and a call that was under way then have ended since.
                if not await asyncio.to_thread(self.ledger.is_open, key) or key in self._under_way:
                    continue
                if key in self._asked:
                    later += 1
                    continue
                # Or it could be reserved anew before the answer comes, and be released.
                self._under_way.add(key)
                try:
                    later += not await self._resolved(reservation)
                except CloudError as error:
                    if error.never_ran:  # the cloud is out of reach: so it would be for the others
                        raise
                    self._tell(key, error.message)
                    later += 1
                finally:
                    self._under_way.discard(key)
        except RouteT2IError as error:  # the cloud is out of reach, or the ledger is
            log.warning("unresolved", error=error.message)
            return False
        except Exception:  # whatever it is, the money of all other calls waits for this task
            log.exception("a bug in the daemon held up the open reservations")
            return False
        return later == 0

    async def _resolved(self, reservation: Reservation) -> bool:
        key = reservation.request_id
        if key in self._unsent:
            return await self.release(key)
        if self.cloud is None or not self._knows(reservation):
            return True  # nobody to ask; the status says so
        may_arrive = self._may_arrive(reservation)  # before asking, as that takes time
        self._asked.add(key)
        outcome = await self.cloud.lookup(key)
        if not outcome.arrived and self._arrived_by.get(key) == math.inf:
            self._tell(key, FORGOTTEN)
        if not outcome.known or (may_arrive and not outcome.arrived):
            return False
        charged = outcome.charged_micro_usd
        log.info("resolved", purchase=key, charged_micro_usd=charged or 0)
        return await (self.release(key) if charged is None else self.settle(key, charged))

    def _tell(self, key: str, error: str) -> None:
        """Once: it is asked about again and again, and may be for good."""
        if self._told.get(key) != error:
            log.warning("unresolved", purchase=key, error=error)
        self._told[key] = error

    def _may_arrive(self, reservation: Reservation) -> bool:
        """Whether the call may still be on its way. By no clock that can be set, as far as that can be told.

        One of an earlier run was made before this one began, however far ahead the clock was that dated it.
        """
        now = time.monotonic()
        if (arrived_by := self._arrived_by.get(reservation.request_id)) is not None:
            return now < arrived_by
        longest_s = reservation.expires_at - reservation.reserved_at
        return self.ledger.clock() < reservation.expires_at and now < self._began + longest_s

    def _knows(self, reservation: Reservation) -> bool:
        return self.cloud is not None and self.cloud.identity == reservation.cloud


class Purchase:
    """One reservation, from the moment it is made. `aclose` it: what it has not concluded goes to the resolver."""

    def __init__(
        self,
        purchases: Purchases,
        cloud: CloudClient,
        request: ImageRequest,
        ceiling_micro_usd: int,
        timeout_s: float,
        deadline: float,
    ) -> None:
        self.timeout_s = timeout_s
        self._purchases = purchases
        self._cloud = cloud
        self._request = request
        self._key = request.request_id  # as ledger and cloud know it
        self._ceiling_micro_usd = ceiling_micro_usd
        self._deadline = deadline  # time.monotonic(), s
        self._sent = False
        self._concluded = False
        self._left = False  # whether its place is another's

    def images(self) -> CloudEvents:
        """The cloud's events, however slowly they are taken; the image comes when it is settled. Raises CloudError."""
        return _read_ahead(self._events())

    async def _events(self) -> CloudEvents:
        timeout_s = max(0.0, self._deadline - time.monotonic())
        calling = self._cloud.generate(self._request, self._ceiling_micro_usd, timeout_s, self._goes_out)
        async with aclosing(calling) as events:
            try:
                async for event in events:
                    if isinstance(event, CloudAccepted):
                        self._purchases.accepted(self._key)
                    if isinstance(event, CloudImage):
                        self._concluded = await self._purchases.settle(self._key, event.charged_micro_usd)
                        if self._concluded:  # its place is another's now, however slowly the image is read
                            self._leave()
                    yield event
            except CloudError as error:
                if error.never_ran:
                    self._concluded = await self._purchases.release(self._key)
                raise

    def _goes_out(self) -> None:
        self._sent = True

    async def aclose(self) -> None:
        """Give back what was never sent; hand what is of unknown outcome to the resolver."""
        try:
            if not self._sent and not self._concluded:
                self._concluded = await self._purchases.release(self._key)
        finally:
            if self._concluded:
                self._leave()
            else:
                self._purchases.hand_over(self._key, sent=self._sent)

    def _leave(self) -> None:
        """Once: after that its id may be under way anew, where its image is sent again."""
        if not self._left:
            self._left = True
            self._purchases.concluded(self._key)


class Redelivery(Purchase):
    """An image that is settled, once more: nothing is paid for it, and nothing is left to resolve."""

    async def _events(self) -> CloudEvents:
        timeout_s = max(0.0, self._deadline - time.monotonic())
        calling = self._cloud.generate(self._request, self._ceiling_micro_usd, timeout_s, redelivery=True)
        async with aclosing(calling) as events:
            try:
                async for event in events:
                    if isinstance(event, CloudImage):
                        self._leave()
                    yield event
            except CloudRefused as error:
                if error.price_micro_usd is not None:  # for making it, though it was made
                    raise CloudRefused(FORGOTTEN, never_ran=True, gone=True) from error
                raise

    async def aclose(self) -> None:
        """Another call may send it again."""
        self._leave()


def _asked(request: ImageRequest) -> str:
    """A digest of what decides the image: under one id a caller asks for one."""
    wanted = (
        request.prompt,
        request.negative_prompt,
        request.seed,
        request.size,
        request.steps,
        request.guidance_scale,
    )
    return hashlib.sha256(repr(wanted).encode()).hexdigest()[:32]


async def _read_ahead(events: CloudEvents) -> CloudEvents:
    """`events`, read as they come. Of progress that was not taken before the next one came only the newest is left.

    Else a caller who reads slowly would hold up the image, which is paid for, until the time for the call is over.
    """
    unread = deque[CloudAccepted | Progress | CloudImage]()
    news = asyncio.Event()

    async def read() -> None:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress) and unread and isinstance(unread[-1], Progress):
                    unread.pop()
                unread.append(event)
                news.set()

    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda _: news.set())
    try:
        while unread or not reading.done():
            if unread:
                yield unread.popleft()
            else:
                await news.wait()
                news.clear()
        reading.result()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
