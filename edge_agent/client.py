"""The client of a running daemon, as the commands use it: plain gRPC on one side, the project's own types on the other.

An app needs none of this: docs/examples/client.py shows the same in twenty lines on the generated code.
"""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.rpc.error_details_pb2 import QuotaFailure
from google.rpc.status_pb2 import Status

from edge_agent.address import split_address
from edge_agent.budget import BudgetState, RateState
from edge_agent.errors import InvalidRequest, RouteT2IError, printable, sent_status
from edge_agent.image import Progress
from edge_agent.policy import Decision, Reason, Route, TokenPull
from edge_agent.request import Routing, check_request_id
from routet2i.edge.v1 import edge_pb2
from routet2i.edge.v1.edge_pb2_grpc import EdgeAgentServiceStub
from routet2i.image.v1 import image_pb2

CONNECT_S = 2.0
"""The daemon is on this machine: what does not answer by then is not there."""

ANSWER_S = 10.0
"""What a daemon may take to say how things are: it needs milliseconds, and one that is stopped never answers."""

# Exit codes of the commands.
DONE, BROKEN, BAD_INPUT, UNREACHABLE, REFUSED = 0, 1, 2, 3, 4

_EXIT_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: BAD_INPUT,
    grpc.StatusCode.PERMISSION_DENIED: BAD_INPUT,
    grpc.StatusCode.ALREADY_EXISTS: BAD_INPUT,
    grpc.StatusCode.NOT_FOUND: BAD_INPUT,
    grpc.StatusCode.UNIMPLEMENTED: BAD_INPUT,
    grpc.StatusCode.DATA_LOSS: BAD_INPUT,  # the model's files are to be mended, and the program is not
    grpc.StatusCode.UNAVAILABLE: UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: UNREACHABLE,
    grpc.StatusCode.FAILED_PRECONDITION: REFUSED,
}

_LATE = "was not done in time; allow more with --timeout"
_SILENT = "does not answer; see whether it is stopped or stuck, and restart it"
_NO_ANSWER = "timed out before receiving SETTINGS frame"  # gRPC's words where nothing ever came back

Meaning = TypeVar("Meaning")

# What the numbers of the wire's enums mean.
_ROUTES: Mapping[int, Route] = {edge_pb2.ROUTE_EDGE: "edge", edge_pb2.ROUTE_CLOUD: "cloud"}
_REASONS: Mapping[int, Reason] = {
    edge_pb2.DecisionReason.Value(f"DECISION_REASON_{reason.name}"): reason for reason in Reason
}
_HEALTHS: Mapping[int, str] = {
    number: name.removeprefix("CLOUD_HEALTH_").lower() for name, number in edge_pb2.CloudHealth.items()
}
_STATES: Mapping[int, str] = {
    number: name.removeprefix("PROVIDER_STATE_").lower() for name, number in edge_pb2.ProviderState.items()
}


