"""EdgeAgentService: between the wire and the agent. The only module that turns one into the other."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import grpc

from edge_agent import version
from edge_agent.agent import Agent, Result
from edge_agent.budget import BudgetState
from edge_agent.diffusion.providers import State
from edge_agent.errors import (
    Cancelled,
    Draining,
    GenerationFailed,
    InvalidRequest,
    LedgerError,
    NotKept,
    NotLoaded,
    NotReady,
    OutOfMemory,
    RouteT2IError,
    StoreError,
    grpc_code,
    status_details,
)
from edge_agent.image import Progress
from edge_agent.log import events
from edge_agent.malformed import Malformed
from edge_agent.policy import Decision, Reason, Route
from edge_agent.quota import Reservation
from edge_agent.request import MAX_ID_CHARS, MEDIA_TYPE, ImageRequest, Privacy, Routing
from edge_agent.superiority import METRICS
from routet2i.edge.v1 import edge_pb2, edge_pb2_grpc
from routet2i.image.v1 import image_pb2

log = events(__name__)

CHUNK_BYTES = 65_536
"""Image bytes in one message; far below gRPC's 4 MiB, so that no image size matters."""

LAST_WORD_S = 1.0
"""How long a status may wait for a caller who does not read."""

STALLED_READER_S = 30.0
"""A caller that takes no message for so long is dropped, so that it cannot hold the device."""

LOADING_RETRY_S = 1.0
NO_MEMORY_RETRY_S = 1.0

ROUTES: Mapping[Route, edge_pb2.Route] = {"edge": edge_pb2.ROUTE_EDGE, "cloud": edge_pb2.ROUTE_CLOUD}
REASONS: Mapping[Reason, Any] = {
    reason: edge_pb2.DecisionReason.Value(f"DECISION_REASON_{reason.name}") for reason in Reason
}
PROVIDER_STATES: Mapping[State, Any] = {
    state: edge_pb2.ProviderState.Value(f"PROVIDER_STATE_{state.name}") for state in State
}
ROUTINGS = {
    edge_pb2.ROUTING_UNSPECIFIED: Routing.AUTO,
    edge_pb2.ROUTING_AUTO: Routing.AUTO,
    edge_pb2.ROUTING_LOCAL_ONLY: Routing.LOCAL_ONLY,
    edge_pb2.ROUTING_CLOUD_ONLY: Routing.CLOUD_ONLY,
}
PRIVACIES = {
    image_pb2.PRIVACY_UNSPECIFIED: Privacy.NORMAL,
    image_pb2.PRIVACY_NORMAL: Privacy.NORMAL,
    image_pb2.PRIVACY_LOCAL_ONLY: Privacy.LOCAL_ONLY,
}

Line = dict[str, Any]  # the fields of a request's log line
Wish = TypeVar("Wish")


