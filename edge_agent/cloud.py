"""The client of the cloud server: one call, one channel, one image.

Nothing here opens a connection before a call is made. Each call has a channel of its own and closes it: then a
connection that is refused is known to have run nothing, no dead connection from before is ever trusted with a paid
request, and renewed certificates and changed addresses are picked up. The handshake it costs is small beside an image.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from edge_agent.address import is_local
from edge_agent.cloud_image import CloudAccepted, CloudImage, ImageStream, checked_digest
from edge_agent.errors import CloudError, CloudLied, CloudRefused, CloudUnavailable, printable, sent_status
from edge_agent.image import Progress
from edge_agent.money import dollars
from edge_agent.request import ImageRequest
from edge_agent.track_record import LONGEST_RETRY_S, SLOW_CONNECTION_S, TrackRecord
from routet2i.cloud.v1 import cloud_pb2
from routet2i.cloud.v1.cloud_pb2_grpc import CloudServerServiceStub

Detail = TypeVar("Detail", bound=Message)

MAX_MESSAGE_BYTES = 4 * 2**20
"""Largest message taken: image chunks are at most 64 KiB, previews are small images."""

ANSWER_S = 10.0
"""What a question that costs nothing may take where nobody waits for the answer."""

ASK_S = 2.0
"""How long the edge, which could begin to draw, waits to hear whether an image that broke off is paid for."""

GOODBYE_S = 0.5
"""How long a server that has sent its image gets to end the call."""

SLOW_ANSWER_S = 2.0
"""Who has waited so long for an answer on a connection that stands has found out something about the cloud: a server
accepts or refuses at once."""

RESUME_PAUSE_S = 1.0
"""Before the last call for an image that is paid for, after one that brought nothing of it."""

MOST_RESUMES = 5
"""Calls for the rest of an image whose way here broke off."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A dead link is noticed after about 15 s instead of never; the last of the three is for a peer whose
    # kernel still acknowledges while its process stalls.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # A cloud model thinks for longer than two pings without sending anything.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A request is paid for: whether it is sent again is decided above, with the ledger, never in here.
    ("grpc.enable_retries", 0),
    # Channels do not share connections, nor each other's wait after a failure.
    ("grpc.use_local_subchannel_pool", 1),
)
# A proxy for the world outside must not stand between two processes of this machine.
_LOCAL_OPTIONS = (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0))

