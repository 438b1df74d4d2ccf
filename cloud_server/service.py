"""CloudServerService: turns wire messages into domain objects and back, which is done here alone."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc

from cloud_server.admission import Admission
from cloud_server.credentials import Credentials
from cloud_server.errors import (
    GRPC_CODES,
    AlreadyExists,
    CallerGone,
    CloudServerError,
    InvalidRequest,
    JournalError,
    NotKept,
    OffsetPastEnd,
    PriceAboveCeiling,
    Unavailable,
    grpc_status,
)
from cloud_server.generator import Generator, Step
from cloud_server.journal import Finished, Journal, State
from cloud_server.log import events
from cloud_server.malformed import Malformed
from cloud_server.request import (
    MAX_NAME_CHARACTERS,
    MEDIA_TYPE,
    Limits,
    Spec,
    Wish,
    check,
    check_request_id,
    validate,
)
from cloud_server.stream import Stream
from routet2i.cloud.v1 import cloud_pb2, cloud_pb2_grpc
from routet2i.image.v1 import image_pb2

log = events("cloud_server")

CHUNK_BYTES = 65_536  # of image data in one message; far below gRPC's 4 MiB, so that no image size matters
MOST_SENT_AGAIN = 4  # kept images of one tenant at a time: each is in memory until its caller has read it
ABORT_S = 1.0  # what a status gets to leave: behind a message that nobody reads it never would
STOPPED = (
    "the server was stopped before it was done; call again with the same request_id once it is started: nothing is "
    "charged twice"
)
JOURNAL_RETRY_S = 60.0  # for a person to free some of the disk
LOADING_RETRY_S = 2.0  # what RetryInfo says while the model is loading

STATES = {
    State.RUNNING: cloud_pb2.GENERATION_STATE_RUNNING,
    State.FINISHED: cloud_pb2.GENERATION_STATE_FINISHED,
    State.FAILED: cloud_pb2.GENERATION_STATE_FAILED,
    State.CANCELLED: cloud_pb2.GENERATION_STATE_CANCELLED,
}

Line = dict[str, Any]  # the fields of a request's log line
Known = TypeVar("Known")


@dataclass(frozen=True)
class Serving:
    """The loaded model and what it serves."""

    generator: Generator
    limits: Limits


class CloudServerService(cloud_pb2_grpc.CloudServerServiceServicer):
    """The service. The server sets `serving` once the model is loaded, and `draining` when it shuts down."""

    def __init__(
        self, *, price_micro_usd: int, admission: Admission, journal: Journal, credentials: Credentials
    ) -> None:
        self.price_micro_usd = price_micro_usd
        self.admission = admission
        self.serving: Serving | None = None
        self.draining = False
        self._handlers: set[asyncio.Task[Any]] = set()  # of Generate calls that have not ended
        self._cut_off = False
        self._journal = journal
        self._credentials = credentials
        self._sending_again = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(MOST_SENT_AGAIN))
        # Its thread is there from the start: where no more can be had, what began is still ended.
        self._clerk = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._clerk.submit(int).result()

    async def _generate(
        self, tenant: str, wish: Wish, preview: bool, remaining_s: float | None, line: Line, stream: Stream
    ) -> None:
        """The whole request: one image, made or sent again."""
        arrived = time.perf_counter()
        check(wish)
        timings: dict[str, float] = {}
        if (finished := await self._finished(tenant, wish)) is not None:  # which needs no model
            line["replayed"] = True
            await stream.send(_accepted(0, finished.charged_micro_usd, finished.model_digest))
            async with self._place_among_replays(tenant, stream):
                finished = await self._kept(tenant, wish)
                await self._deliver(finished, wish, arrived, timings, line, stream)
            return
        serving = self._serving()
        spec = validate(wish, serving.limits, drawn_seed=secrets.randbelow(2**32))
        digest, price = serving.generator.model.digest, self.price_micro_usd
        if wish.max_price_micro_usd is not None and price > wish.max_price_micro_usd:
            raise PriceAboveCeiling(
                f"an image costs {price} micro-USD here, above the ceiling of {wish.max_price_micro_usd}: "
                "raise max_price_micro_usd or stay on the edge",
                facts={"price_micro_usd": str(price)},
            )
        shape = (*spec.shape, preview)  # decoding one takes longer than many a step
        # Nothing in here waits for the caller, or one that reads slowly would keep the model from all others.
        async with (
            self.admission.enter(tenant, shape, spec.steps, remaining_s) as ticket,
            self._running(tenant, wish),
            stream.kept_open(),
        ):
            stream.tell(_accepted(ticket.position, price, digest))
            await ticket.turn.wait()
            stream.check()  # it may have read nothing while it waited
            timings["queue"] = time.perf_counter() - arrived
            async with aclosing(serving.generator.generate(spec, preview)) as events:
                async for event in events:
                    if isinstance(event, Step):
                        ticket.steps_left = event.steps - event.step
                        stream.tell(_progress(event))
                    else:
                        image = event
            if image.step_s is not None:
                self.admission.record(shape, image.step_s)
            timings |= {"generate": image.generate_s, "png": image.png_s}
            finished = Finished(price, image.sha256, digest, spec, image.png)
            finishing = self._journaled(self._journal.finish, tenant, wish.request_id, finished)
            try:
                await asyncio.shield(finishing)
            finally:  # also whoever leaves at this moment is charged
                await asyncio.wait([finishing])
                if finishing.exception() is None:
                    line["charged_micro_usd"] = price
        await self._deliver(finished, wish, arrived, timings, line, stream)

    async def _deliver(
        self,
        finished: Finished,
        wish: Wish,
        arrived: float,
        timings: dict[str, float],
        line: Line,
        stream: Stream,
    ) -> None:
        """The image, from the wanted byte, and its result."""
        png = finished.image or b""
        for offset in range(wish.resume_offset, len(png), CHUNK_BYTES):
            await stream.send(_chunk(offset, png[offset : offset + CHUNK_BYTES]))
        timings["total"] = time.perf_counter() - arrived
        line |= {"sha256": finished.sha256} | {
            f"{stage}_ms": round(s * 1e3, 1) for stage, s in timings.items()
        }
        await stream.send(_result(wish.request_id, finished, timings))

    async def Generate(  # type: ignore[override]  # writes to the context, so that a cancellation reaches it
        self, request: cloud_pb2.GenerateRequest, context: Any
    ) -> None:
        """Makes one image, or sends a kept one again; see the .proto file."""
        line: Line = {"rpc": "Generate"}
        if not isinstance(request, Malformed):
            line |= _claimed(request.image.request_id)
        async with self._counted(), self._call(request, context, line) as tenant:
            line |= _who(request.image)  # not before: the log is not for strangers to fill
            wish = _wish(request.image)
            with closing(Stream(context)) as stream:
                await self._generate(tenant, wish, request.preview, context.time_remaining(), line, stream)

    async def GetModel(
        self,
        request: cloud_pb2.GetModelRequest,
        context: Any,
    ) -> cloud_pb2.GetModelResponse:
        """What is served here, and for how much."""
        async with self._call(request, context, {"rpc": "GetModel"}):
            serving = self._serving()
            model, limits = serving.generator.model, serving.limits
            default = (limits.width, limits.height)
            others = [size for size in limits.sizes or () if size != default]
            return cloud_pb2.GetModelResponse(
                model_digest=model.digest,
                name=model.name,
                licence=model.licence,
                sizes=[cloud_pb2.ImageSize(width=w, height=h) for w, h in (default, *others)],
                default_steps=limits.steps,
                max_steps=limits.max_steps,
                default_guidance_scale=limits.guidance_scale,
                price_micro_usd=self.price_micro_usd,
                queue_length=self.admission.waiting,
                max_queue=self.admission.max_queue,
            )

    async def LookupGeneration(
        self, request: cloud_pb2.LookupGenerationRequest, context: Any
    ) -> cloud_pb2.LookupGenerationResponse:
        """What became of a request id; answers across restarts, and before the model is loaded."""
        line: Line = {"rpc": "LookupGeneration"}
        if not isinstance(request, Malformed):
            line |= _claimed(request.request_id)
        async with self._call(request, context, line) as tenant:
            request_id = request.request_id
            line["request_id"] = request_id[:MAX_NAME_CHARACTERS]
            check_request_id(request_id)
            entry = await self._journaled(partial(self._journal.find, with_image=False), tenant, request_id)
            if entry is None:
                unknown = cloud_pb2.GENERATION_STATE_UNKNOWN
                return cloud_pb2.LookupGenerationResponse(request_id=request_id, state=unknown)
            finished = entry.finished
            return cloud_pb2.LookupGenerationResponse(
                request_id=request_id,
                state=STATES[entry.state],
                charged=finished is not None,
                charged_micro_usd=finished.charged_micro_usd if finished else 0,
                sha256=finished.sha256 if finished else "",
            )

    @property
    def in_flight(self) -> int:
        """Generate calls that have not ended."""
        return len(self._handlers)

    async def idle(self) -> None:
        """Returns once no Generate call is in flight."""
        while self._handlers:
            await asyncio.wait(self._handlers)

    def cut_off(self) -> None:
        """Ends the Generate calls in flight at their next step; their callers are told that the server was stopped."""
        self._cut_off = True
        for handler in self._handlers:
            handler.cancel()

    def close(self) -> None:
        """Ends the thread that writes to the journal; no call is in flight any more."""
        self._clerk.shutdown()

    def _journaled(self, work: Callable[..., Known], *arguments: Any) -> asyncio.Future[Known]:
        """What `work` on the journal comes to, after what was asked of it before."""
        return asyncio.get_running_loop().run_in_executor(self._clerk, work, *arguments)

    def _serving(self) -> Serving:
        """What makes the images. Raises Unavailable where nothing does now."""
        if self.draining:
            raise Unavailable("the server is shutting down and takes no new requests")
        if self.serving is None:
            raise Unavailable("the model is still loading; try again shortly", retry_after_s=LOADING_RETRY_S)
        return self.serving

    @asynccontextmanager
    async def _place_among_replays(self, tenant: str, stream: Stream) -> AsyncIterator[None]:
        places = self._sending_again[tenant]
        async with stream.kept_open():
            await places.acquire()
        try:
            yield
        finally:
            places.release()

    async def _finished(self, tenant: str, wish: Wish) -> Finished | None:
        """What this request id has made already, without the image; None: it is to be made."""
        entry = await self._journaled(partial(self._journal.find, with_image=False), tenant, wish.request_id)
        if entry is not None and entry.state is State.RUNNING:  # before it could be told that nothing runs
            raise AlreadyExists(
                "this request_id is being made; ask LookupGeneration for its outcome",
                facts={"state": entry.state.value},
            )
        if entry is None or entry.finished is None:
            if wish.resume_offset:
                raise NotKept("no image of this request_id is kept, so there is no rest to send")
            return None
        if entry.fingerprint != _fingerprint(wish):
            raise AlreadyExists(
                "this request_id made another image; use a new one for each image",
                facts=_outcome(entry.finished),
            )
        return entry.finished

    async def _kept(self, tenant: str, wish: Wish) -> Finished:
        """The image of a finished request id, to be sent from the wanted byte."""
        entry = await self._journaled(self._journal.find, tenant, wish.request_id)
        assert entry is not None and entry.finished is not None  # noqa: S101  # they stay for a year
        finished = entry.finished
        if finished.image is None:
            if wish.resume_offset:
                raise NotKept("no image of this request_id is kept, so there is no rest to send")
            raise AlreadyExists(
                "this request_id has made its image, which is no longer kept. It was charged once and will "
                "not be charged again; use a new request_id for a new image",
                facts=_outcome(finished),
            )
        if wish.resume_offset > len(finished.image):
            raise OffsetPastEnd(
                f"the image has {len(finished.image)} bytes; resume_offset {wish.resume_offset} is past them",
                field="resume_offset",
            )
        return finished

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        handler = asyncio.current_task()
        assert handler is not None  # noqa: S101  # a coroutine runs in a task
        self._handlers.add(handler)
        try:
            yield
        finally:
            self._handlers.discard(handler)

    @asynccontextmanager
    async def _running(self, tenant: str, wish: Wish) -> AsyncIterator[None]:
        """Journals the block as running and, unless it finished, how it ended."""
        journal, request_id = self._journal, wish.request_id
        # Cancelling the wait does not stop the thread: both writes are shielded, and the second follows the first.
        beginning = self._journaled(journal.begin, tenant, request_id, _fingerprint(wish))
        try:
            await asyncio.shield(beginning)
            yield
        except BaseException as error:
            failed = isinstance(error, Exception) and not isinstance(error, CallerGone)
            state = State.FAILED if failed else State.CANCELLED
            await asyncio.wait([beginning])
            if beginning.exception() is None:
                await asyncio.shield(self._journaled(journal.end, tenant, request_id, state))
            elif isinstance(error, JournalError):  # so that nothing ran
                raise Unavailable(error.message, retry_after_s=JOURNAL_RETRY_S) from error
            raise

    @asynccontextmanager
    async def _call(self, request: Any, context: Any, line: Line) -> AsyncIterator[str]:
        """Names the tenant, turns errors into statuses, and writes the call's one log line."""
        began = time.perf_counter()
        line["outcome"] = "OK"
        try:
            metadata = dict(context.invocation_metadata() or ())
            tenant = line["tenant"] = self._credentials.tenants.identify(metadata.get("authorization"))
            if isinstance(request, Malformed):
                raise InvalidRequest(
                    f"the request cannot be read: {request.reason}; text must be valid UTF-8"
                )
            yield tenant
        except CloudServerError as error:
            line |= {"outcome": GRPC_CODES[type(error)].name, "error": error.message}
            line |= {"cause": error.log_only} if error.log_only else {}
            status = grpc_status(error)
            trailing = (("grpc-status-details-bin", status.SerializeToString()),)
            await _abort(context, GRPC_CODES[type(error)], status.message, trailing)
        except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit) as error:
            line["outcome"] = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
            if not self._cut_off or not isinstance(error, asyncio.CancelledError):
                raise
            # Without details, by which an edge would take it that nothing ran: some of them are charged already.
            line |= {"outcome": grpc.StatusCode.UNAVAILABLE.name, "error": STOPPED}
            await _abort(context, grpc.StatusCode.UNAVAILABLE, STOPPED)
        # A panic in a native library is no Exception, and the caller must be told of it.
        except BaseException:
            line["outcome"] = "INTERNAL"
            log.exception("a bug in the server ended a call")
            await _abort(
                context, grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"
            )
        finally:
            line["elapsed_ms"] = round((time.perf_counter() - began) * 1e3, 1)
            log.info("call", **line)


