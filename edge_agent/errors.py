"""Everything that can go wrong between a prompt and its image, and what the wire says about it.

RouteT2IError
├── InvalidRequest       the request cannot be served as it is written; `field` names the part
├── UnknownApp           the settings list the apps that may call, and this one is not among them
├── DuplicateRequest     this request id was used before and may have been charged
├── NotKept              the rest of an image is asked for that is not kept
├── DeadlinePassed       the caller's deadline is over
├── Busy                 the queue is full, `retry_after_s` says when to come back; or another process is at it
│   ├── NotLoaded          a graph that could be loaded before cannot be now
│   └── OutOfMemory        this device has too little memory for it now
├── QuotaExhausted       the budget or rate `budget` has no room for one more call
├── PolicyConflict       the caller asks for a route that this daemon cannot take
├── Cancelled            the caller went away
├── NotReady             the daemon is still loading its models
├── Draining             the daemon is shutting down
├── CloudError           the cloud did not deliver; `never_ran`: it certainly neither ran nor charged
│   ├── CloudUnavailable   not reached, overloaded, broke off or too slow: may work later
│   ├── CloudRefused       it will not serve this request: price, size, credentials
│   │   └── CloudUncalibrated  it hosts another model than the one for which it was chosen
│   └── CloudLied          what it sent is not what it said: hash, format, size, price
├── StartRefused         a setting is wrong, or the address to listen on cannot be had
│   └── DeviceNotReady     a provider that the settings name does not work, and may once it is tried again
├── BundleError          a bundle is incomplete, altered or of an unknown schema
│   ├── NotABundle         a folder without a manifest: something else
│   └── NewerBundle        whole, as far as can be seen, and of a schema that only a later edge-agent reads
├── LedgerError          the quota ledger cannot be read or written
├── StoreError           the folder of installed models cannot be read or written, or has no such model
├── PullFailed           a model did not come
│   ├── SourceUnreachable  not reached, overloaded or broke off: goes on later where it stopped
│   ├── SourceRefused      it has no such model, or not for us
│   └── SourceLied         what it sent is not what its manifest promises
└── GenerationFailed     the image could not be made on this device
    ├── ProcessEnded       a process that tried a graph was ended from outside, which says nothing of the graph
    └── Unfit              a provider runs nothing of a graph, or computes something else
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status


class RouteT2IError(Exception):
    """Base of the tree. `message` is for people: it says what is wrong and what to do.

    `field` names the part of the request that is wrong, `retry_after_s` the seconds after which trying again
    may help; both are None where they do not apply.
    """

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(RouteT2IError):
    """The request cannot be served as it is written."""


class UnknownApp(RouteT2IError):
    """The settings list the apps that may call, and this one is not among them."""


class DuplicateRequest(RouteT2IError):
    """This request id was used before and may have been charged; `retry_after_s` where it is not known yet."""


class NotKept(RouteT2IError):
    """The rest of an image is asked for that is not kept."""


class DeadlinePassed(RouteT2IError):
    """The caller's deadline is over."""


class Busy(RouteT2IError):
    """The queue is full, or another process is doing what only one can do at a time."""


class NotLoaded(Busy):
    """A graph that could be loaded before cannot be now."""


class OutOfMemory(Busy):
    """This device has too little memory for it now, which says nothing against the models."""


