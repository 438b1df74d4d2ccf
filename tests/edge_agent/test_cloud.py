"""What the cloud sends is believed only as far as it can be checked, and an error says whether anything ran.

Against a real gRPC server on a real loopback socket, which misbehaves as each test tells it to.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import math
import shutil
import socket
import ssl
import struct
import subprocess
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edge_agent import cloud_image
from edge_agent.address import is_local
from edge_agent.cloud import (
    MAX_MESSAGE_BYTES,
    MOST_RESUMES,
    SLOW_ANSWER_S,
    CloudClient,
    Outcome,
)
from edge_agent.cloud_image import MAX_PREVIEW_BYTES, CloudAccepted, CloudImage
from edge_agent.errors import CloudError, CloudLied, CloudRefused, CloudUnavailable
from edge_agent.image import Progress
from edge_agent.request import ImageRequest, Privacy, Routing
from edge_agent.track_record import SLOW_CONNECTION_S
from routet2i.cloud.v1 import cloud_pb2, cloud_pb2_grpc
from routet2i.image.v1 import image_pb2
from tests import http2
from tests.running import counted, until

REQUEST = ImageRequest(
    request_id="r-1", prompt="two cats on a beach", app="camera", seed=7, width=64, height=64, traceparent=""
)
CEILING = 40_000
PRICE = 30_000

Response = cloud_pb2.GenerateResponse


def headless() -> bytes:
    """An image that decodes, with a note before its header."""
    whole = png()
    note = b"tEXtnote\0x"
    return (
        whole[:8] + struct.pack(">I", len(note) - 4) + note + struct.pack(">I", zlib.crc32(note)) + whole[8:]
    )


def png(width: int = 64, height: int = 64, image_format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def moving() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("L", (64, 64), shade) for shade in (0, 255)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    return file.getvalue()


def accepted(price: int = PRICE, digest: str = "ab" * 32) -> Response:
    return Response(
        accepted=cloud_pb2.Accepted(queue_position=2, charged_micro_usd=price, model_digest=digest)
    )


def progress(step: int, preview: bytes | None = None, steps: int = 3) -> Response:
    return Response(progress=image_pb2.Progress(step=step, steps=steps, preview=preview))


def chunk(offset: int, data: bytes) -> Response:
    return Response(image_chunk=image_pb2.ImageChunk(offset=offset, data=data))


def chunks(data: bytes) -> list[Response]:
    return [chunk(offset, data[offset : offset + 65_536]) for offset in range(0, len(data), 65_536)]


def result(
    data: bytes,
    *,
    sha256: str | None = None,
    charged: int = PRICE,
    request_id: str = "r-1",
    side: int = 64,
    digest: str = "ab" * 32,
    seed: int = 7,
    steps: int = 3,
    guidance_scale: float = 2.5,
) -> Response:
    info = image_pb2.ImageInfo(
        sha256=sha256 or hashlib.sha256(data).hexdigest(),
        total_bytes=len(data),
        media_type="image/png",
        width=side,
        height=side,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        model_digest=digest,
    )
    timings = [image_pb2.Timing(stage="generate", milliseconds=12.5)]
    return Response(
        result=cloud_pb2.Result(request_id=request_id, image=info, charged_micro_usd=charged, timings=timings)
    )


def honest(data: bytes) -> list[Response]:
    return [accepted(), progress(1), progress(2, png(32, 32)), progress(3), *chunks(data), result(data)]


@dataclass
class Cloud(cloud_pb2_grpc.CloudServerServiceServicer):
    """A cloud server that plays back a script, and keeps what it received."""

    # Responses; a callable is awaited with the context. A function of the request gives them for each call.
    script: list[Any] | Callable[[cloud_pb2.GenerateRequest], list[Any]] = field(default_factory=list)
    digest: str = "cd" * 32
    no_model: Callable[..., Any] | None = None  # awaited with the context of a question for it
    answer: cloud_pb2.LookupGenerationResponse = field(default_factory=cloud_pb2.LookupGenerationResponse)
    received: list[cloud_pb2.GenerateRequest] = field(default_factory=list)
    metadata: dict[str, str | bytes] = field(default_factory=dict)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    address: str = ""
    connections: int = 0
    open: int = 0  # of the connections

    async def Generate(
        self, request: cloud_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Response]:
        self.received.append(request)
        self.started.set()
        self.metadata = dict(context.invocation_metadata() or ())
        try:
            for step in self.script(request) if callable(self.script) else self.script:
                if callable(step):
                    await step(context)
                else:
                    yield step
        # The others are what comes of a write that the caller's leaving crosses.
        except (asyncio.CancelledError, grpc.aio.InternalError, GeneratorExit):
            self.cancelled.set()
            raise

    async def GetModel(
        self, request: cloud_pb2.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> cloud_pb2.GetModelResponse:
        self.metadata = dict(context.invocation_metadata() or ())
        if self.no_model is not None:
            await self.no_model(context)
        return cloud_pb2.GetModelResponse(model_digest=self.digest)

    async def LookupGeneration(
        self,
        request: cloud_pb2.LookupGenerationRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> cloud_pb2.LookupGenerationResponse:
        if not self.answer.request_id:
            self.answer.request_id = request.request_id
        return self.answer


@pytest.fixture
async def cloud() -> AsyncIterator[Cloud]:
    async with counted(Cloud()) as cloud:
        yield cloud


async def collect(
    client: CloudClient, request: ImageRequest = REQUEST, *, timeout_s: float = 20.0
) -> list[CloudAccepted | Progress | CloudImage]:
    return [event async for event in client.generate(request, CEILING, timeout_s)]


async def failure(
    client: CloudClient, request: ImageRequest = REQUEST, *, timeout_s: float = 20.0
) -> CloudError:
    with pytest.raises(CloudError) as failed:
        await collect(client, request, timeout_s=timeout_s)
    return failed.value


def abort(
    code: grpc.StatusCode,
    text: str,
    *,
    details: bool = True,
    retry_after_s: int = 0,
    garbled: bool = False,
    detail: Message | None = None,
) -> Callable[..., Any]:
    """Ends the call with this code; with `details`, as cloud servers do, and otherwise as gRPC itself does."""

    async def step(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if not details:
            await context.abort(code, text)
        status = Status(code=code.value[0], message=text)
        if retry_after_s:
            retry = RetryInfo()
            retry.retry_delay.seconds = retry_after_s
            status.details.add().Pack(retry)
        if detail is not None:
            status.details.add().Pack(detail)
        if garbled:
            status.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff\xff\xff")
        await context.abort(code, text, (("grpc-status-details-bin", status.SerializeToString()),))

    return step


async def stall(_: object) -> None:
    await asyncio.sleep(60)


# A cloud that keeps its word


async def test_an_image_arrives_with_its_progress_and_its_facts(cloud: Cloud) -> None:
    data = png(200, 200)
    assert len(data) > 65_536
    cloud.script = [
        accepted(),
        progress(1),
        progress(2, data),
        *chunks(data),
        result(data, side=200),
    ]
    events = await collect(CloudClient(cloud.address), REQUEST._replace(width=200, height=200, preview=True))
    assert events[:3] == [
        CloudAccepted(2, PRICE, "ab" * 32),
        Progress(1, 3, None),
        Progress(2, 3, data),
    ]
    assert events[3] == CloudImage(
        png=data,
        steps=3,
        guidance_scale=2.5,
        model_digest="ab" * 32,
        charged_micro_usd=PRICE,
        timings_ms={"generate": 12.5},
    )


async def test_the_cloud_receives_what_it_needs_and_not_the_app(cloud: Cloud) -> None:
    cloud.script = honest(png())
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    asked = REQUEST._replace(negative_prompt="blurry", guidance_scale=2.5, preview=True, traceparent=trace)
    await collect(CloudClient(cloud.address, token="sesame"), asked)
    (received,) = cloud.received
    assert received.preview
    assert received.image == image_pb2.ImageRequest(
        request_id="r-1",
        prompt="two cats on a beach",
        negative_prompt="blurry",
        seed=7,
        width=64,
        height=64,
        guidance_scale=2.5,
        media_type="image/png",
        privacy=image_pb2.PRIVACY_NORMAL,
        max_price_micro_usd=CEILING,
        traceparent=trace,
    )
    assert not received.image.HasField("steps")  # the caller did not say: the cloud model has its own default
    assert cloud.metadata["authorization"] == "Bearer sesame"


@pytest.mark.parametrize("private", [{"privacy": Privacy.LOCAL_ONLY}, {"routing": Routing.LOCAL_ONLY}])
async def test_a_private_prompt_is_not_sent_even_when_asked(cloud: Cloud, private: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="may not leave the device"):
        await collect(CloudClient(cloud.address), REQUEST._replace(**private))
    assert cloud.received == []


async def test_no_connection_exists_before_the_first_call_nor_after_the_last(cloud: Cloud) -> None:
    client = CloudClient(cloud.address)
    assert client.record.healthy
    await asyncio.sleep(0.2)
    assert cloud.connections == 0
    cloud.script = honest(png())
    await collect(client)
    assert cloud.connections == 1
    await client.close()
    error = await failure(client)
    assert error.never_ran
    assert cloud.connections == 1


# A cloud that lies


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ([accepted(), *chunks(png()), result(png(), sha256="0" * 64)], "sha256"),
        ([accepted(), *chunks(b"no image at all"), result(b"no image at all")], "not a PNG"),
        ([accepted(), *chunks(png()[:-2_000]), result(png()[:-2_000])], "not a PNG"),
        ([accepted(), *chunks(png(image_format="JPEG")), result(png(image_format="JPEG"))], "not a PNG"),
        ([accepted(), result(b"")], "not a PNG"),
        ([accepted(), *chunks(headless()), result(headless())], "does not begin with IHDR"),
        ([accepted(), *chunks(moving()), result(moving())], "is animated"),
        ([accepted(), *chunks(png(32, 64)), result(png(32, 64))], "32x64 pixels instead of 64x64"),
        ([accepted(), *chunks(png(64, 32)), result(png(64, 32))], "64x32 pixels instead of 64x64"),
        # No pixel of another size is unpacked: there could be more of them than the memory holds.
        ([accepted(), *chunks(png(32, 64)[:-2_000]), result(png(32, 64)[:-2_000])], "32x64 pixels instead"),
        ([accepted(), chunk(0, b"12"), chunk(3, b"4")], "byte 3 where byte 2 is due"),
        ([accepted(), chunk(0, b"12"), chunk(0, b"12")], "byte 0 where byte 2 is due"),
        ([accepted(), *chunks(png()), result(png(), request_id="r-2")], "another request's"),
        ([accepted(), *chunks(png()), result(png(), charged=PRICE + 1)], "charged 30001"),
        ([accepted(), *chunks(png()), result(png(), charged=-1)], "charged -1"),
        ([accepted(digest="\x1b[31mX")], "not 64 hex digits"),
        ([accepted(digest="ab" * 32 + "\x1b[31m")], "not 64 hex digits"),
        ([accepted(), *chunks(png()), result(png(), digest="cd" * 32)], "another model"),
        ([accepted(), *chunks(png()), result(png(), seed=8)], "another seed"),
        ([accepted(), *chunks(png()), result(png(), steps=4)], "another number of steps"),
        ([accepted(), *chunks(png()), result(png(), guidance_scale=2.6)], "another guidance scale"),
        ([accepted(), *chunks(png()), result(png(), guidance_scale=math.nan)], "another guidance scale"),
        ([accepted(CEILING + 1)], "price is 40001"),
        ([accepted(-5)], "price is -5"),
        ([accepted(), accepted()], "sent accepted where it may not"),
        ([progress(1)], "sent progress where it may not"),
        ([*chunks(png()), result(png())], "sent image_chunk where it may not"),
    ],
)
async def test_a_lie_is_found_and_named_and_the_call_ended(
    cloud: Cloud, script: list[Response], says: str
) -> None:
    cloud.script = [*script, stall]
    error = await failure(CloudClient(cloud.address), REQUEST._replace(steps=3, guidance_scale=2.5))
    assert isinstance(error, CloudLied), error
    assert says in error.message
    assert "BytesIO" not in error.message
    assert not error.never_ran
    await asyncio.wait_for(cloud.cancelled.wait(), 5)


@pytest.mark.parametrize(
    "then", [[accepted(digest="none"), stall], [accepted(), abort(grpc.StatusCode.INTERNAL, "")], [stall]]
)
async def test_a_failure_that_is_kept_keeps_no_connection(cloud: Cloud, then: list[Any]) -> None:
    """At the latest once garbage is collected, which grpcio 1.83 would need for each call."""
    cloud.script = then
    kept = [await failure(CloudClient(cloud.address), timeout_s=0.5) for _ in range(3)]

    def closed() -> bool:
        gc.collect()
        return cloud.open == 0

    await until(closed, timeout_s=5)
    assert cloud.connections >= len(kept)


@pytest.mark.parametrize("guidance_scale", [math.nan, math.inf])
async def test_facts_that_were_left_to_the_cloud_have_to_be_numbers(
    cloud: Cloud, guidance_scale: float
) -> None:
    cloud.script = [accepted(), *chunks(png()), result(png(), guidance_scale=guidance_scale)]
    assert "another guidance scale" in (await failure(CloudClient(cloud.address))).message
    cloud.script = honest(png())
    assert await collect(CloudClient(cloud.address))


async def test_previews_that_nobody_asked_for_are_not_passed_on_nor_is_what_is_none(cloud: Cloud) -> None:
    large = png(300, 300)  # of noise
    assert len(large) > MAX_PREVIEW_BYTES
    steps = [
        progress(1, png()),
        progress(1, b"<script>"),
        progress(2, large),
        progress(0),
        progress(9),
        progress(0, steps=0),
    ]
    cloud.script = [accepted(), *steps, *chunks(png()), result(png())]
    for preview, first in ((False, None), (True, png())):
        _, *told, image = await collect(CloudClient(cloud.address), REQUEST._replace(preview=preview))
        assert told == [Progress(1, 3, first), Progress(1, 3, None), Progress(2, 3, None)]
        assert isinstance(image, CloudImage)


async def test_timings_of_stages_that_there_are_not_and_what_is_no_time_are_not_passed_on(
    cloud: Cloud,
) -> None:
    told = result(png())
    for stage, milliseconds in (
        ("\x1b[31m", 1.0),
        ("total", 2.0),
        ("queue", -1.0),
        ("queue", math.nan),
        ("png", math.inf),
    ):
        told.result.timings.add(stage=stage, milliseconds=milliseconds)
    cloud.script = [accepted(), *chunks(png()), told]
    *_, image = await collect(CloudClient(cloud.address))
    assert isinstance(image, CloudImage) and image.timings_ms == {"generate": 12.5}


async def test_an_image_may_be_as_large_as_its_pixels_make_it(cloud: Cloud) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    file = io.BytesIO()
    note = PngInfo()
    note.add_text("note", "x" * 2**19)
    Image.fromarray(noise).save(file, "PNG", pnginfo=note)
    cloud.script = [accepted(), *chunks(file.getvalue()), result(file.getvalue())]
    assert await collect(CloudClient(cloud.address))
    note.add_text("more", "x" * 2**20)
    Image.fromarray(noise).save(file, "PNG", pnginfo=note)
    cloud.script = [accepted(), *chunks(file.getvalue()), result(file.getvalue())]
    error = await failure(CloudClient(cloud.address))
    assert isinstance(error, CloudLied) and "exceeds 1081344 bytes" in error.message


async def test_an_image_larger_than_any_image_is_cut_off(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_image, "MAX_IMAGE_BYTES", 2**20)
    sent = 0

    async def flood(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        nonlocal sent
        while True:
            await context.write(chunk(sent, bytes(65_536)))
            sent += 65_536

    cloud.script = [accepted(), flood]
    error = await failure(CloudClient(cloud.address))
    assert isinstance(error, CloudLied)
    assert "exceeds 1048576 bytes" in error.message
    await asyncio.wait_for(cloud.cancelled.wait(), 5)
    assert sent < 2**24


async def test_a_prompt_longer_than_the_cloud_takes_is_a_refusal_and_has_not_run(cloud: Cloud) -> None:
    """Where its settings allow less than those of the edge. gRPC takes four megabytes unless it is told otherwise."""
    error = await failure(CloudClient(cloud.address), REQUEST._replace(prompt="x" * 5_000_000))
    assert isinstance(error, CloudRefused) and error.never_ran
    assert "takes no prompt of that length" in error.message and cloud.received == []


@pytest.mark.parametrize("before", [[], [accepted()]])
async def test_a_message_larger_than_any_message_is_a_lie_and_may_have_run(
    cloud: Cloud, before: list[Response]
) -> None:
    cloud.script = [*before, chunk(0, bytes(MAX_MESSAGE_BYTES + 1))]
    error = await failure(CloudClient(cloud.address))
    assert isinstance(error, CloudLied)
    assert "sent too much" in error.message
    assert not error.never_ran


# A cloud that refuses


@pytest.mark.parametrize(
    ("code", "kind", "never_ran"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, CloudRefused, True),
        (grpc.StatusCode.INVALID_ARGUMENT, CloudRefused, True),
        (grpc.StatusCode.UNAUTHENTICATED, CloudRefused, True),
        (grpc.StatusCode.PERMISSION_DENIED, CloudRefused, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, CloudUnavailable, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, CloudUnavailable, True),
        (grpc.StatusCode.UNAVAILABLE, CloudUnavailable, True),
        (grpc.StatusCode.ALREADY_EXISTS, CloudRefused, False),
        (grpc.StatusCode.NOT_FOUND, CloudRefused, False),
        (grpc.StatusCode.INTERNAL, CloudUnavailable, False),
        (grpc.StatusCode.UNKNOWN, CloudUnavailable, False),
        (grpc.StatusCode.CANCELLED, CloudUnavailable, False),
    ],
)
async def test_a_refusal_before_accepting_says_whether_anything_ran(
    cloud: Cloud, code: grpc.StatusCode, kind: type[CloudError], never_ran: bool
) -> None:
    cloud.script = [abort(code, "not today")]
    error = await failure(CloudClient(cloud.address))
    assert type(error) is kind
    assert "not today" in error.message
    assert error.never_ran is never_ran


@pytest.mark.parametrize("code", [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE])
async def test_what_a_cloud_says_cannot_take_over_the_terminal(cloud: Cloud, code: grpc.StatusCode) -> None:
    cloud.script = [abort(code, "\x1b[2Jno\nedge-agent: é")]
    message = (await failure(CloudClient(cloud.address))).message
    assert "?[2Jno edge-agent: é" in message and message.isprintable()


@pytest.mark.parametrize("code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE])
async def test_the_same_refusals_after_accepting_leave_the_outcome_open(
    cloud: Cloud, code: grpc.StatusCode
) -> None:
    cloud.script = [accepted(), abort(code, "withheld")]
    assert not (await failure(CloudClient(cloud.address))).never_ran


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ],
)
async def test_a_code_that_grpc_itself_may_have_made_leaves_the_outcome_open(
    cloud: Cloud, code: grpc.StatusCode
) -> None:
    cloud.script = [abort(code, "who said this?", details=False)]
    assert not (await failure(CloudClient(cloud.address))).never_ran


async def test_a_time_to_wait_that_cannot_be_read_is_none(cloud: Cloud) -> None:
    cloud.script = [abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "64 are waiting", garbled=True)]
    error = await failure(CloudClient(cloud.address))
    assert (error.retry_after_s, error.never_ran) == (None, True)


async def test_a_cloud_that_wants_to_be_left_alone_for_ever_is_for_a_minute(cloud: Cloud) -> None:
    cloud.script = [abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "never again", retry_after_s=2**63 - 1)]
    assert (await failure(CloudClient(cloud.address))).retry_after_s == 60.0


async def test_a_full_cloud_is_left_alone_for_as_long_as_it_asks(cloud: Cloud) -> None:
    now = 100.0
    client = CloudClient(cloud.address, monotonic=lambda: now)
    cloud.script = [abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "64 are waiting", retry_after_s=7)]
    error = await failure(client)
    assert (error.retry_after_s, error.never_ran, client.record.healthy) == (7.0, True, False)
    now = 106.9
    assert not client.record.healthy
    now = 107.0
    assert client.record.healthy


async def test_a_price_that_is_too_high_is_known_for_a_minute(cloud: Cloud) -> None:
    now = 100.0
    client = CloudClient(cloud.address, monotonic=lambda: now)
    assert client.record.affordable(0)
    refusal = ErrorInfo(reason="PRICE_ABOVE_CEILING", metadata={"price_micro_usd": str(CEILING + 1)})
    cloud.script = [abort(grpc.StatusCode.FAILED_PRECONDITION, "too dear", detail=refusal)]
    error = await failure(client)
    assert error.never_ran and "it asks $0.0" in error.message and "--max-price" in error.message
    assert client.record.healthy and (
        client.record.affordable(CEILING),
        client.record.affordable(CEILING + 1),
    ) == (False, True)
    now = 160.0
    assert client.record.affordable(CEILING)


async def test_the_price_of_an_image_is_known_for_a_minute_and_a_new_one_counts_at_once(cloud: Cloud) -> None:
    now = 100.0
    client = CloudClient(cloud.address, monotonic=lambda: now)
    for price in (CEILING, 10):
        cloud.script = [accepted(price), *chunks(png()), result(png(), charged=price)]
        await collect(client)
        assert (client.record.affordable(price - 1), client.record.affordable(price)) == (False, True)


async def test_a_size_that_the_cloud_does_not_make_is_known_for_a_minute(cloud: Cloud) -> None:
    now = 100.0
    client = CloudClient(cloud.address, monotonic=lambda: now)
    assert client.record.makes(REQUEST.size)
    for blamed, known in (("prompt", True), ("height", False)):
        violation = BadRequest.FieldViolation(field=blamed, description="not here")
        refusal = BadRequest(field_violations=[violation])
        cloud.script = [abort(grpc.StatusCode.INVALID_ARGUMENT, "not here", detail=refusal)]
        assert (await failure(client)).never_ran
        assert client.record.makes(REQUEST.size) is known
    assert client.record.healthy and client.record.makes(REQUEST._replace(width=96).size)
    now = 160.0
    assert client.record.makes(REQUEST.size)


@pytest.mark.parametrize("price", ["", "much", "9" * 5000, "-1"])
async def test_a_price_that_is_none_says_nothing(cloud: Cloud, price: str) -> None:
    client = CloudClient(cloud.address)
    refusal = ErrorInfo(reason="PRICE_ABOVE_CEILING", metadata={"price_micro_usd": price})
    cloud.script = [abort(grpc.StatusCode.FAILED_PRECONDITION, "too dear", detail=refusal)]
    assert "too dear" in (await failure(client)).message
    assert client.record.affordable(0)


async def test_a_cloud_that_refuses_the_token_is_left_alone_for_a_while(cloud: Cloud) -> None:
    now = 100.0
    client = CloudClient(cloud.address, monotonic=lambda: now)
    for pause in (1.0, 2.0, 4.0):
        cloud.script = [abort(grpc.StatusCode.UNAUTHENTICATED, "no such token")]
        assert isinstance(await failure(client), CloudRefused)
        assert not client.record.healthy
        now += pause
        assert client.record.healthy
    cloud.script = [abort(grpc.StatusCode.INVALID_ARGUMENT, "too many steps")]
    await failure(client)
    assert client.record.healthy


# A cloud that fails


async def test_a_stream_that_ends_early_is_no_image_whatever_its_status_says(cloud: Cloud) -> None:
    cloud.script = [accepted(), chunk(0, png()[:100])]
    error = await failure(CloudClient(cloud.address))
    assert isinstance(error, CloudUnavailable)
    assert "broke off after 100 bytes" in error.message
    assert not error.never_ran


def in_pieces(data: bytes, size: int, *then: Any) -> Callable[[cloud_pb2.GenerateRequest], list[Any]]:
    """Of a cloud that keeps the image: each call brings so many bytes, then what ends it, the last one the rest."""

    def script(request: cloud_pb2.GenerateRequest) -> list[Any]:
        offset = request.image.resume_offset
        piece, whole = data[offset : offset + size], offset + size >= len(data)
        return [accepted(), chunk(offset, piece), *([result(data)] if whole else then)]

    return script


@pytest.mark.parametrize("then", [(), (abort(grpc.StatusCode.UNAVAILABLE, "reset", details=False),)])
async def test_the_rest_of_an_image_that_broke_off_is_asked_for(cloud: Cloud, then: tuple[Any, ...]) -> None:
    """It is paid for once its first byte comes, and every call for the rest is told of once."""
    data = png()
    cloud.script = in_pieces(data, len(data) // 3 + 1, *then)
    events = await collect(CloudClient(cloud.address))
    assert [type(event) for event in events] == [CloudAccepted, CloudImage]
    assert isinstance(events[-1], CloudImage) and events[-1].png == data
    assert len(cloud.received) == 3
    (first, *rest) = [call.image.resume_offset for call in cloud.received]
    assert first == 0 and rest == sorted(set(rest)) and rest[0] > 0


@pytest.mark.parametrize("charged", [PRICE, 0])
async def test_an_image_of_which_no_byte_came_is_asked_for_where_the_cloud_says_it_is_made(
    cloud: Cloud, charged: int
) -> None:
    """A small image is one message, of which gRPC gives nothing where it is cut."""
    data = png()
    calls = iter([[accepted()], honest(data)])
    cloud.script = lambda _: next(calls)
    finished = cloud_pb2.GENERATION_STATE_FINISHED
    cloud.answer = cloud_pb2.LookupGenerationResponse(state=finished, charged=True, charged_micro_usd=charged)
    events = await collect(CloudClient(cloud.address))
    assert [type(event) for event in events if not isinstance(event, Progress)] == [
        CloudAccepted,
        CloudImage,
    ]
    assert isinstance(events[-1], CloudImage) and events[-1].png == data


async def test_a_cloud_that_does_not_say_whether_an_image_is_made_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The edge, which could begin to draw, waits meanwhile."""

    class Silent(Cloud):
        async def LookupGeneration(self, *_: Any) -> cloud_pb2.LookupGenerationResponse:
            await asyncio.sleep(60)
            raise AssertionError

    monkeypatch.setattr("edge_agent.cloud.ASK_S", 0.1)
    async with counted(Silent([accepted()])) as cloud:
        began = time.monotonic()
        error = await failure(CloudClient(cloud.address))
    assert "broke off after 0 bytes" in error.message and not error.never_ran
    assert time.monotonic() - began < 5