async def _abort(
    context: Any, code: grpc.StatusCode, message: str, trailing: tuple[tuple[str, bytes], ...] = ()
) -> None:
    loop, call = asyncio.get_running_loop(), asyncio.current_task()
    assert call is not None  # noqa: S101  # a coroutine runs in a task
    patience = loop.call_later(ABORT_S, call.cancel)
    try:
        await context.abort(code, message, trailing)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None  # nobody is left to be told
    finally:
        patience.cancel()


def _claimed(request_id: str) -> Line:
    """What the log says of a call before it is known whose it is: its id, by which a refused edge finds it, and only
    what can be one.
    """
    with suppress(InvalidRequest):
        check_request_id(request_id)
        return {"request_id": request_id}
    return {}


def _who(image: image_pb2.ImageRequest) -> Line:
    """What the log says of a request that is not validated yet, so not all of a long field."""
    line: Line = {"request_id": image.request_id, "app": image.app or "default"}
    if image.traceparent:
        line["traceparent"] = image.traceparent
    return {name: value[:MAX_NAME_CHARACTERS] for name, value in line.items()}


def _wish(image: image_pb2.ImageRequest) -> Wish:
    def optional(name: str) -> Any:
        return getattr(image, name) if image.HasField(name) else None

    return Wish(
        request_id=image.request_id,
        app=image.app,
        prompt=image.prompt,
        negative_prompt=image.negative_prompt,
        seed=optional("seed"),
        width=optional("width"),
        height=optional("height"),
        steps=optional("steps"),
        guidance_scale=optional("guidance_scale"),
        media_type=image.media_type,
        # Also what a later version of the wire may call a privacy: it is no wish to be sent here.
        local_only=image.privacy not in (image_pb2.PRIVACY_UNSPECIFIED, image_pb2.PRIVACY_NORMAL),
        max_price_micro_usd=optional("max_price_micro_usd"),
        resume_offset=image.resume_offset,
    )


