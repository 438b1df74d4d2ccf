"""Decides where a prompt's image is made: by what is read of it, and by the cloud and the quota as they stand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from edge_agent.budget import BudgetState
from edge_agent.diffusion.sessions import Stop
from edge_agent.errors import LedgerError
from edge_agent.pacing import Pacing
from edge_agent.policy import Decision, Reason, Route, decide
from edge_agent.purchase import Purchases
from edge_agent.reader import Reader, Reading
from edge_agent.request import ImageRequest, Routing
from edge_agent.tally import Tally


class Decider:
    """The policy, told what it asks for. Reserves nothing and calls nobody. Its methods may wait for the ledger's disk;
    all but `learn` are safe to call from several threads.
    """

    def __init__(
        self,
        reader: Reader,
        purchases: Purchases,
        tally: Tally,
        max_price_micro_usd: int,
        pacing: Pacing | None = None,
    ) -> None:
        """`max_price_micro_usd` is the most that one cloud image may cost; a request may ask for less. With `pacing` no
        larger share of prompts than the budgets can pay for goes to the cloud.
        """
        self.max_price_micro_usd = max_price_micro_usd
        self._reader = reader
        self._purchases = purchases
        self._tally = tally
        self._pacing = pacing

    @property
    def calibrated(self) -> bool:
        """Whether PRS and alpha mean something for the two models in use, as far as they are known."""
        return self._reader.alpha is not None and self.cloud_fits

    @property
    def cloud_fits(self) -> bool:
        """Whether the cloud has the model that the calibration was made for, as far as either is known."""
        calibration, digest = self._reader.calibration, self._tally.cloud_digest
        return not digest or calibration is None or calibration.cloud_digest == digest

    def consider(self, request: ImageRequest, stop: Stop | None = None) -> tuple[Reading, Decision]:
        """The prompt read, and where it goes; `stop` ends it early. Raises what Reader.read and `verdict` raise."""
        reading = self._reader.read(request.prompt, stop)
        began = time.perf_counter()
        quota, allowed = self.quota(request.app), self._quota_allows(request)
        alpha = self.alpha(quota, self.ceiling(request))  # once, as it may move
        route, reason = self.verdict(request, reading.prs, alpha, quota_allows=allowed)
        stages_ms = {"decide": (time.perf_counter() - began) * 1e3}
        return reading, reading.decision(route, reason, alpha, quota, stages_ms)

    def verdict(
        self, request: ImageRequest, prs: float | None, alpha: float | None, *, quota_allows: bool
    ) -> tuple[Route, Reason]:
        """The policy's, as the cloud stands now. Raises PolicyConflict."""
        cloud, available = self._purchases.cloud, None
        if cloud is not None:
            available = cloud.record.lets_through(request.size, self.ceiling(request))
        return decide(
            prs,
            alpha,
            routing=request.routing,
            privacy=request.privacy,
            cloud_available=available,
            quota_allows=quota_allows,
        )

    def ceiling(self, request: ImageRequest) -> int:
        """The most that this request's image may cost in the cloud, in micro-dollars."""
        own = self.max_price_micro_usd
        return own if request.max_price_micro_usd is None else min(own, request.max_price_micro_usd)

    def quota(self, app: str) -> tuple[BudgetState, ...]:
        """The budgets that count for `app` as they stand; none where the ledger cannot tell."""
        try:
            return self._purchases.ledger.states(app)
        except LedgerError:  # only an account is lost; an image on the edge costs nothing
            return ()

    def alpha(self, quota: Sequence[BudgetState], ceiling_micro_usd: int) -> float | None:
        """Prompts with PRS below it are worth the cloud: alpha of the routing rate, or of the one that the budgets can
        pay for. Not of the latter where one of them has no room at all: what is worth the cloud must be told so. None
        where PRS means nothing.
        """
        recent = self._reader.recent
        if recent is None or not self.calibrated:
            return None
        rate = self.paced_rate(quota, ceiling_micro_usd)
        if rate is None or rate >= recent.routing_rate:
            return recent.alpha
        now = self._purchases.ledger.clock()
        full = any(state.refusal(ceiling_micro_usd, now) for state in quota)
        return recent.alpha if full else recent.alpha_for(rate)

    def paced_rate(self, quota: Sequence[BudgetState], ceiling_micro_usd: int) -> float | None:
        """The largest share of prompts that these budgets can pay for, where they are paced, with images at no more
        than `ceiling_micro_usd`.
        """
        if self._pacing is None:
            return None
        last = self._tally.price_micro_usd
        price = ceiling_micro_usd if last is None else min(ceiling_micro_usd, last)
        return self._pacing.rate(quota, price, self._purchases.ledger.clock(), ceiling_micro_usd)

    def learn(self, request: ImageRequest, decision: Decision) -> list[Callable[[], None]]:
        """Count the prompt among those that the routing rate is a share of, which may go to the cloud and need not.
        Returns what it is time to save, each in any thread.
        """
        recent, pacing = self._reader.recent, self._pacing
        free = request.routing is Routing.AUTO and not request.local_only
        if not free or decision.prs is None or recent is None:
            return []
        due = []
        if recent.add(decision.prs):
            due.append(recent.save)
        if pacing is not None and pacing.add(request.app, self._purchases.ledger.clock()):
            due.append(pacing.save)
        return due

    def _quota_allows(self, request: ImageRequest) -> bool:
        try:
            allowed = self._purchases.ledger.allows(request.app, self.ceiling(request))
        except LedgerError:  # the status says why
            return False
        return allowed and not self._purchases.full