async def test_a_cloud_that_drips_is_left(cloud: Cloud) -> None:
    data = png()
    cloud.script = in_pieces(data, 1)
    error = await failure(CloudClient(cloud.address))
    assert isinstance(error, CloudUnavailable) and not error.never_ran
    assert len(cloud.received) == MOST_RESUMES + 1


@pytest.mark.parametrize("again", [accepted(digest="ef" * 32), accepted(PRICE + 1), accepted(PRICE - 1)])
async def test_the_rest_of_another_image_is_not_taken(cloud: Cloud, again: Response) -> None:
    """Nor one of another price: what may be charged was told with the first byte."""
    data = png()
    honest_pieces = in_pieces(data, 100)

    def script(request: cloud_pb2.GenerateRequest) -> list[Any]:
        first, *more = honest_pieces(request)
        return [again if request.image.resume_offset else first, *more]

    cloud.script = script
    error = await failure(CloudClient(cloud.address))
    assert "broke off after 100 bytes" in error.message and not error.never_ran
    assert len(cloud.received) == 2


async def test_a_lie_in_the_rest_of_an_image_is_told_and_no_more_is_asked_for(cloud: Cloud) -> None:
    data = png()

    def script(request: cloud_pb2.GenerateRequest) -> list[Any]:
        if not request.image.resume_offset:
            return [accepted(), chunk(0, data[:100])]
        return [accepted(), chunk(100, data[100:200]), chunk(150, data[150:])]

    cloud.script = script
    error = await failure(CloudClient(cloud.address))
    assert isinstance(error, CloudLied) and "byte 150 where byte 200 is due" in error.message
    assert not error.never_ran and len(cloud.received) == 2