class EdgeAgentService(edge_pb2_grpc.EdgeAgentServiceServicer):
    """The service. The daemon sets `agent` once the models are loaded, and `draining` when it shuts down.

    `reload` takes up a model by its name in `models_folder()`, by an empty one what is chosen, and returns its agent.
    `doubt` is told when an image or a decision failed on this device.
    """

    def __init__(
        self,
        reload: Callable[[str], Awaitable[Agent]],
        models_folder: Callable[[], Awaitable[str]],
        doubt: Callable[[], None],
    ) -> None:
        self._reload = reload
        self._models_folder = models_folder
        self._doubt = doubt
        self.agent: Agent | None = None
        self.draining = False
        self._handlers: set[asyncio.Task[Any]] = set()  # of Generate and Route calls that have not ended
        self._cut_off = False
        self._started = time.monotonic()

    async def Generate(self, request: edge_pb2.GenerateRequest, context: Any) -> None:  # type: ignore[override]
        """Routes the prompt and makes the image; see the .proto file. Writes to the context, so that a
        cancellation reaches it at every step.
        """
        line: Line = {"rpc": "Generate"}
        async with self._counted(), self._call(request, context, line) as agent:
            line |= _who(request.image)
            wish = _image_request(request.image, request.routing, context, preview=request.preview)
            line |= _who(wish)
            if wish.resume_offset > 0:
                raise NotKept(
                    "the edge keeps no images; ask for the whole one, with resume_offset 0",
                    field="resume_offset",
                )
            async with aclosing(agent.generate(wish)) as events:
                async for event in events:
                    if isinstance(event, Decision):
                        line |= _account(event)
                        if event.route == "cloud":  # which knows the call by this id
                            line["purchase"] = agent.purchases.key(wish)
                        decision = _decision(event, agent)
                        await _write(context, edge_pb2.GenerateResponse(decision=decision))
                    elif isinstance(event, Progress):
                        progress = image_pb2.Progress(
                            step=event.step, steps=event.steps, preview=event.preview
                        )
                        await _write(context, edge_pb2.GenerateResponse(progress=progress))
                    else:
                        line |= _outcome(event)
                        await _write_image(context, event, agent)

    async def Route(self, request: edge_pb2.RouteRequest, context: Any) -> edge_pb2.RouteResponse:
        """Only the decision."""
        line: Line = {"rpc": "Route"}
        async with self._counted(), self._call(request, context, line) as agent:
            line |= _who(request.image)
            wish = _image_request(request.image, request.routing, context)
            line |= _who(wish)
            decision = await agent.route(wish, explain=request.explain)
            line |= _account(decision)
            return edge_pb2.RouteResponse(decision=_decision(decision, agent))

    async def GetQuota(self, request: edge_pb2.GetQuotaRequest, context: Any) -> edge_pb2.GetQuotaResponse:
        """The budgets and what is left of them."""
        async with self._call(request, context, {"rpc": "GetQuota"}) as agent:
            ledger = agent.purchases.ledger
            states = await asyncio.to_thread(ledger.states, request.app or None)
            rates = await asyncio.to_thread(ledger.rates)
            return edge_pb2.GetQuotaResponse(
                budgets=map(_budget, states),
                rates=[
                    edge_pb2.RateState(
                        name=rate.name,
                        max_calls=rate.max_calls,
                        per_seconds=rate.per_seconds,
                        calls=rate.calls,
                    )
                    for rate in rates
                ],
            )

    async def ListModels(
        self,
        request: edge_pb2.ListModelsRequest,
        context: Any,
    ) -> edge_pb2.ListModelsResponse:
        """The local model and what is known of the cloud's, without asking it."""
        async with self._call(request, context, {"rpc": "ListModels"}) as agent:
            facts = agent.reader.bundle.manifest
            models = [
                edge_pb2.Model(
                    side=edge_pb2.ROUTE_EDGE,
                    name=facts.name,
                    digest=agent.reader.bundle.model_digest,
                    licence=facts.licence,
                    width=facts.width,
                    height=facts.height,
                    steps=facts.steps,
                    default_steps=facts.default_steps,
                    default_guidance_scale=facts.default_guidance,
                    price_micro_usd=0,
                    sizes=[edge_pb2.ImageSize(width=width, height=height) for width, height in facts.sizes],
                )
            ]
            cloud, digest = agent.purchases.cloud, _cloud_digest(agent)
            if cloud is not None or digest:
                name = cloud.address if cloud is not None else "not configured"
                models.append(edge_pb2.Model(side=edge_pb2.ROUTE_CLOUD, name=name, digest=digest))
            return edge_pb2.ListModelsResponse(models=models)

    async def GetStatus(
        self,
        request: edge_pb2.GetStatusRequest,
        context: Any,
    ) -> edge_pb2.GetStatusResponse:
        """What the daemon is doing, and what to do when it is not routing."""
        async with self._call(request, context, {"rpc": "GetStatus"}) as agent:
            reader, cloud = agent.reader, agent.purchases.cloud
            quota = await asyncio.to_thread(agent.decider.quota, "")  # of apps without a budget of their own
            unresolved = list[Reservation]()
            with suppress(LedgerError):  # the agent's advice says so
                unresolved = await asyncio.to_thread(agent.purchases.ledger.unresolved)
            return edge_pb2.GetStatusResponse(
                version=version(),
                uptime_seconds=time.monotonic() - self._started,
                bundle=str(reader.bundle.folder),
                edge_model_digest=reader.bundle.model_digest,
                cloud_model_digest=_cloud_digest(agent),
                calibration_id=reader.calibration_id,
                calibrated=agent.decider.calibrated,
                routing_rate=reader.routing_rate,
                alpha=agent.decider.alpha(quota, agent.decider.max_price_micro_usd),
                cloud_address=cloud.address if cloud is not None else "",
                cloud_health=_cloud_health(agent),
                queue_length=agent.device.waiting,
                max_queue=agent.device.max_queue,
                served_by_edge=agent.tally.served["edge"],
                served_by_cloud=agent.tally.served["cloud"],
                fallbacks=agent.tally.fallbacks,
                unresolved_reservations=len(unresolved),
                advice=await agent.advice(),
                providers=[
                    edge_pb2.Provider(
                        name=each.name,
                        state=PROVIDER_STATES[each.state],
                        reason=each.reason,
                    )
                    for each in agent.models.providers
                ],
                loaded=agent.models.loaded,
                loaded_since=agent.models.since,
                keep_alive_seconds=agent.models.keep_alive_s,
                predecessors=agent.models.predecessors,
                models_folder=await self._models_folder(),
                paced_rate=agent.decider.paced_rate(quota, agent.decider.max_price_micro_usd),
            )

    async def ReloadModel(
        self,
        request: edge_pb2.ReloadModelRequest,
        context: Any,
    ) -> edge_pb2.ReloadModelResponse:
        """Takes up another model; see the .proto file."""
        async with self._call(request, context, {"rpc": "ReloadModel"}):
            if request.model and not await self._models_folder():
                raise StoreError(
                    "this daemon serves the --bundle that it was started with, and no other model"
                )
            agent = await self._reload(request.model)
            return edge_pb2.ReloadModelResponse(
                bundle=str(agent.reader.bundle.folder),
                edge_model_digest=agent.reader.bundle.model_digest,
                calibrated=agent.decider.calibrated,
            )

    @property
    def in_flight(self) -> int:
        """Generate and Route calls that have not ended."""
        return len(self._handlers)

    async def idle(self) -> None:
        """Returns once no Generate or Route call is in flight."""
        while self._handlers:
            await asyncio.wait(self._handlers)

    def cut_off(self) -> None:
        """Ends the Generate and Route calls in flight; their callers are told that the daemon was stopped."""
        self._cut_off = True
        for handler in self._handlers:
            handler.cancel()

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        handler = asyncio.current_task()
        assert handler is not None  # noqa: S101  # a coroutine runs in a task
        self._handlers.add(handler)
        try:
            yield
        finally:
            self._handlers.discard(handler)

    def _admitted(self, request: Any) -> Agent:
        """Who serves the request. Raises InvalidRequest, Draining or NotReady where nobody does."""
        if isinstance(request, Malformed):
            raise InvalidRequest(f"the request cannot be read: {request.reason}; text must be valid UTF-8")
        if self.draining:
            raise Draining("the daemon is shutting down and takes no new requests")
        if self.agent is None:
            raise NotReady("the models are still loading; try again shortly", retry_after_s=LOADING_RETRY_S)
        return self.agent

    @asynccontextmanager
    async def _call(self, request: Any, context: Any, line: Line) -> AsyncIterator[Agent]:
        """Hands out the agent, turns errors into statuses, and writes the call's one log line."""
        began, loop = time.perf_counter(), asyncio.get_running_loop()
        line["outcome"] = "OK"
        try:
            yield self._admitted(request)
        except (RouteT2IError, MemoryError) as raised:
            error = raised if isinstance(raised, RouteT2IError) else _out_of_memory()
            if isinstance(error, (GenerationFailed, NotLoaded)):
                self._doubt()
            # As the caller is told it: cut where it repeats a long field.
            line |= {"outcome": grpc_code(error).name, "error": status_details(error).message}
            await _abort(context, error)
        except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit) as error:
            line["outcome"] = "CANCELLED"
            if not self._cut_off or not isinstance(error, asyncio.CancelledError):
                raise
            # gRPC's own words for a server that stops tell nobody what to do.
            stopped = Draining("the daemon was stopped before it was done; call again once it is started")
            line |= {"outcome": grpc_code(stopped).name, "error": stopped.message}
            await _abort(context, stopped)
        # A panic in a native library is no Exception, and the caller must be told of it.
        except BaseException as error:
            line["outcome"] = "INTERNAL"
            log.exception("a bug in the daemon ended a call")
            await _abort(context, error)
        finally:
            line["elapsed_ms"] = round((time.perf_counter() - began) * 1e3, 1)
            write = partial(log.info, "call", **line)
            if loop.is_closed():  # and the call is ended with it
                write()
            else:  # once the status is on its way: nobody waits for a line in a log
                loop.call_soon(write)


