"""The straight line: a prompt is read, a route decided, an image made. Start here."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from edge_agent import version
from edge_agent.bundle import LEARN, TAKE_UP
from edge_agent.cloud import SIDES, CloudClient
from edge_agent.cloud_image import CloudAccepted, CloudImage
from edge_agent.decider import Decider
from edge_agent.device import Device, Drawing, Drawn, Job
from edge_agent.diffusion.sessions import Stop
from edge_agent.diffusion.text_encoder import TextStates
from edge_agent.errors import (
    CloudError,
    CloudRefused,
    CloudUncalibrated,
    DuplicateRequest,
    LedgerError,
    QuotaExhausted,
)
from edge_agent.image import Progress, with_facts
from edge_agent.pacing import Pacing
from edge_agent.policy import Decision, Reason, Route
from edge_agent.purchase import Purchase, Purchases, Redelivery
from edge_agent.reader import Reading
from edge_agent.request import ImageRequest, Routing, validate
from edge_agent.resident import Resident
from edge_agent.tally import Tally
from edge_agent.track_record import SLOW_CONNECTION_S

Found = TypeVar("Found")

SHORT_READING_MS = 5.0
"""What is read this quickly is read in the event loop: turning to another thread and back takes a third of a
millisecond, and no call notices that the loop was away for so long."""

ASK_AGAIN_S = 60.0
"""A cloud with another model than the calibration's is asked at most this often whether it still has it."""

SHORT_PROMPT = 500
"""Characters up to which a prompt is taken to be read as quickly as the one before it."""


@dataclass(frozen=True)
class Terms:
    """What the settings say about generating. `max_price_micro_usd` is the most that one cloud image may cost."""

    max_price_micro_usd: int
    cloud_timeout_s: float
    png_facts: bool


@dataclass(frozen=True)
class Made:
    """An image as its maker delivers it."""

    png: bytes
    served_by: Route
    steps: int
    guidance_scale: float
    model_digest: str
    queue_position: int
    timings_ms: Mapping[str, float]
    cost_micro_usd: int = 0
    fallback_error: str = ""


@dataclass(frozen=True)
class Result:
    """The finished image with its facts. `made.png` is what the maker delivered, `png` what the caller gets."""

    request: ImageRequest
    decision: Decision
    made: Made
    png: bytes
    sha256: str
    timings_ms: Mapping[str, float]