async def test_a_cloud_that_goes_away_for_good_midway_may_have_charged(cloud: Cloud) -> None:
    """That nothing runs on the connection that is refused says nothing of the call before."""

    def script(request: cloud_pb2.GenerateRequest) -> list[Any]:
        refused = abort(grpc.StatusCode.UNAVAILABLE, "shutting down")
        return [refused] if request.image.resume_offset else [accepted(), chunk(0, png()[:100])]

    cloud.script = script
    error = await failure(CloudClient(cloud.address))
    assert "broke off after 100 bytes" in error.message and not error.never_ran


async def test_a_cloud_slower_than_the_deadline_is_cancelled_there(cloud: Cloud) -> None:
    cloud.script = [accepted(), progress(1), stall]
    began = time.monotonic()
    error = await failure(CloudClient(cloud.address), timeout_s=0.7)
    assert 0.6 < time.monotonic() - began < 5
    assert isinstance(error, CloudUnavailable)
    assert "not done within 0.7 s" in error.message
    assert not error.never_ran
    await asyncio.wait_for(cloud.cancelled.wait(), 5)


async def test_a_caller_who_leaves_cancels_the_call_at_the_cloud(cloud: Cloud) -> None:
    cloud.script = [accepted(), stall]
    task = asyncio.create_task(collect(CloudClient(cloud.address)))
    await cloud.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(cloud.cancelled.wait(), 5)