def _fingerprint(wish: Wish) -> str:
    """SHA-256 of what decides the pixels. One request id with two fingerprints is a caller's mistake."""
    wanted = [
        wish.prompt,
        wish.negative_prompt,
        wish.seed,
        wish.width,
        wish.height,
        wish.steps,
        wish.guidance_scale,
    ]
    return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()


def _outcome(finished: Finished) -> dict[str, str]:
    return {"charged_micro_usd": str(finished.charged_micro_usd), "sha256": finished.sha256}


def _accepted(position: int, price: int, digest: str) -> cloud_pb2.GenerateResponse:
    accepted = cloud_pb2.Accepted(queue_position=position, charged_micro_usd=price, model_digest=digest)
    return cloud_pb2.GenerateResponse(accepted=accepted)


def _progress(step: Step) -> cloud_pb2.GenerateResponse:
    progress = image_pb2.Progress(step=step.step, steps=step.steps, preview=step.preview)
    return cloud_pb2.GenerateResponse(progress=progress)


def _chunk(offset: int, data: bytes) -> cloud_pb2.GenerateResponse:
    return cloud_pb2.GenerateResponse(image_chunk=image_pb2.ImageChunk(offset=offset, data=data))


def _result(request_id: str, finished: Finished, timings: dict[str, float]) -> cloud_pb2.GenerateResponse:
    spec: Spec = finished.spec
    info = image_pb2.ImageInfo(
        sha256=finished.sha256,
        total_bytes=len(finished.image or b""),
        media_type=MEDIA_TYPE,
        width=spec.width,
        height=spec.height,
        seed=spec.seed,
        steps=spec.steps,
        guidance_scale=spec.guidance_scale,
        model_digest=finished.model_digest,
    )
    return cloud_pb2.GenerateResponse(
        result=cloud_pb2.Result(
            request_id=request_id,
            image=info,
            charged_micro_usd=finished.charged_micro_usd,
            timings=[image_pb2.Timing(stage=stage, milliseconds=s * 1e3) for stage, s in timings.items()],
        )
    )