class Agent:
    """Reader, policy, device and cloud, put in line. For one bundle's models: others get an agent of their own."""

    def __init__(
        self,
        models: Resident,
        device: Device,
        purchases: Purchases,
        terms: Terms,
        tally: Tally | None = None,
        pacing: Pacing | None = None,
    ) -> None:
        self.models = models
        self.reader = models.reader
        self.device = device
        self.purchases = purchases
        self.tally = tally or Tally()
        self._terms = terms
        self._pacing = pacing
        self.decider = Decider(self.reader, purchases, self.tally, terms.max_price_micro_usd, pacing)
        # Apart from the device's worker: a decision must not wait for the image before it.
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="reading")
        self._reading_ms = math.inf  # what the last one took
        self._nothing_negative: TextStates | None = None  # token states of the empty negative prompt
        self._asking: asyncio.Task[None] | None = None  # which model the cloud has
        self._ask_again_at = -math.inf  # time.monotonic(), s

    async def generate(self, request: ImageRequest) -> AsyncGenerator[Decision | Progress | Result, None]:
        """The decision, the progress of whoever makes the image, then the image. Closing the iterator stops all of it.

        Raises any RouteT2IError; of the cloud's only to callers who asked for the cloud alone.
        """
        began = time.perf_counter()
        request = validate(request, self.models.limits, draw_seed=partial(self.purchases.seed, request))
        purchase, failure = None, ""
        with self.models:
            reading, decision = await self._read(request)
            if request.named:
                decision, purchase = await self._redeliver(request, decision)
            if purchase is None:
                self._learn(request, decision)
                if decision.route == "cloud":
                    decision, purchase = await self._reserve(request, decision)
            if purchase is not None:
                async with aclosing(purchase):
                    yield decision
                    try:
                        async with aclosing(self._buy(purchase, decision)) as events:
                            async for event in events:
                                yield self._told(event, request, decision, began)
                        return
                    except CloudError as error:
                        failure = self._fall_back(request, error, purchase)
            with closing(await self._begin(request, reading)) as drawing:
                if purchase is None:
                    yield decision  # now, as telling takes a hundredth of a small image's time
                async with aclosing(self._draw(drawing, failure)) as events:
                    async for event in events:
                        yield self._told(event, request, decision, began)

    async def route(self, request: ImageRequest, *, explain: bool = False) -> Decision:
        """The decision alone, against the quota as it is now. Reserves nothing, calls nobody.

        With `explain` its tokens say what PRS would be without them, which reads the prompt once more for each.
        """
        request = validate(request, self.models.limits)
        with self.models:
            reading, decision = await self._read(request)
            if explain and self.decider.calibrated:
                # One by one, so that other decisions come between.
                decision = decision.explained(
                    [
                        await self._stoppably(self.reader.prs_without, reading.tokens, position)
                        for position in reading.tokens.own
                    ]
                )
        return decision

    async def advice(self) -> list[str]:
        """One sentence for each thing that keeps prompts unanswered, or from the cloud: what it is, and what to do."""
        calibration = self.reader.calibration
        found = [each for each in (self.models.fault, self.reader.advice) if each]
        if calibration is not None and not self.decider.cloud_fits:
            found.append(
                f"the cloud server runs model {self.tally.cloud_digest[:16]} and the calibration was made for "
                f"{calibration.cloud_digest[:16]}, so no prompt is routed: {LEARN} for that model, {TAKE_UP}; "
                "or start the cloud server with the other one, which the prompts after that notice"
            )
        if self.purchases.cloud is None:
            found.append(
                "no cloud server is configured, so every prompt stays on the edge: start with --cloud HOST:PORT"
            )
        elif self.decider.calibrated and self.reader.recent is not None and self.reader.recent.advice:
            found.append(self.reader.recent.advice)
        failure = self.tally.cloud_failure
        if failure is not None:
            found.append(
                f"{failure.message}; no image has come from it since: if it goes on, check {failure.check}"
            )
        with suppress(LedgerError):  # which is told next
            found += await self.purchases.advice(self.decider.max_price_micro_usd)
        if ledger_failure := self.purchases.ledger.failure:
            found.append(
                f"{ledger_failure}; until a call can be reserved again, prompts that are worth the cloud "
                "stay on the edge as quota_exhausted"
            )
        return found

    def succeeded_by(self, models: Resident) -> Agent:
        """An agent with other models and the same device, purchases and tally. This one ends what it has begun."""
        models.reader.succeed(self.reader)
        self.models.succeed(models)
        self.device.measure_anew()
        return Agent(models, self.device, self.purchases, self._terms, self.tally, self._pacing)

    def close(self) -> None:
        """Let go of the reading thread and the models' timer, and keep what is to outlive the process."""
        self._reading.shutdown(wait=False, cancel_futures=True)
        if self._pacing is not None:
            self._pacing.save()
        if self._asking is not None:
            self._asking.cancel()
        self.models.close()

    async def _stoppably(self, work: Callable[..., Found], *arguments: Any) -> Found:
        """What `work` returns, which reads a prompt, done in the reading thread while the event loop stays free. It
        ends early when its caller goes away, as others wait behind it.
        """
        stop = Stop()
        read = partial(work, *arguments, stop=stop)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reading, read)
        except asyncio.CancelledError:
            stop.set()
            raise

    async def _read(self, request: ImageRequest) -> tuple[Reading, Decision]:
        """The prompt considered: at once where that takes no longer than turning to another thread and back."""
        quick = self._reading_ms < SHORT_READING_MS and len(request.prompt) <= SHORT_PROMPT
        if quick and self.models.reads_at_once and self.purchases.ledger.at_hand:
            reading, decision = self.decider.consider(request)
        else:
            reading, decision = await self._stoppably(self.decider.consider, request)
        self._reading_ms = decision.timings_ms["total"]
        return reading, decision

    async def _redeliver(self, request: ImageRequest, decision: Decision) -> tuple[Decision, Purchase | None]:
        """The decision, unless this request has paid for its image before: then the cloud is to send that."""
        cloud, purchase = self.purchases.cloud, None
        if cloud is None or request.local_only or any(state.closed for state in decision.quota):
            return decision, None
        if cloud.record.healthy or request.routing is Routing.CLOUD_ONLY:
            with suppress(LedgerError):  # which the status tells, and so does reserving
                purchase = await self.purchases.redeliver(request, self._cloud_timeout_s(request))
        if purchase is not None:
            decision = decision._replace(route="cloud", reason=Reason.ALREADY_PAID)
        return decision, purchase

    async def _reserve(self, request: ImageRequest, decision: Decision) -> tuple[Decision, Purchase | None]:
        """The decision that stands, and what it bought: others may have taken what the quota allowed a moment ago."""
        began = time.perf_counter()
        # Meanwhile another may have begun to find out whether the cloud is back.
        route, reason = self.decider.verdict(request, decision.prs, decision.alpha, quota_allows=True)
        if route == "edge":
            return decision._replace(route=route, reason=reason), None
        purchase = None
        try:
            purchase = await self.purchases.reserve(
                request, self.decider.ceiling(request), self._cloud_timeout_s(request)
            )
        except (QuotaExhausted, LedgerError):
            if request.routing is Routing.CLOUD_ONLY:
                raise
            route, reason = self.decider.verdict(request, decision.prs, decision.alpha, quota_allows=False)
        try:
            # Not beside: the money is set aside, and prompts that came later would be read first.
            look = partial(self.decider.quota, request.app)
            quota = look() if self.purchases.ledger.at_hand else await asyncio.to_thread(look)
        except BaseException:
            if purchase is not None:
                await purchase.aclose()
            raise
        timings_ms = {**decision.timings_ms, "reserve": _ms_since(began)}
        timings_ms["total"] += timings_ms["reserve"]
        return decision._replace(route=route, reason=reason, quota=quota, timings_ms=timings_ms), purchase

    def _learn(self, request: ImageRequest, decision: Decision) -> None:
        """For later decisions: whether the cloud has its model back, and what the routing rate is a share of."""
        if decision.reason is Reason.UNCALIBRATED:
            self._ask_for_model()
        for save in self.decider.learn(request, decision):
            asyncio.get_running_loop().run_in_executor(self._reading, save)

    def _ask_for_model(self) -> None:
        """Where another model in the cloud is all that keeps prompts from it, ask whether it is still there.

        Beside the image, which the edge makes: only later decisions can profit.
        """
        cloud, now = self.purchases.cloud, time.monotonic()
        if cloud is None or not cloud.record.healthy or self.decider.cloud_fits or now < self._ask_again_at:
            return
        self._ask_again_at = now + ASK_AGAIN_S
        self._asking = asyncio.create_task(self._learn_model(cloud))

    async def _learn_model(self, cloud: CloudClient) -> None:
        with suppress(CloudError):
            self.tally.cloud_digest = await cloud.model_digest()

    async def _buy(self, purchase: Purchase, decision: Decision) -> AsyncGenerator[Progress | Made, None]:
        began = time.perf_counter()
        position, again = 0, isinstance(purchase, Redelivery)
        async with aclosing(purchase.images()) as events:
            async for event in events:
                if isinstance(event, CloudAccepted):
                    position = event.queue_position
                    if not again:  # else it is the model of then
                        self.tally.cloud_digest = event.model_digest
                    # Before it is paid for.
                    if decision.reason is Reason.PARETO_CLOUD and not self.decider.cloud_fits:
                        raise CloudUncalibrated(
                            f"the cloud server runs model {event.model_digest[:16]}, for which the calibration that "
                            "chose it was not made; `edge-agent status` says what to do",
                            never_ran=False,
                        )
                elif isinstance(event, CloudImage):
                    self.tally.delivered(None if again else event.charged_micro_usd)
                    stages_ms = {f"cloud_{stage}": spent for stage, spent in event.timings_ms.items()}
                    yield Made(
                        png=event.png,
                        served_by="cloud",
                        steps=event.steps,
                        guidance_scale=event.guidance_scale,
                        model_digest=event.model_digest,
                        queue_position=position,
                        timings_ms={"cloud": _ms_since(began)} | stages_ms,
                        cost_micro_usd=event.charged_micro_usd,
                    )
                else:
                    yield event

    def _fall_back(self, request: ImageRequest, error: CloudError, purchase: Purchase) -> str:
        """What the result says of the failure. Raises it where the caller wants the cloud or nothing."""
        # Like the caller's own terms, that says nothing of the cloud.
        gone = isinstance(purchase, Redelivery) and isinstance(error, CloudRefused) and error.gone
        if not (gone or isinstance(error, CloudUncalibrated) or self._own_terms(request, error, purchase)):
            self.tally.failed(error)
        if request.routing is Routing.CLOUD_ONLY:
            if gone:
                raise DuplicateRequest(
                    f"the image of the request id {request.request_id!r} was paid for and is not to be had; use a new "
                    f"one for a new image ({error.message})"
                ) from error
            raise error
        self.tally.fallbacks += 1
        return error.message

    async def _begin(self, request: ImageRequest, reading: Reading) -> Drawing:
        manifest = self.reader.bundle.manifest
        guidance = manifest.default_guidance if request.guidance_scale is None else request.guidance_scale
        job = Job(
            generator=self.models.generator,
            states=reading.states,
            negative_states=await self._negative_states(request, reading, guidance),
            seed=request.seed or 0,  # drawn by validate
            steps=self._steps(request),
            guidance_scale=guidance,
            size=request.size,
            previews=request.preview,
            deadline=request.deadline,
        )
        return self.device.begin(job)

    async def _draw(self, drawing: Drawing, failure: str) -> AsyncGenerator[Progress | Made, None]:
        async with aclosing(drawing.events()) as events:
            async for event in events:
                if isinstance(event, Drawn):
                    yield Made(
                        png=event.png,
                        served_by="edge",
                        steps=event.job.steps,
                        guidance_scale=event.job.guidance_scale,
                        model_digest=self.reader.bundle.model_digest,
                        queue_position=event.queue_position,
                        timings_ms=event.timings_ms,
                        fallback_error=failure,
                    )
                else:
                    yield event

    async def _negative_states(self, request: ImageRequest, reading: Reading, guidance: float) -> TextStates:
        generator = self.models.generator
        if not generator.denoiser.guides(guidance):
            return reading.states  # takes no part
        if request.negative_prompt:
            return await self._stoppably(generator.encode_negative, request.negative_prompt)
        if self._nothing_negative is None:
            self._nothing_negative = await self._stoppably(generator.encode_negative, "")
        return self._nothing_negative

    def _told(
        self, made: Progress | Made, request: ImageRequest, decision: Decision, began: float
    ) -> Progress | Result:
        """Progress as it is, the image with its facts."""
        if isinstance(made, Progress):
            return made
        png = with_facts(made.png, _facts(request, decision, made)) if self._terms.png_facts else made.png
        sha256 = hashlib.sha256(png).hexdigest()
        self.tally.served[made.served_by] += 1
        timings_ms = {**decision.timings_ms, **made.timings_ms, "total": _ms_since(began)}
        return Result(request, decision, made, png, sha256, timings_ms)

    def _own_terms(self, request: ImageRequest, error: CloudError, purchase: Purchase) -> bool:
        """Whether the caller's price, size, haste or prompt is what failed, which says nothing of the cloud."""
        cheap = odd = withheld = False
        if isinstance(error, CloudRefused):
            price, default = error.price_micro_usd, self.models.limits.sizes[0]
            ceiling, own = self.decider.ceiling(request), self.decider.max_price_micro_usd
            cheap = price is not None and ceiling < price <= own
            odd = error.field in SIDES and request.size != default
            withheld = error.withheld
        return cheap or odd or withheld or purchase.timeout_s < SLOW_CONNECTION_S

    def _steps(self, request: ImageRequest) -> int:
        return request.steps or self.reader.bundle.manifest.default_steps

    def _cloud_timeout_s(self, request: ImageRequest) -> float:
        """How long the cloud may take: within the deadline, and early enough for the edge to step in."""
        if request.deadline is None:
            return self._terms.cloud_timeout_s
        left = request.deadline - time.monotonic()
        if request.routing is not Routing.CLOUD_ONLY:
            own_s = self.device.expected_s(request.size, self._steps(request))
            left = min(max(left / 2, left - 2 * own_s), 0.9 * left)
        return min(self._terms.cloud_timeout_s, left)


def _facts(request: ImageRequest, decision: Decision, made: Made) -> dict[str, Any]:
    """What the image file says of its making. The same request to the same models gives the same file."""
    facts: dict[str, Any] = {"prompt": request.prompt}
    if request.negative_prompt:
        facts["negative_prompt"] = request.negative_prompt
    facts |= {
        "seed": request.seed,
        "steps": made.steps,
        "guidance_scale": f"{made.guidance_scale:g}",
        "route": made.served_by,
        "reason": decision.reason.value,
        "model_digest": made.model_digest,
    }
    if decision.prs is not None:
        facts["prs"] = f"{decision.prs:.6f}"
    return facts | {"Software": f"edge-agent {version()}"}


def _ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3