async def test_a_connection_that_breaks_mid_way_leaves_the_outcome_open() -> None:
    cloud = Cloud()
    cloud.script = [accepted(), stall]
    server = grpc.aio.server()
    cloud_pb2_grpc.add_CloudServerServiceServicer_to_server(cloud, server)
    client = CloudClient(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    task = asyncio.create_task(failure(client))
    await cloud.started.wait()
    await server.stop(None)
    error = await task
    assert isinstance(error, CloudUnavailable)
    assert not error.never_ran


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody listens, nor can: it is bound."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


async def test_a_port_where_nobody_listens_is_known_at_once_and_nothing_ran(nobody: str) -> None:
    client = CloudClient(nobody, connect_timeout_s=30)
    began = time.monotonic()
    error = await failure(client)
    assert time.monotonic() - began < 5
    assert isinstance(error, CloudUnavailable)
    assert "refused" in error.message.lower()
    assert "check the address" in error.message
    assert error.never_ran
    assert not client.record.healthy


async def test_an_address_that_does_not_resolve_says_so_and_nothing_ran() -> None:
    client = CloudClient("cloud.invalid:50051", connect_timeout_s=10)
    error = await failure(client)
    assert "cloud.invalid:50051" in error.message
    assert error.never_ran
    assert not client.record.healthy


@asynccontextmanager
async def silent_listener() -> AsyncIterator[str]:
    """Takes connections and never says a word."""

    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silence, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def test_a_peer_that_takes_the_connection_and_says_nothing_ran_nothing() -> None:
    async with silent_listener() as address:
        client = CloudClient(address, connect_timeout_s=0.5)
        error = await failure(client)
        assert "no connection within 0.5 s" in error.message
        assert error.never_ran
        assert not client.record.healthy


async def test_a_long_patience_with_a_connection_is_told_in_whole_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def over(*_: Any, **__: Any) -> None:
        """As if the time had passed."""

    async with silent_listener() as address:
        monkeypatch.setattr(asyncio, "wait", over)
        error = await failure(CloudClient(address, connect_timeout_s=125), timeout_s=600)
        monkeypatch.undo()
    assert "no connection within 125 s" in error.message


async def test_a_caller_in_a_hurry_does_not_make_the_cloud_unhealthy() -> None:
    async with silent_listener() as address:
        client = CloudClient(address, connect_timeout_s=5)
        error = await failure(client, timeout_s=0.2)
        assert error.never_ran
        assert client.record.healthy


async def test_callers_with_short_deadlines_find_a_silent_cloud_out_all_the_same() -> None:
    async with silent_listener() as address:
        client = CloudClient(address, connect_timeout_s=5)
        error = await failure(client, timeout_s=SLOW_CONNECTION_S + 0.1)
        assert error.never_ran
        assert not client.record.healthy


@pytest.mark.parametrize(("timeout_s", "healthy"), [(0.2, True), (SLOW_ANSWER_S + 0.1, False)])
async def test_callers_with_short_deadlines_find_out_a_cloud_that_does_not_accept(
    cloud: Cloud, timeout_s: float, healthy: bool
) -> None:
    cloud.script = [stall]
    client = CloudClient(cloud.address)
    assert not (await failure(client, timeout_s=timeout_s)).never_ran
    assert client.record.healthy is healthy


async def test_one_call_finds_out_whether_the_cloud_is_back_and_the_others_need_not_wait_with_it() -> None:
    now = 0.0
    async with silent_listener() as address:
        client = CloudClient(address, connect_timeout_s=0.3, monotonic=lambda: now)
        await failure(client)
        now = 1.0  # the time it was left alone is over
        assert client.record.healthy
        probing = asyncio.create_task(failure(client))
        await until(lambda: not client.record.healthy)
        await probing
        now = 2.9
        assert not client.record.healthy  # two seconds this time
        now = 3.0
        assert client.record.healthy


async def test_a_first_connection_that_takes_long_keeps_the_next_prompts_on_the_edge() -> None:
    now = 0.0
    async with silent_listener() as address:
        client = CloudClient(address, connect_timeout_s=0.5, monotonic=lambda: now)
        connecting = asyncio.create_task(failure(client))
        await until(lambda: client.record._waiting)
        assert client.record.healthy
        now = SLOW_CONNECTION_S
        assert not client.record.healthy
        await connecting


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A key and a certificate for 127.0.0.1, made by OpenSSL."""
    return make_certificate(tmp_path)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    key, pem = folder / "key.pem", folder / "certificate.pem"
    openssl("req -x509 -days 2", *new_key(key), "-out", pem)
    return key, pem


def make_expired_certificate(folder: Path) -> tuple[Path, Path]:
    """A key, and a certificate for 127.0.0.1 that was valid on the first day of 2020."""
    key, pem = folder / "key.pem", folder / "certificate.pem"
    (folder / "index").touch()
    (folder / "ca").write_text(
        f"[ca]\ndefault_ca = here\n[here]\ndatabase = {folder}/index\nnew_certs_dir = {folder}\nrand_serial = yes\n"
        "default_md = sha256\npolicy = any\ncopy_extensions = copy\n[any]\ncommonName = supplied\n"
    )
    openssl("req -new", *new_key(key), "-out", folder / "wish")
    past = "-startdate 20200101000000Z -enddate 20200102000000Z"
    files = ("-config", folder / "ca", "-keyfile", key, "-in", folder / "wish", "-out", pem)
    openssl(f"ca -batch -selfsign -notext {past}", *files)
    return key, pem


def new_key(file: Path) -> tuple[str | Path, ...]:
    kind = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=cloud -addext subjectAltName=IP:127.0.0.1"
    return (*kind.split(), "-keyout", file)


def openssl(command: str, *arguments: str | Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl")
    subprocess.run(["openssl", *command.split(), *arguments], check=True, capture_output=True)


@asynccontextmanager
async def over_tls(cloud: Cloud, certificate: tuple[Path, Path]) -> AsyncIterator[str]:
    """The address of `cloud` behind that key and certificate."""
    key, pem = certificate
    server = grpc.aio.server()
    cloud_pb2_grpc.add_CloudServerServiceServicer_to_server(cloud, server)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), pem.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_over_tls_only_a_cloud_with_a_trusted_certificate_gets_the_prompt(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    _, pem = certificate
    (tmp_path / "another").mkdir()
    _, another = make_certificate(tmp_path / "another")
    cloud = Cloud(script=honest(png()))
    async with over_tls(cloud, certificate) as address:
        assert isinstance((await collect(CloudClient(address, ca_file=pem)))[-1], CloudImage)
        misnamed = CloudClient(address.replace("127.0.0.1", "localhost"), ca_file=pem)
        untrusting = CloudClient(address, ca_file=another)
        for client, words in (
            (CloudClient(address), "if this one does, name its authority with --cloud-ca"),  # without TLS
            (untrusting, "not trusted: name the authority that signed it with --cloud-ca"),
            (misnamed, "for another name"),
        ):
            error = await failure(client)
            assert error.never_ran
            assert words in error.message
        assert len(cloud.received) == 1


async def test_a_certificate_that_has_expired_is_called_that_and_not_one_of_a_stranger(
    tmp_path: Path,
) -> None:
    expired = make_expired_certificate(tmp_path)
    async with over_tls(Cloud(script=honest(png())), expired) as address:
        error = await failure(CloudClient(address, ca_file=expired[1]))
    assert error.never_ran
    assert error.message.endswith(
        "; renew its certificate, or set the clock of this machine if that is wrong"
    )


async def test_no_proxy_stands_between_us_and_a_cloud_on_this_machine(
    cloud: Cloud, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody answers there
    cloud.script = honest(png())
    async with over_tls(cloud, certificate) as secure:
        for client in (CloudClient(cloud.address), CloudClient(secure, ca_file=certificate[1])):
            assert isinstance((await collect(client))[-1], CloudImage)


async def test_a_plain_server_behind_a_tls_address_is_not_reached(cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not a certificate")
    error = await failure(CloudClient(cloud.address, ca_file=tmp_path / "ca.pem", connect_timeout_s=5))
    assert error.never_ran
    error = await failure(CloudClient(cloud.address, ca_file=tmp_path / "missing.pem"))
    assert "missing.pem" in error.message
    assert error.never_ran
    assert cloud.received == []


async def test_failures_in_a_row_wait_longer_and_an_accepted_call_ends_the_wait(
    cloud: Cloud, nobody: str
) -> None:
    now = 0.0
    client = CloudClient(nobody, monotonic=lambda: now)
    waits = []
    for _ in range(8):
        await failure(client)
        await failure(client)  # at the same moment: counts once
        began = now
        while not client.record.healthy:
            now += 0.5
        waits.append(now - began)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]

    await failure(client)
    assert not client.record.healthy
    client.address = cloud.address
    cloud.script = honest(png())
    await collect(client)
    assert client.record.healthy


# No cloud server


async def test_a_server_of_another_kind_is_called_that_ran_nothing_and_is_left_alone() -> None:
    server = grpc.aio.server()
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    now = 0.0
    client = CloudClient(address, monotonic=lambda: now)
    error = await failure(client)
    assert isinstance(error, CloudRefused) and error.never_ran
    assert "what answers there is no cloud server: check --cloud" in error.message
    assert not client.record.healthy
    now = 1.0
    assert client.record.healthy
    with pytest.raises(CloudRefused, match="check --cloud") as unanswered:
        await client.lookup("r-1")
    assert not unanswered.value.never_ran, "a call of before may have reached another server there"
    assert not client.record.healthy
    await server.stop(None)


# A proxy before the cloud


@pytest.mark.parametrize("status", [200, 204, 302, 401, 403, 404, 407, 413, 429, 500, 502, 503, 504])
async def test_an_answer_that_is_no_cloud_servers_is_called_a_proxys_and_the_cloud_left_alone(
    status: int,
) -> None:
    async with http2.proxy(status, b"<html>not what was asked for</html>") as address:
        client = CloudClient(address)
        error = await failure(client)
        assert "a proxy before the cloud server, or a network that asks for a login" in error.message
        assert not error.never_ran, "a proxy may have passed the call on"
        assert not client.record.healthy


@pytest.mark.parametrize("reset", [None, 2, 8])
async def test_an_image_that_a_proxy_cuts_off_says_so_and_nothing_against_the_cloud(
    reset: int | None,
) -> None:
    message = accepted().SerializeToString()
    body = b"\0" + struct.pack(">I", len(message)) + message
    async with http2.proxy(200, body, kind="application/grpc", reset=reset, after_s=0.2) as address:
        client = CloudClient(address)
        error = await failure(client)
        assert isinstance(error, CloudUnavailable) and not error.never_ran
        assert "see the proxy's log and timeouts" in error.message
        assert client.record.healthy


async def test_a_proxy_without_http_2_or_without_tls_is_called_that(certificate: tuple[Path, Path]) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    key, pem = certificate
    only_1_1 = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    only_1_1.load_cert_chain(pem, key)
    for context, words in ((only_1_1, "offers no HTTP/2"), (None, "speaks no TLS")):
        server = await asyncio.start_server(refuse, "127.0.0.1", 0, ssl=context)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        error = await failure(CloudClient(address, ca_file=pem))
        assert error.never_ran
        assert words in error.message
        server.close()


@pytest.mark.parametrize("no_model", [None, abort(grpc.StatusCode.UNAVAILABLE, "it loads its model")])
async def test_a_cloud_that_is_back_when_asked_why_it_was_not_reached_gives_no_other_reason(
    cloud: Cloud, no_model: Callable[..., Any] | None
) -> None:
    """And is asked as it is by every call: it would log that the token is missing, and we that it refuses us."""
    cloud.no_model = no_model
    client = CloudClient(cloud.address, token="sesame")
    async with client._connection(timeout_s=20.0) as channel:
        assert await client._reason(channel) == "it answers again just now"
    assert cloud.metadata["authorization"] == "Bearer sesame"


@pytest.mark.posix
async def test_no_more_files_that_may_be_open_are_no_fault_of_the_address(cloud: Cloud) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))  # those that are open stay so
    try:
        error = await failure(CloudClient(cloud.address))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert error.never_ran
    assert error.message.endswith("raise its limit (ulimit -n, or LimitNOFILE in the unit)")


async def test_a_proxy_of_this_machines_own_that_refuses_is_called_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    error = await failure(CloudClient("cloud.invalid:443"))
    assert error.never_ran
    assert "407; that is the proxy that this machine's https_proxy names" in error.message
    server.close()


async def test_a_cloud_that_takes_calls_and_answers_none_keeps_the_next_prompts_on_the_edge(
    cloud: Cloud,
) -> None:
    """As one that has stopped looks behind a proxy, which connects and answers pings in its place."""
    now = 0.0
    client = CloudClient(cloud.address, connect_timeout_s=0.5, monotonic=lambda: now)
    cloud.script = [stall]
    waiting = asyncio.create_task(failure(client, timeout_s=1.0))
    await cloud.started.wait()
    assert client.record.healthy
    now = 0.5
    assert not client.record.healthy
    assert not (await waiting).never_ran
    assert not client.record.healthy
    now = 1.5
    assert client.record.healthy
    probing = asyncio.create_task(failure(client, timeout_s=1.0))
    await until(lambda: not client.record.healthy)
    await probing


async def test_messages_without_an_event_are_passed_over(cloud: Cloud) -> None:
    data = png()
    first, *rest = honest(data)
    cloud.script = [first, Response(), *rest[:2], Response(), *rest[2:]]
    *_, image = await collect(CloudClient(cloud.address))
    assert isinstance(image, CloudImage) and image.png == data


# Looking up what became of a request


@pytest.mark.parametrize(
    ("state", "charged", "outcome"),
    [
        (
            cloud_pb2.GENERATION_STATE_UNKNOWN,
            None,
            Outcome(known=True, arrived=False, charged_micro_usd=None),
        ),
        (
            cloud_pb2.GENERATION_STATE_RUNNING,
            None,
            Outcome(known=False, arrived=True, charged_micro_usd=None),
        ),
        (
            cloud_pb2.GENERATION_STATE_UNSPECIFIED,
            None,
            Outcome(known=False, arrived=False, charged_micro_usd=None),
        ),
        (
            cloud_pb2.GENERATION_STATE_FINISHED,
            PRICE,
            Outcome(known=True, arrived=True, charged_micro_usd=PRICE),
        ),
        (
            cloud_pb2.GENERATION_STATE_RUNNING,
            PRICE,
            Outcome(known=False, arrived=True, charged_micro_usd=PRICE),
        ),
        (cloud_pb2.GENERATION_STATE_FINISHED, 0, Outcome(known=True, arrived=True, charged_micro_usd=0)),
        (cloud_pb2.GENERATION_STATE_FAILED, None, Outcome(known=True, arrived=True, charged_micro_usd=None)),
        (
            cloud_pb2.GENERATION_STATE_CANCELLED,
            None,
            Outcome(known=True, arrived=True, charged_micro_usd=None),
        ),
    ],
)
async def test_a_lookup_tells_what_a_request_came_to(
    cloud: Cloud, state: cloud_pb2.GenerationState, charged: int | None, outcome: Outcome
) -> None:
    cloud.answer = cloud_pb2.LookupGenerationResponse(
        state=state, charged=charged is not None, charged_micro_usd=charged or 0
    )
    assert await CloudClient(cloud.address).lookup("r-1") == outcome


def test_the_identity_tells_servers_and_tenants_apart_and_keeps_the_token() -> None:
    clients = [CloudClient("a:1"), CloudClient("b:1"), CloudClient("a:1", token="secret-1")]
    clients.append(CloudClient("a:1", token="secret-2"))
    assert len({client.identity for client in clients}) == 4
    assert CloudClient("a:1", token="secret-1").identity == clients[2].identity
    assert not any("secret" in client.identity for client in clients)


@pytest.mark.parametrize("told", [{"request_id": "r-2"}, {"charged": True, "charged_micro_usd": -PRICE}])
async def test_a_lookup_that_answers_for_another_request_or_gives_money_is_a_lie(
    cloud: Cloud, told: dict[str, Any]
) -> None:
    finished = cloud_pb2.GENERATION_STATE_FINISHED
    cloud.answer = cloud_pb2.LookupGenerationResponse(state=finished, **told)
    with pytest.raises(CloudLied):
        await CloudClient(cloud.address).lookup("r-1")


async def test_bytes_that_are_no_message_are_a_lie_that_may_have_run() -> None:
    async with undecodable_cloud() as address:
        client = CloudClient(address)
        for answer in (client.lookup("r-1"), client.model_digest(), collect(client)):
            with pytest.raises(CloudLied, match="cannot be read") as lied:
                await answer
            assert not lied.value.never_ran


@asynccontextmanager
async def undecodable_cloud() -> AsyncIterator[str]:
    """A server that answers every method with bytes that are no message."""

    class Anything(grpc.GenericRpcHandler):
        def service(self, details: Any) -> grpc.RpcMethodHandler:
            if details.method.endswith("/Generate"):

                async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
                    yield b"\xff"

                return grpc.unary_stream_rpc_method_handler(stream)

            async def answer(request: bytes, context: Any) -> bytes:
                return b"\xff"

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Anything(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_a_caller_who_leaves_as_the_connection_is_made_sends_nothing(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in one turn of the loop: before Python 3.12 `asyncio.wait_for` then forgets the cancellation."""
    client, connected = CloudClient(cloud.address), asyncio.Event()
    monkeypatch.setattr(client, "_ready", lambda _: connected.wait())
    call = asyncio.create_task(client.lookup("r-1"))
    await asyncio.sleep(0.1)
    connected.set()
    await asyncio.sleep(0)  # it has ended, and whoever waits for it does not know yet
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_the_cloud_can_be_asked_for_its_model(cloud: Cloud) -> None:
    assert await CloudClient(cloud.address).model_digest() == "cd" * 32
    cloud.digest = "\x1b[31mX"
    with pytest.raises(CloudLied, match="64 hex digits"):
        await CloudClient(cloud.address).model_digest()


async def test_a_lookup_without_a_cloud_is_an_error_and_no_outcome(nobody: str) -> None:
    with pytest.raises(CloudUnavailable):
        await CloudClient(nobody).lookup("r-1")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/cloud.sock", True),
        ("10.0.0.1:1", False),
        ("localhost.example.org:1", False),
        ("[2001:db8::1]:1", False),
    ],
)
def test_only_this_machines_own_addresses_are_called_without_tls(address: str, local: bool) -> None:
    assert is_local(address) is local


@pytest.mark.parametrize(
    "address", ["", "cloud.example.org", "host:", ":50051", "host:port", "::1:50051", "host:65536"]
)
def test_what_is_no_address_is_refused_when_the_client_is_made(address: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|stand in brackets"):
        CloudClient(address)