class QuotaExhausted(RouteT2IError):
    """A budget or rate, named by `budget`, has no room for one more call."""

    def __init__(self, message: str, *, budget: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.budget = budget


class PolicyConflict(RouteT2IError):
    """The caller asks for a route that this daemon cannot take."""


class Cancelled(RouteT2IError):
    """The caller went away."""


class NotReady(RouteT2IError):
    """The daemon is still loading its models."""


class Draining(RouteT2IError):
    """The daemon is shutting down and takes no new requests."""


class CloudError(RouteT2IError):
    """The cloud did not deliver an image.

    `never_ran` is True only when the cloud certainly neither ran nor charged the request, so that what was
    reserved for it can be released at once. Otherwise the outcome has to be looked up.
    """

    def __init__(self, message: str, *, never_ran: bool, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.never_ran = never_ran


class CloudUnavailable(CloudError):
    """The cloud was not reached, is overloaded, broke off or was too slow: it may work later.

    `answered` is True where the cloud server itself said so, or had accepted the call.
    """

    def __init__(
        self,
        message: str,
        *,
        never_ran: bool,
        retry_after_s: float | None = None,
        answered: bool = False,
    ) -> None:
        super().__init__(message, never_ran=never_ran, retry_after_s=retry_after_s)
        self.answered = answered


class CloudRefused(CloudError):
    """The cloud will not serve this request: price, size, credentials.

    `price_micro_usd` is what it asks, where that is why, `field` what it does not take of the request, where it names
    that, `withheld` whether its model's safety checker kept the image back, `gone` whether the id is that of an image
    which it does not send.
    """

    def __init__(
        self,
        message: str,
        *,
        never_ran: bool,
        price_micro_usd: int | None = None,
        field: str = "",
        withheld: bool = False,
        gone: bool = False,
    ) -> None:
        super().__init__(message, never_ran=never_ran)
        self.price_micro_usd = price_micro_usd
        self.field = field
        self.withheld = withheld
        self.gone = gone


class CloudUncalibrated(CloudRefused):
    """The cloud hosts another model than the one for which the calibration chose it. The call was ended."""


class CloudLied(CloudError):
    """What the cloud sent is not what it said it was. It may have charged all the same."""

    def __init__(self, message: str) -> None:
        super().__init__(message, never_ran=False)


class StartRefused(RouteT2IError):
    """The daemon cannot start: a setting is wrong, or the address to listen on cannot be had."""


class DeviceNotReady(StartRefused):
    """A provider that the settings name does not work, or no longer, and may once it is tried again."""


class BundleError(RouteT2IError):
    """A bundle is incomplete, altered or of an unknown schema; the message names the file."""


class NotABundle(BundleError):
    """A folder without a manifest: something else, which no command for models may delete."""


class NewerBundle(BundleError):
    """A bundle is of a schema that only a later edge-agent reads: to fetch it again does not help."""


class LedgerError(RouteT2IError):
    """The quota ledger cannot be read or written."""


class StoreError(RouteT2IError):
    """The folder of installed models cannot be read or written, or has no such model."""


class PullFailed(RouteT2IError):
    """A model did not come. Nothing of it can be seen among the installed ones."""


class SourceUnreachable(PullFailed):
    """The source of a model was not reached, is overloaded or broke off: a later pull goes on where it stopped."""


class SourceRefused(PullFailed):
    """The source has no such model, or not for us."""


class SourceLied(PullFailed):
    """What the source of a model sent is not what its manifest promises."""


class GenerationFailed(RouteT2IError):
    """The image could not be made on this device."""


class ProcessEnded(GenerationFailed):
    """A process of ours was ended from outside, which says nothing of what it tried."""


class Unfit(GenerationFailed):
    """A provider runs nothing of a graph, or computes something else. It would do so again."""


GRPC_CODES: dict[type[RouteT2IError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownApp: grpc.StatusCode.PERMISSION_DENIED,
    DuplicateRequest: grpc.StatusCode.ALREADY_EXISTS,
    NotKept: grpc.StatusCode.NOT_FOUND,
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    Busy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QuotaExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    PolicyConflict: grpc.StatusCode.FAILED_PRECONDITION,
    Cancelled: grpc.StatusCode.CANCELLED,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    Draining: grpc.StatusCode.UNAVAILABLE,
    CloudUnavailable: grpc.StatusCode.UNAVAILABLE,
    CloudRefused: grpc.StatusCode.FAILED_PRECONDITION,
    CloudLied: grpc.StatusCode.UNAVAILABLE,
    StartRefused: grpc.StatusCode.FAILED_PRECONDITION,
    BundleError: grpc.StatusCode.DATA_LOSS,
    LedgerError: grpc.StatusCode.FAILED_PRECONDITION,
    StoreError: grpc.StatusCode.FAILED_PRECONDITION,
    PullFailed: grpc.StatusCode.UNAVAILABLE,
    GenerationFailed: grpc.StatusCode.INTERNAL,
}
"""The one table from errors to gRPC status codes; a class that is not in it has its base's. A cloud error reaches the
wire only for a caller who asked for `cloud_only`; for everyone else the edge makes the image."""


MAX_MESSAGE_BYTES = 1_000
"""Longest message on the wire. It travels in headers, twice and escaped, and gRPC takes 8 KiB of them."""


MAX_RETRY_S = 315_576_000_000.0
"""Longest time that google.protobuf.Duration holds: ten thousand years."""


def grpc_code(error: BaseException) -> grpc.StatusCode:
    """The status code `error` has on the wire: its own class's, else its nearest base's, else INTERNAL."""
    for cls in type(error).__mro__:
        if cls in GRPC_CODES:
            return GRPC_CODES[cls]
    return grpc.StatusCode.INTERNAL


def status_details(error: BaseException) -> Status:
    """`error` as a google.rpc.Status with BadRequest, QuotaFailure and RetryInfo where they apply.

    An error outside the tree is a fault of this program: its text stays in the log and off the wire.
    """
    code: int = grpc_code(error).value[0]
    if not isinstance(error, RouteT2IError):
        return Status(code=code, message="internal error; the daemon's log has the details")
    message = error.message.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore")
    details: list[Message] = []
    if error.field:
        violation = BadRequest.FieldViolation(field=error.field, description=message)
        details.append(BadRequest(field_violations=[violation]))
    if isinstance(error, QuotaExhausted):
        details.append(
            QuotaFailure(violations=[QuotaFailure.Violation(subject=error.budget, description=message)])
        )
    if error.retry_after_s is not None:
        retry = RetryInfo()
        wait_s = min(max(0.0, error.retry_after_s), MAX_RETRY_S)  # whatever it is: 0 for NaN
        retry.retry_delay.FromMilliseconds(math.ceil(wait_s * 1000))
        details.append(retry)
    status = Status(code=code, message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def printable(text: str) -> str:
    """What another machine says, or a library, as a line fit for terminal and log: ? for what moves a cursor or hides.

    Windows ends what it says with an end of line, which gRPC puts in the midst of its own words.
    """
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def quoted(text: str) -> str:
    """As one word of a command that people copy. Windows' own shell knows no single quotes."""
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


def sent_status(error: grpc.RpcError) -> Status | None:
    """The google.rpc.Status that a server of ours sent with its error; None when gRPC itself made the error."""
    call: Any = error
    packed: Any = dict(call.trailing_metadata() or ()).get("grpc-status-details-bin")
    if packed is None:
        return None
    try:
        return Status.FromString(packed)
    except DecodeError:
        return None