_NOTHING_RAN = frozenset(
    {
        grpc.StatusCode.DEADLINE_EXCEEDED,  # the queue is longer than the time left
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Codes by which the server says, before it accepts, that nothing ran. They count only with the details that
the server's own answers carry: gRPC makes some of these codes itself when a connection breaks or a message
is too large, and then nobody knows."""

_TOO_LONG = "SERVER: Received message larger than max"
"""How gRPC's server begins what it says of a request that it does not hand on."""

_REFUSALS = frozenset(
    {
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Codes with which the same request would be refused again."""


SIDES = ("width", "height")
"""The fields of a request that are an image's size."""

_HUNG_UP = ("Socket closed", "Connection reset")
"""GRPC's words for a peer that takes a connection and ends it at once."""

_CHECKS = (
    (
        ("certificate has expired", "certificate is not yet valid"),
        "renew its certificate, or set the clock of this machine if that is wrong",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED",),
        "its certificate is not trusted: name the authority that signed it with --cloud-ca",
    ),
    (
        ("Hostname Verification Check failed",),
        "its certificate is for another name: give --cloud the host as the certificate has it",
    ),
    (
        ("NO_APPLICATION_PROTOCOL", "missing selected ALPN"),
        "what answers there offers no HTTP/2, which gRPC needs: switch it on in the proxy before the cloud server",
    ),
    (
        ("HTTP proxy returned",),
        "that is the proxy that this machine's https_proxy names: have it let the call through, or name the cloud "
        "server in no_proxy",
    ),
    (
        ("WRONG_VERSION_NUMBER",),
        "what answers there speaks no TLS: check the port, and the proxy if there is one",
    ),
    (
        ("Too many open files",),
        "edge-agent may open no more here: raise its limit (ulimit -n, or LimitNOFILE in the unit)",
    ),
)
"""GRPC's words for why there is no connection, and what to do about it; the first that is found counts."""

_PROXYS_WORDS = ("http2 header with status", "END_STREAM flag received", "Received RST_STREAM")
"""GRPC's words for what no cloud server sends: an answer in plain HTTP, whose status it does not always tell, and a
call that ends without a word."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request id. `known` is False while it may still be charged: ask again later.

    With `known`, `charged_micro_usd` is final: what was charged for the image, None where none was made.
    `arrived` is False where the cloud has never heard of it: final only once it cannot be on its way any more.
    """

    known: bool
    arrived: bool
    charged_micro_usd: int | None


class CloudClient:
    """Calls the cloud server at `address` (HOST:PORT, [IPV6]:PORT or unix:PATH).

    Addresses other than this machine's own are called over TLS, trusting the certificates in `ca_file` (PEM,
    read anew for each call) or those that come with gRPC; with a `ca_file`, so are this machine's own. `token` is
    sent as a bearer token. `connect_timeout_s` bounds address lookup, connection and handshake.

    `identity` tells apart servers and tenants, each of which knows of its own calls only; it does not give
    the token away. `record` is what its calls so far say of the next.

    Raises ValueError for an address without a port.
    """

    def __init__(
        self,
        address: str,
        *,
        ca_file: Path | None = None,
        token: str | None = None,
        connect_timeout_s: float = 5.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.identity = address
        if token:
            self.identity += f" with token {hashlib.sha256(token.encode()).hexdigest()[:8]}"
        local = is_local(address)
        self._secure = ca_file is not None or not local
        self._options = _LOCAL_OPTIONS if local else CHANNEL_OPTIONS
        self._ca_file = ca_file
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._connect_timeout_s = connect_timeout_s
        self._monotonic = monotonic
        self.record = TrackRecord(monotonic)
        self._closed = False

    async def generate(
        self,
        request: ImageRequest,
        ceiling_micro_usd: int,
        timeout_s: float,
        sending: Callable[[], None] = lambda: None,
        *,
        redelivery: bool = False,
    ) -> AsyncGenerator[CloudAccepted | Progress | CloudImage, None]:
        """Have the cloud make an image for at most `ceiling_micro_usd`, within `timeout_s` seconds in all.

        Yields one CloudAccepted, any number of Progress, one CloudImage. Closing the iterator
        (`contextlib.aclosing` does), or cancelling the task that awaits it, cancels the call. `sending` is called
        when the request goes out: until then nothing can have been charged, whatever ends the call.

        Where the answer breaks off and the image is paid for, as it is once its first byte comes, the rest of it is
        asked for. With `redelivery` all of it was paid for before, with at most `ceiling_micro_usd`: the cloud may send
        what it has kept, and is offered nothing to make an image.

        Raises CloudUnavailable, CloudRefused or CloudLied; their `never_ran` says whether the call can be
        forgotten. Otherwise, also after a cancellation, `lookup` tells what it came to.
        """
        deadline = self._monotonic() + timeout_s
        stream = ImageStream(request, ceiling_micro_usd, redelivery=redelivery)
        broken: CloudError | None = None  # at first: what a later call comes to is not what the image came to
        asked = False
        for _ in range(MOST_RESUMES + 1):
            had = len(stream.received)
            try:
                async with aclosing(self._received(stream, deadline, sending)) as events:
                    async for event in events:
                        yield event
                return
            except CloudError as error:
                brought_more = len(stream.received) > had
                if broken is None and error.never_ran:
                    raise
                if not isinstance(error, CloudUnavailable) and (broken is None or brought_more):
                    raise
                broken = broken or error
                if not brought_more:
                    if asked or not await self._made(request.request_id, deadline):
                        break
                    asked = True
                    await asyncio.sleep(max(0.0, min(RESUME_PAUSE_S, deadline - self._monotonic())))
        raise cast(CloudError, broken)

    async def _made(self, request_id: str, deadline: float) -> bool:
        """Whether the image is made and paid for, as far as the cloud can be asked in time."""
        timeout_s = min(ASK_S, deadline - self._monotonic())
        with suppress(CloudError):
            return (await self.lookup(request_id, timeout_s)).charged_micro_usd is not None
        return False

    async def _received(
        self, stream: ImageStream, deadline: float, sending: Callable[[], None]
    ) -> AsyncGenerator[CloudAccepted | Progress | CloudImage, None]:
        """The events of one call for what `stream` has not received yet."""
        timeout_s = max(0.0, deadline - self._monotonic())
        async with self._connection(timeout_s) as channel:
            sending()
            call: Any = CloudServerServiceStub(channel).Generate(
                stream.wire_request(),
                timeout=max(0.0, deadline - self._monotonic()),
                metadata=self._metadata,
            )
            try:
                with ExitStack() as unanswered:
                    # A server accepts at once. Behind a proxy, which takes every connection, only that tells.
                    unanswered.enter_context(self.record.waits(self._connect_timeout_s))
                    # Not `async for`: it makes a generator that holds on to the call, which holds on to it.
                    while (response := await call.read()) is not grpc.aio.EOF:
                        unanswered.close()
                        event = await stream.take(response)
                        if event is None:
                            continue
                        if isinstance(event, CloudAccepted):
                            if stream.redelivery:  # which tells the price and the model of then
                                self.record.recovered()
                            else:
                                self.record.accepted(event.charged_micro_usd, stream.request.size)
                        elif isinstance(event, CloudImage):
                            self.record.recovered()
                        yield event
                        if isinstance(event, CloudImage):
                            # Hung up on before it has said that all went well, the server would count a call as
                            # cancelled.
                            await asyncio.wait({asyncio.ensure_future(call.code())}, timeout=GOODBYE_S)
                            return
            except grpc.aio.AioRpcError as error:
                accepted = stream.accepted is not None
                explained = self._explained(error, accepted=accepted, timeout_s=timeout_s)
                if isinstance(explained, CloudRefused) and explained.field in SIDES:
                    self.record.refused_size(stream.request.size)
                raise explained from error.with_traceback(None)  # whose frames are the call's
            finally:
                call.cancel()  # which the channel's end is not to it in grpcio before 1.83
                # Its connection ends with it, and not before: a failure, which this frame is a part of, may be kept.
                del call
            raise CloudUnavailable(
                f"the cloud at {self.address} broke off after {len(stream.received)} bytes of the image",
                never_ran=False,
            )

    async def lookup(self, request_id: str, timeout_s: float = ANSWER_S) -> Outcome:
        """What became of `request_id`. Raises CloudError when there is no answer in `timeout_s` seconds."""
        question = cloud_pb2.LookupGenerationRequest(request_id=request_id)
        answer = await self._answer("LookupGeneration", question, timeout_s)
        made = answer.charged or answer.state == cloud_pb2.GENERATION_STATE_FINISHED
        charged = answer.charged_micro_usd if made else None
        if answer.request_id != request_id or (charged or 0) < 0:
            raise CloudLied(f"the cloud at {self.address} answered for another request")
        ended = {
            cloud_pb2.GENERATION_STATE_FINISHED,
            cloud_pb2.GENERATION_STATE_FAILED,
            cloud_pb2.GENERATION_STATE_CANCELLED,
        }
        # What a later version of the wire may call a state is no end that is known of.
        return Outcome(
            known=answer.state in {*ended, cloud_pb2.GENERATION_STATE_UNKNOWN},
            arrived=answer.state in {*ended, cloud_pb2.GENERATION_STATE_RUNNING},
            charged_micro_usd=charged,
        )

    async def model_digest(self) -> str:
        """Digest of the model that the cloud runs now, which costs nothing to ask. Raises what `lookup` raises."""
        answer = await self._answer("GetModel", cloud_pb2.GetModelRequest(), ANSWER_S)
        return checked_digest(answer.model_digest)

    async def close(self) -> None:
        """Take no more calls. Those under way end with the tasks that await them."""
        self._closed = True

    async def _answer(self, method: str, question: Any, timeout_s: float) -> Any:
        deadline = self._monotonic() + timeout_s
        async with self._connection(timeout_s) as channel:
            ask = getattr(CloudServerServiceStub(channel), method)
            try:
                answer = await ask(
                    question, timeout=max(0.0, deadline - self._monotonic()), metadata=self._metadata
                )
            except grpc.aio.AioRpcError as error:
                explained = self._explained(error, accepted=True, timeout_s=timeout_s)
                raise explained from error.with_traceback(None)  # as in `_received`
        if answer is None:  # what gRPC makes of bytes that it cannot decode
            raise CloudLied(f"the cloud at {self.address} sent an answer that cannot be read")
        return answer

    @asynccontextmanager
    async def _connection(self, timeout_s: float) -> AsyncIterator[grpc.aio.Channel]:
        """A channel that is connected. Until it is, nothing was sent: its errors have `never_ran`."""
        if self._closed:
            raise CloudUnavailable("the connection to the cloud was closed for good", never_ran=True)
        channel = await self._channel()
        try:
            # Not `asyncio.wait_for`: before Python 3.12 it loses a cancellation that meets the end of its work.
            ready = asyncio.ensure_future(self._ready(channel))
            # Asked for its error even where a cancellation is faster: asyncio warns of those that nobody asked for.
            ready.add_done_callback(lambda done: done.cancelled() or done.exception())
            patience_s = min(timeout_s, self._connect_timeout_s)
            try:
                with self.record.waits(SLOW_CONNECTION_S):
                    await asyncio.wait({ready}, timeout=patience_s)
            finally:
                in_time = ready.done()
                ready.cancel()
            if not in_time:
                # A caller in a hurry says nothing about the cloud.
                if patience_s >= min(SLOW_CONNECTION_S, self._connect_timeout_s):
                    self.record.failed()
                raise CloudUnavailable(
                    f"the cloud at {self.address} gave no connection within {round(patience_s, 2):.10g} s",
                    never_ran=True,
                )
            ready.result()
            yield channel
        finally:
            await channel.close()  # cancels a call that is still under way

    async def _channel(self) -> grpc.aio.Channel:
        if not self._secure:
            return grpc.aio.insecure_channel(self.address, options=self._options)
        try:
            roots = await asyncio.to_thread(self._ca_file.read_bytes) if self._ca_file else None
        except OSError as error:
            raise CloudUnavailable(
                f"the cloud's certificates cannot be read: {error}; check the setting that names the file",
                never_ran=True,
            ) from error
        credentials = grpc.ssl_channel_credentials(roots)
        return grpc.aio.secure_channel(self.address, credentials, options=self._options)

    async def _ready(self, channel: grpc.aio.Channel) -> None:
        """Wait until the channel is connected; at the first failure, give its reason instead of trying on."""
        state = channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                self.record.failed()
                reason = await self._reason(channel)
                found = (advice for words, advice in _CHECKS if any(word in reason for word in words))
                check = next(found, "check the address and that the cloud server runs")
                if not self._secure and any(words in reason for words in _HUNG_UP):
                    check = "a server that speaks TLS does so: if this one does, name its authority with --cloud-ca"
                raise CloudUnavailable(
                    f"the cloud at {self.address} is not reached: {reason}; {check}", never_ran=True
                )
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=True)

    async def _reason(self, channel: grpc.aio.Channel) -> str:
        """Why the channel failed. Only a call is told, so this makes one that has no effect."""
        question = cloud_pb2.GetModelRequest()
        try:
            await CloudServerServiceStub(channel).GetModel(question, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            if sent_status(error) is None:  # else the cloud server said so itself, on a new connection
                return printable(error.details() or error.code().name)
        return "it answers again just now"

    def _explained(self, error: grpc.aio.AioRpcError, *, accepted: bool, timeout_s: float) -> CloudError:
        """A gRPC error of a connected call as one of ours."""
        code, text = error.code(), printable(error.details() or "no reason given")
        status = sent_status(error)
        if status is None:
            return self._broken(code, text, accepted=accepted, timeout_s=timeout_s)
        return self._answered(code, text, status, never_ran=not accepted and code in _NOTHING_RAN)

    def _answered(
        self, code: grpc.StatusCode, text: str, status: Status, *, never_ran: bool
    ) -> CloudUnavailable | CloudRefused:
        """What the cloud server itself says."""
        if code in _REFUSALS:
            why = _detail(status, ErrorInfo).reason
            withheld = code is grpc.StatusCode.FAILED_PRECONDITION and why == "IMAGE_WITHHELD"
            price = _price_micro_usd(status) if never_ran else None
            if price is not None:
                self.record.told_price(price)
                text = f"it asks {dollars(price)} for an image, above this device's --max-price or the request's own"
            if never_ran and code is grpc.StatusCode.UNAUTHENTICATED:  # so would any other request be
                self.record.failed()
            return CloudRefused(
                f"the cloud at {self.address} refused: {text}",
                never_ran=never_ran or withheld,  # nothing is charged, and it is known by now
                price_micro_usd=price,
                withheld=withheld,
                gone=code is grpc.StatusCode.ALREADY_EXISTS,
                field=_field(status) if never_ran else "",
            )
        retry_after_s = _retry_after_s(status)
        if retry_after_s is not None:
            self.record.leave_alone(retry_after_s)
        elif code is grpc.StatusCode.UNAVAILABLE:
            self.record.failed()
        return CloudUnavailable(
            f"the cloud at {self.address} failed: {text} ({code.name})",
            never_ran=never_ran,
            retry_after_s=retry_after_s,
            answered=True,
        )

    def _broken(self, code: grpc.StatusCode, text: str, *, accepted: bool, timeout_s: float) -> CloudError:
        """What gRPC says here or there, or what stands between: seldom does that tell whether anything ran."""
        never_ran, hint = False, ""
        if any(words in text for words in _PROXYS_WORDS):
            hint = (
                "; a proxy before the cloud server, or a network that asks for a login, has answered in its place or "
                "cut it off: see the proxy's log and timeouts, and whether the cloud server runs"
            )
            if not accepted:
                self.record.failed()
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            # A gRPC server that has no such service says so, and ran nothing.
            hint = "; what answers there is no cloud server: check --cloud"
            never_ran = not accepted
            self.record.failed()
        if code in _REFUSALS:
            return CloudRefused(f"the cloud at {self.address} refused: {text}{hint}", never_ran=never_ran)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            if text.startswith(_TOO_LONG):  # before anything of the cloud server heard of the call
                return CloudRefused(
                    f"the cloud at {self.address} takes no prompt of that length: {text}",
                    never_ran=not accepted,
                )
            return CloudLied(f"the cloud at {self.address} sent too much: {text}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            if not accepted and timeout_s >= min(SLOW_ANSWER_S, self._connect_timeout_s):
                self.record.failed()
            return CloudUnavailable(
                f"the cloud at {self.address} was not done within {round(timeout_s, 1):g} s",
                never_ran=False,
                answered=accepted,
            )
        if code is grpc.StatusCode.UNAVAILABLE:
            self.record.failed()
        return CloudUnavailable(
            f"the cloud at {self.address} failed: {text} ({code.name}){hint}", never_ran=False
        )


def _retry_after_s(status: Status) -> float | None:
    """How long the cloud wants to be left alone, as far as it is heeded."""
    retry = _detail(status, RetryInfo)
    if not retry.HasField("retry_delay"):
        return None
    milliseconds: int = retry.retry_delay.ToMilliseconds()
    return min(max(0.0, milliseconds / 1000), LONGEST_RETRY_S)


def _field(status: Status) -> str:
    """What of the request the cloud does not take, where it names that."""
    violations = _detail(status, BadRequest).field_violations
    return violations[0].field if violations else ""


def _price_micro_usd(status: Status) -> int | None:
    """What an image costs, where that is why the cloud refused it."""
    refusal = _detail(status, ErrorInfo)
    if refusal.reason == "PRICE_ABOVE_CEILING":
        with suppress(ValueError):  # a cloud's bad advice is none
            price = int(refusal.metadata["price_micro_usd"])
            return price if price >= 0 else None
    return None


def _detail(status: Status, kind: type[Detail]) -> Detail:
    """The status's detail of this kind; an empty one where it has none that can be read."""
    for packed in status.details:
        detail = kind()
        with suppress(DecodeError):  # a cloud's bad advice is none
            if packed.Unpack(detail):
                return detail
    return kind()