class CallFailed(RouteT2IError):
    """The daemon is out of reach or said no; `exit_code` is the command's. `no_room`: it has no room now, it said."""

    def __init__(self, message: str, exit_code: int, *, no_room: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.no_room = no_room


@dataclass(frozen=True)
class Received:
    """The finished image as it arrived, with its facts."""

    png: bytes
    request_id: str
    served_by: Route
    fallback_error: str
    seed: int
    width: int
    height: int
    sha256: str
    cost_micro_usd: int
    timings_ms: dict[str, float]


_OPTIONS = (
    # A proxy for the world outside must not stand between two processes of this machine.
    ("grpc.enable_http_proxy", 0),
    # Else a thread of gRPC's reads the stream, and a Ctrl-C before it has begun leaves a channel that waits for it to
    # end when it is closed.
    ("SingleThreadedUnaryStream", 1),
)


class AgentClient:
    """One daemon at `address` (unix:PATH or HOST:PORT). Every method raises CallFailed."""

    def __init__(self, address: str, timeout_s: float | None = None) -> None:
        self.address = address
        self._timeout_s = timeout_s

    def reachable(self) -> bool:
        """Whether something listens there. Raises InvalidRequest when the address is not one."""
        try:
            if sys.platform != "win32" and self.address.startswith("unix:"):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    probe.settimeout(CONNECT_S)
                    probe.connect(self.address.removeprefix("unix:"))
            else:
                socket.create_connection(split_address(self.address), CONNECT_S).close()
        except OSError:
            return False
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        return True

    def generate(
        self, *, routing: Routing = Routing.AUTO, **fields: Any
    ) -> Iterator[Decision | Progress | Received]:
        """The decision, progress, then the image, whose sha256 is checked. `fields` are the wire's ImageRequest's."""
        request = edge_pb2.GenerateRequest(image=_image_request(fields), routing=f"ROUTING_{routing.name}")
        png = bytearray()
        received = None
        with self._stub() as stub:
            for response in stub.Generate(request, timeout=self._timeout_s):
                kind = response.WhichOneof("event")
                if kind == "decision":
                    yield decision(response.decision)
                elif kind == "progress":
                    yield Progress(response.progress.step, response.progress.steps, None)
                elif kind == "image_chunk":
                    png += response.image_chunk.data
                elif kind == "result":
                    # Not yet handed out: leaving before the stream has ended would look like a cancellation.
                    received = _received(bytes(png), response.result)
        if received is None:
            raise CallFailed(
                f"the daemon at {self.address} ended its answer before the image was complete", BROKEN
            )
        yield received

    def route(self, prompt: str, *, explain: bool = False, **fields: Any) -> Decision:
        """Only the decision. With `explain` its tokens have `prs_without`."""
        request = edge_pb2.RouteRequest(image=_image_request({"prompt": prompt, **fields}), explain=explain)
        with self._stub() as stub:
            return decision(stub.Route(request, timeout=self._timeout_s).decision)

    def quota(self, app: str = "") -> tuple[list[BudgetState], list[RateState]]:
        """The budgets that count for `app`, all of them when it is empty; and the rates."""
        _check_text("app", app)
        with self._stub(_SILENT) as stub:
            answer = stub.GetQuota(edge_pb2.GetQuotaRequest(app=app), timeout=self._timeout_s or ANSWER_S)
        rates = [RateState(rate.name, rate.max_calls, rate.per_seconds, rate.calls) for rate in answer.rates]
        return [_budget(budget) for budget in answer.budgets], rates

    def status(self) -> dict[str, Any]:
        """What the daemon is doing: the wire's GetStatusResponse as plain values."""
        with self._stub(_SILENT) as stub:
            answer = stub.GetStatus(edge_pb2.GetStatusRequest(), timeout=self._timeout_s or ANSWER_S)
        facts = _plain(answer)
        for name in ("alpha", "paced_rate"):
            facts[name] = getattr(answer, name) if answer.HasField(name) else None
        facts["cloud_health"] = _meaning(_HEALTHS, answer.cloud_health)
        facts["providers"] = [
            {
                "name": provider.name,
                "state": _meaning(_STATES, provider.state),
                "reason": provider.reason,
            }
            for provider in answer.providers
        ]
        facts |= {name: list(facts[name]) for name in ("advice", "predecessors")}
        return facts

    def reload(self, model: str) -> dict[str, Any]:
        """Has the daemon take up `model`; what serves now. CallFailed names the file that was refused."""
        with self._stub() as stub:
            answer = stub.ReloadModel(edge_pb2.ReloadModelRequest(model=model))
        return _plain(answer)

    def models(self) -> list[dict[str, Any]]:
        """The models: the wire's Model as plain values."""
        with self._stub(_SILENT) as stub:
            answer = stub.ListModels(edge_pb2.ListModelsRequest(), timeout=self._timeout_s or ANSWER_S)
        return [
            _plain(model)
            | {
                "side": _meaning(_ROUTES, model.side),
                "steps": list(model.steps),
                "price_micro_usd": model.price_micro_usd if model.HasField("price_micro_usd") else None,
                "sizes": [[size.width, size.height] for size in model.sizes],
            }
            for model in answer.models
        ]

    def must_be_reachable(self) -> None:
        """Raises CallFailed where nothing listens there, and InvalidRequest when the address is not one."""
        if not self.reachable():
            raise CallFailed(
                f"no edge-agent answers at {self.address}; start one with `edge-agent serve`, or name its address "
                "with --agent",
                UNREACHABLE,
            )

    @contextmanager
    def _stub(self, late: str = _LATE) -> Iterator[EdgeAgentServiceStub]:
        """For one call, whose failure becomes CallFailed; `late` is said of a daemon that takes too long."""
        self.must_be_reachable()
        with grpc.insecure_channel(self.address, options=_OPTIONS) as channel:
            try:
                yield EdgeAgentServiceStub(channel)
            except grpc.RpcError as error:
                raise _explained(error, self.address, late) from error


def _explained(error: grpc.RpcError, address: str, late: str) -> CallFailed:
    call: Any = error
    code, status = call.code(), sent_status(error)
    message = call.details() or code.name
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        message = f"the daemon at {address} {late}"
    elif code is grpc.StatusCode.UNIMPLEMENTED:  # gRPC's own words are "Method not found!"
        message = f"what answers at {address} is no edge-agent, or an older one; name the daemon with --agent"
    elif code is grpc.StatusCode.UNAVAILABLE and _NO_ANSWER in message:
        message = f"the daemon at {address} {_SILENT}"  # the system took the connection in its place
    elif code is grpc.StatusCode.UNAVAILABLE and status is None:
        message = (
            f"the daemon at {address} went away before it was done: see its log, and the system's for a process "
            f"ended for want of memory ({printable(message)})"
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return CallFailed(message, _exhausted(status), no_room=True)
    return CallFailed(message, _EXIT_CODES.get(code, BROKEN))


def _exhausted(status: Status | None) -> int:
    """The exit code for RESOURCE_EXHAUSTED, which stands for three things."""
    if status is None:
        return BAD_INPUT  # from gRPC itself: the request is larger than any message may be
    if any(detail.Is(QuotaFailure.DESCRIPTOR) for detail in status.details):
        return REFUSED
    return UNREACHABLE  # the device's queue is full: later it is not


def _plain(message: Any) -> dict[str, Any]:
    """A message's fields by their names, as protobuf has them."""
    return {name: getattr(message, name) for name in message.DESCRIPTOR.fields_by_name}


def _image_request(fields: dict[str, Any]) -> image_pb2.ImageRequest:
    for name, value in fields.items():
        if isinstance(value, str):
            _check_text(name, value)
    return image_pb2.ImageRequest(**fields)


def _check_text(name: str, value: str) -> None:
    """Raises InvalidRequest for text that cannot travel: protobuf's strings are UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"character {error.start + 1} of the {name} is not valid UTF-8 "
            f"(U+{ord(value[error.start]):04X}, half of a surrogate pair); remove it",
            field=name,
        ) from error


def _meaning(table: Mapping[int, Meaning], number: int) -> Meaning:
    """What a number of the wire's means. Raises CallFailed for one that only a later version has."""
    if number not in table:
        known = ", ".join(str(getattr(meaning, "value", meaning)) for meaning in table.values())
        raise CallFailed(
            f"the daemon answered {number} where this command knows {known}: it may be newer than this command; "
            "update the command",
            BROKEN,
        )
    return table[number]


def decision(message: edge_pb2.Decision) -> Decision:
    """A decision off the wire. Raises CallFailed."""
    return Decision(
        route=_meaning(_ROUTES, message.route),
        reason=_meaning(_REASONS, message.reason),
        prs=message.prs if message.HasField("prs") else None,
        alpha=message.alpha if message.HasField("alpha") else None,
        edge_quality=tuple(metric.value for metric in message.edge_quality),
        cloud_quality=tuple(metric.value for metric in message.cloud_quality),
        tokens=tuple(
            TokenPull(
                token.text,
                tuple(metric.value for metric in token.pull),
                token.prs_without if token.HasField("prs_without") else None,
            )
            for token in message.tokens
        ),
        quota=tuple(_budget(budget) for budget in message.quota),
        timings_ms={timing.stage: timing.milliseconds for timing in message.timings},
        prompt_truncated=message.prompt_truncated,
        unfamiliar=tuple(message.unfamiliar),
    )


def _received(png: bytes, result: edge_pb2.Result) -> Received:
    try:
        check_request_id(result.request_id)  # a file may be named after it
    except InvalidRequest as error:
        raise CallFailed(f"what the daemon answered is wrong: {error.message}", BROKEN) from error
    if hashlib.sha256(png).hexdigest() != result.image.sha256:
        raise CallFailed("the image was damaged on its way: its sha256 is not the one it came with", BROKEN)
    return Received(
        png=png,
        request_id=result.request_id,
        served_by=_meaning(_ROUTES, result.served_by),
        fallback_error=result.fallback_error,
        seed=result.image.seed,
        width=result.image.width,
        height=result.image.height,
        sha256=result.image.sha256,
        cost_micro_usd=result.cost_micro_usd,
        timings_ms={timing.stage: timing.milliseconds for timing in result.timings},
    )


def _budget(budget: edge_pb2.BudgetState) -> BudgetState:
    window: Any = budget.window
    return BudgetState(
        budget.name,
        window,
        budget.cap_micro_usd,
        budget.spent_micro_usd,
        budget.reserved_micro_usd,
        budget.remaining_micro_usd,
        budget.app or None,
    )
