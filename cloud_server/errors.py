"""What can go wrong in the cloud server, and which gRPC status says so.

CloudServerError
├── InvalidRequest       INVALID_ARGUMENT
├── OffsetPastEnd        OUT_OF_RANGE
├── Unauthenticated      UNAUTHENTICATED
├── PriceAboveCeiling    FAILED_PRECONDITION
├── ImageWithheld        FAILED_PRECONDITION
├── AlreadyExists        ALREADY_EXISTS
├── NotKept              NOT_FOUND
├── QueueFull            RESOURCE_EXHAUSTED
├── DeadlineTooShort     DEADLINE_EXCEEDED
├── Unavailable          UNAVAILABLE
├── CallerGone           CANCELLED
├── GenerationFailed     INTERNAL
├── DeviceLost           INTERNAL; exit code 3
├── JournalError         INTERNAL
└── StartRefused         exit code 2
    ├── HubNotReached    exit code 3
    ├── DeviceNotReady   exit code 3
    └── JournalNotReady  exit code 3
"""

from __future__ import annotations

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2


class CloudServerError(Exception):
    """Base of every error this package raises on purpose. The message says what to do about it.

    `field` names the request field at fault; `retry_after_s` says when trying again may help, in seconds;
    `facts` are machine-readable strings that travel as google.rpc.ErrorInfo metadata; `log_only` is what the log says
    besides, and no caller hears.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        facts: dict[str, str] | None = None,
        log_only: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.facts = facts or {}
        self.log_only = log_only


class InvalidRequest(CloudServerError):
    """A field of the request cannot be served as it is."""


class OffsetPastEnd(CloudServerError):
    """resume_offset lies behind the image's last byte."""


class Unauthenticated(CloudServerError):
    """No bearer token, or one that stands for no tenant."""


class PriceAboveCeiling(CloudServerError):
    """The price is above what the caller would pay. Nothing ran."""


class ImageWithheld(CloudServerError):
    """The model's own safety checker blanked the image. Nothing is charged."""


class AlreadyExists(CloudServerError):
    """The request id is being made, made another image, or made one that is no longer kept."""


class NotKept(CloudServerError):
    """The rest of an image was asked for that is not kept."""


class QueueFull(CloudServerError):
    """As many requests wait as may wait. Nothing ran."""


class DeadlineTooShort(CloudServerError):
    """The image would come after the caller's deadline. Nothing ran."""


class Unavailable(CloudServerError):
    """The model is still loading, the server is shutting down, or has no room to write down a call. Nothing ran."""


class CallerGone(CloudServerError):
    """The caller went away, or stopped reading the stream."""


class GenerationFailed(CloudServerError):
    """The pipeline raised. Nothing is charged."""


class DeviceLost(CloudServerError):
    """The device computes nothing more for this process, which has to end. Nothing is charged."""

    exit_code = 3


class JournalError(CloudServerError):
    """The journal of generations cannot be read or written."""


class StartRefused(CloudServerError):
    """Settings, model, port or state folder with which no server can run."""

    exit_code = 2


class HubNotReached(StartRefused):
    """The model is to come from a hub that does not answer: starting again may help."""

    exit_code = 3


class DeviceNotReady(StartRefused):
    """Others have the device or its memory, or it is not up yet: starting again may help."""

    exit_code = 3


class JournalNotReady(StartRefused):
    """The disk is full, or another server has not let go of the journal yet: starting again may help."""

    exit_code = 3


GRPC_CODES: dict[type[CloudServerError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    OffsetPastEnd: grpc.StatusCode.OUT_OF_RANGE,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PriceAboveCeiling: grpc.StatusCode.FAILED_PRECONDITION,
    ImageWithheld: grpc.StatusCode.FAILED_PRECONDITION,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    NotKept: grpc.StatusCode.NOT_FOUND,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineTooShort: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    CallerGone: grpc.StatusCode.CANCELLED,
    GenerationFailed: grpc.StatusCode.INTERNAL,
    DeviceLost: grpc.StatusCode.INTERNAL,
    JournalError: grpc.StatusCode.INTERNAL,
}

ERROR_DOMAIN = "cloud.routet2i"  # the `domain` of google.rpc.ErrorInfo
MAX_MESSAGE_BYTES = 1_000  # a message travels in headers, twice and escaped, and gRPC takes 8 KiB of them


def grpc_status(error: CloudServerError) -> status_pb2.Status:
    """`error` as a google.rpc.Status, with BadRequest, RetryInfo and ErrorInfo details where they apply."""
    # What others say may be no text, as of a file whose name is not in UTF-8.
    message = error.message.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore")
    status = status_pb2.Status(code=GRPC_CODES[type(error)].value[0], message=message)
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.facts:
        name = _upper_snake(type(error).__name__)
        info = error_details_pb2.ErrorInfo(reason=name, domain=ERROR_DOMAIN, metadata=error.facts)
        status.details.add().Pack(info)
    return status


def reason(error: BaseException) -> str:
    """What an error of somebody else's says, on one line.

    Its class, which is Python's word and no user's, comes before what says nothing without it: a word, or nothing.
    """
    said, kind = " ".join(str(error).split()), type(error).__name__
    if " " in said:
        return said
    return f"{kind}: {said}" if said else kind


def _upper_snake(name: str) -> str:
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(name)).upper()