def _out_of_memory() -> OutOfMemory:
    """In place of Python's own MemoryError, which says nothing."""
    return OutOfMemory(
        "this device is out of memory; free some, or choose a smaller model", retry_after_s=NO_MEMORY_RETRY_S
    )


async def _abort(context: Any, error: BaseException) -> None:
    status = status_details(error)
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    try:
        # The status waits behind what the caller has not read yet.
        with _patience(LAST_WORD_S):
            await context.abort(grpc_code(error), status.message, details)
    except (grpc.aio.InternalError, TimeoutError):
        raise asyncio.CancelledError from None  # nobody is left to be told


async def _write_image(context: Any, result: Result, agent: Agent) -> None:
    for start in range(0, len(result.png), CHUNK_BYTES):
        chunk = image_pb2.ImageChunk(offset=start, data=result.png[start : start + CHUNK_BYTES])
        await _write(context, edge_pb2.GenerateResponse(image_chunk=chunk))
    await _write(context, edge_pb2.GenerateResponse(result=_result(result, agent)))


async def _write(context: Any, response: edge_pb2.GenerateResponse) -> None:
    try:
        with _patience(STALLED_READER_S):
            await context.write(response)
    except TimeoutError:
        raise Cancelled(
            f"the caller read nothing for {STALLED_READER_S:.0f} s; read the stream as it comes"
        ) from None
    except grpc.aio.InternalError as error:  # the write and the caller's leaving crossed
        raise Cancelled("the caller went away") from error


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Raises TimeoutError where the block takes longer.

    Not `wait_for`: before Python 3.12 it swallows a cancellation that meets the end of what it waits for, and its task
    costs more turns of the event loop than a message.
    """
    task, passed = asyncio.current_task(), False
    assert task is not None  # noqa: S101  # a coroutine runs in a task

    def give_up() -> None:
        nonlocal passed
        passed = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, give_up)
    try:
        yield
    except asyncio.CancelledError:
        if not passed:
            raise
        raise TimeoutError from None
    finally:
        timer.cancel()


def _image_request(
    image: image_pb2.ImageRequest, routing: int, context: Any, *, preview: bool = False
) -> ImageRequest:
    def optional(name: str) -> Any:
        return getattr(image, name) if image.HasField(name) else None

    remaining_s: float | None = context.time_remaining()
    return ImageRequest(
        request_id=image.request_id or uuid.uuid4().hex,
        app=image.app or "default",
        prompt=image.prompt,
        negative_prompt=image.negative_prompt,
        seed=optional("seed"),
        width=optional("width"),
        height=optional("height"),
        steps=optional("steps"),
        guidance_scale=optional("guidance_scale"),
        media_type=image.media_type or MEDIA_TYPE,
        privacy=_known(PRIVACIES, image.privacy, "privacy"),
        routing=_known(ROUTINGS, routing, "routing"),
        max_price_micro_usd=optional("max_price_micro_usd"),
        preview=preview,
        traceparent=image.traceparent,
        resume_offset=image.resume_offset,
        deadline=None if remaining_s is None else time.monotonic() + remaining_s,
        named=bool(image.request_id),
    )


def _known(table: Mapping[Any, Wish], value: int, field: str) -> Wish:
    if value not in table:
        raise InvalidRequest(
            f"this daemon does not know {field} {value}; is it older than the caller?", field=field
        )
    return table[value]


def _decision(decision: Decision, agent: Agent) -> edge_pb2.Decision:
    reader = agent.reader
    told = edge_pb2.Decision(
        route=ROUTES[decision.route],
        reason=REASONS[decision.reason],
        prs=decision.prs,
        alpha=decision.alpha,
        quota=map(_budget, decision.quota),
        timings=_timings(decision.timings_ms),
        edge_model_digest=reader.bundle.model_digest,
        cloud_model_digest=reader.calibrated_for,
        calibration_id=reader.calibration_id,
        prompt_truncated=decision.prompt_truncated,
        unfamiliar=decision.unfamiliar,
    )
    _add_metrics(told.edge_quality, decision.edge_quality)
    _add_metrics(told.cloud_quality, decision.cloud_quality)
    for token in decision.tokens:
        _add_metrics(told.tokens.add(text=token.text, prs_without=token.prs_without).pull, token.pull)
    return told


def _result(result: Result, agent: Agent) -> edge_pb2.Result:
    request, made = result.request, result.made
    info = image_pb2.ImageInfo(
        sha256=result.sha256,
        total_bytes=len(result.png),
        media_type=MEDIA_TYPE,
        width=request.width,
        height=request.height,
        seed=request.seed,
        steps=made.steps,
        guidance_scale=made.guidance_scale,
        model_digest=made.model_digest,
    )
    return edge_pb2.Result(
        request_id=request.request_id,
        image=info,
        served_by=ROUTES[made.served_by],
        fallback=bool(made.fallback_error),
        fallback_error=made.fallback_error,
        cost_micro_usd=made.cost_micro_usd,
        timings=_timings(result.timings_ms),
        edge_model_digest=agent.reader.bundle.model_digest,
        cloud_model_digest=made.model_digest if made.served_by == "cloud" else "",
        queue_position=made.queue_position,
    )


def _add_metrics(told: Any, values: Sequence[float]) -> None:
    """In place: a decision is made of hundreds of these messages, and of a list each would be copied."""
    for name, value in zip(METRICS[: len(values)], values, strict=True):  # no values where no predictor ran
        told.add(name=name, value=value)


def _budget(state: BudgetState) -> edge_pb2.BudgetState:
    return edge_pb2.BudgetState(
        name=state.name,
        window=state.window,
        cap_micro_usd=state.cap_micro_usd,
        spent_micro_usd=state.spent_micro_usd,
        reserved_micro_usd=state.reserved_micro_usd,
        remaining_micro_usd=state.remaining_micro_usd,
        app=state.app or "",
    )


def _timings(timings_ms: Mapping[str, float]) -> list[image_pb2.Timing]:
    return [image_pb2.Timing(stage=stage, milliseconds=value) for stage, value in timings_ms.items()]


def _cloud_digest(agent: Agent) -> str:
    return agent.tally.cloud_digest or agent.reader.calibrated_for


def _cloud_health(agent: Agent) -> edge_pb2.CloudHealth:
    cloud = agent.purchases.cloud
    if cloud is None:
        return edge_pb2.CLOUD_HEALTH_NOT_CONFIGURED
    failure = agent.tally.cloud_failure
    if not cloud.record.healthy or (failure is not None and failure.shut_out):
        return edge_pb2.CLOUD_HEALTH_UNREACHABLE
    tried = agent.tally.cloud_digest or agent.tally.served["cloud"]  # one that is sent again tells no digest
    return edge_pb2.CLOUD_HEALTH_HEALTHY if tried else edge_pb2.CLOUD_HEALTH_UNTRIED


def _who(request: image_pb2.ImageRequest | ImageRequest) -> Line:
    """What it says of these, which on the wire may be nothing. Cut to what a valid request may have, as this is logged
    before the request is checked.
    """
    names = {name: getattr(request, name)[:MAX_ID_CHARS] for name in ("request_id", "app", "traceparent")}
    return {name: said for name, said in names.items() if said}


def _account(decision: Decision) -> Line:
    line: Line = {"route": decision.route, "reason": decision.reason.value}
    if decision.prs is not None and decision.alpha is not None:
        line |= {"prs": round(decision.prs, 4), "alpha": round(decision.alpha, 4)}
    line |= {f"{budget.name}_left_micro_usd": budget.remaining_micro_usd for budget in decision.quota}
    return line | _rounded(decision.timings_ms)


def _outcome(result: Result) -> Line:
    made = result.made
    line: Line = {"served_by": made.served_by, "cost_micro_usd": made.cost_micro_usd, "sha256": result.sha256}
    if made.fallback_error:
        line["fallback_error"] = made.fallback_error
    return line | _rounded(result.timings_ms)


def _rounded(timings_ms: Mapping[str, float]) -> Line:
    return {f"{stage}_ms": round(value, 1) for stage, value in timings_ms.items()}
