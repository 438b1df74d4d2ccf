"""What the edge's tests run and call: daemons in this process and in their own, an app's client, a scripted cloud."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from edge_agent.__main__ import main
from edge_agent.daemon import Daemon
from edge_agent.settings import resolve
from routet2i.cloud.v1 import cloud_pb2, cloud_pb2_grpc
from routet2i.edge.v1 import edge_pb2, edge_pb2_grpc
from routet2i.image.v1 import image_pb2

ROOT = Path(__file__).parents[1]
SERVICE = "routet2i.edge.v1.EdgeAgentService"
PREVIEWS = 150  # of a scripted cloud that sends many
Cloud = TypeVar("Cloud", bound=Any)  # a servicer with `address`, `connections` and `open`
DETAILS = (
    error_details_pb2.BadRequest,
    error_details_pb2.ErrorInfo,
    error_details_pb2.QuotaFailure,
    error_details_pb2.RetryInfo,
)
LOCAL, CLOUD = edge_pb2.ROUTING_LOCAL_ONLY, edge_pb2.ROUTING_CLOUD_ONLY

# With the predictor of random weights that tests.routed makes: PRS 0.4946 and 0.4761, alpha 0.4927 at a routing
# rate of one half. test_the_prompts_are_what_their_names_say fails where that changes.
EDGE_PROMPT, CLOUD_PROMPT = "a cat", "two dogs on the beach"


if sys.platform == "win32":
    # SIGTERM would end it. Ctrl-Break asks it to stop, but only in a group of its own: else it would ask us, too.
    STOP: int = signal.CTRL_BREAK_EVENT
    STOPPABLE = subprocess.CREATE_NEW_PROCESS_GROUP
else:
    STOP = signal.SIGTERM
    STOPPABLE = 0


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """What a refusal says beyond its message, by the kind of it."""
    details: dict[str, Any] = {}
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(value).details:
                for kind in DETAILS:
                    if packed.Is(kind.DESCRIPTOR):
                        details[kind.DESCRIPTOR.name] = kind.FromString(packed.value)
    return details


@dataclass
class Answer:
    """A Generate stream, read to its end, good or bad."""

    decision: edge_pb2.Decision | None = None
    progress: list[image_pb2.Progress] = field(default_factory=list)
    chunks: list[image_pb2.ImageChunk] = field(default_factory=list)
    result: edge_pb2.Result | None = None
    order: list[str] = field(default_factory=list)
    code: str = "OK"
    message: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def take(self, response: edge_pb2.GenerateResponse) -> str:
        kind: str = response.WhichOneof("event")
        self.order.append(kind)
        value = getattr(response, kind)
        if kind in ("decision", "result"):
            setattr(self, kind, value)
        else:
            (self.progress if kind == "progress" else self.chunks).append(value)
        return kind

    def fail(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.message = error.code().name, error.details() or ""
        self.details = details_of(error)

    @property
    def png(self) -> bytes:
        return b"".join(chunk.data for chunk in self.chunks)

    @property
    def picture(self) -> Image.Image:
        """The image, once its hash has been compared with the result's."""
        assert self.result is not None, (self.code, self.message)
        assert hashlib.sha256(self.png).hexdigest() == self.result.image.sha256
        picture = Image.open(io.BytesIO(self.png))
        picture.load()
        return picture

    @property
    def reason(self) -> str:
        assert self.decision is not None, (self.code, self.message)
        return edge_pb2.DecisionReason.Name(self.decision.reason).removeprefix("DECISION_REASON_").lower()

    @property
    def route(self) -> str:
        assert self.decision is not None, (self.code, self.message)
        return edge_pb2.Route.Name(self.decision.route).removeprefix("ROUTE_").lower()

    @property
    def served_by(self) -> str:
        assert self.result is not None, (self.code, self.message)
        return edge_pb2.Route.Name(self.result.served_by).removeprefix("ROUTE_").lower()

    @property
    def field(self) -> str:
        """The bad field that the error names."""
        name: str = self.details["BadRequest"].field_violations[0].field
        return name


class App:
    """An app on the device: a channel to a daemon and what it calls."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub: Any = edge_pb2_grpc.EdgeAgentServiceStub(channel)

    def call(
        self,
        prompt: str = EDGE_PROMPT,
        routing: int = 0,
        timeout: float | None = 60.0,
        preview: bool = False,
        **image: Any,
    ) -> Any:
        """Opens a Generate stream."""
        request = edge_pb2.GenerateRequest(
            image=image_pb2.ImageRequest(prompt=prompt, **image), routing=routing, preview=preview
        )
        return self.stub.Generate(request, timeout=timeout)

    async def generate(self, prompt: str = EDGE_PROMPT, **how: Any) -> Answer:
        return await self.read(self.call(prompt, **how))

    async def read(self, call: Any, until: str = "") -> Answer:
        """Reads to the end, or up to the first event of the kind `until`."""
        answer = Answer()
        try:
            async for response in call:
                if answer.take(response) == until:
                    break
        except grpc.aio.AioRpcError as error:
            answer.fail(error)
        return answer

    async def route(
        self, prompt: str = EDGE_PROMPT, routing: int = 0, explain: bool = False, **image: Any
    ) -> edge_pb2.Decision:
        request = edge_pb2.RouteRequest(
            image=image_pb2.ImageRequest(prompt=prompt, **image), routing=routing, explain=explain
        )
        return (await self.stub.Route(request, timeout=30)).decision

    async def quota(self, app: str = "") -> Any:
        return await self.stub.GetQuota(edge_pb2.GetQuotaRequest(app=app), timeout=30)

    async def budget(self) -> tuple[int, int]:
        """What the first budget has spent and reserved, in micro-dollars."""
        first = (await self.quota()).budgets[0]
        return first.spent_micro_usd, first.reserved_micro_usd

    async def status(self) -> edge_pb2.GetStatusResponse:
        return await self.stub.GetStatus(edge_pb2.GetStatusRequest(), timeout=30)

    async def health(self, service: str = SERVICE) -> str:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


@dataclass
class Here:
    """A daemon in this process, and an app of it."""

    daemon: Daemon
    app: App

    async def restless(self) -> None:
        """Returns once nothing is in flight and the device is free."""
        await self.daemon._service.idle()
        agent = self.daemon.agent
        await until(lambda: agent is not None and agent.device.images == 0)


@asynccontextmanager
async def daemon_here(bundle: Path | str, state: Path, **settings: Any) -> AsyncIterator[Here]:
    """A daemon in this process on a real socket, ready to serve, with a budget of $1 a day and cents as prices."""
    flags = {"listen": "127.0.0.1:0", "threads": "1", "grace_s": "20"}
    flags |= {"bundle": str(bundle), "state": str(state)}
    daemon = Daemon(resolve(flags | {name: str(value) for name, value in settings.items()}, {}))
    await daemon.startup()
    serving = asyncio.create_task(daemon.serve())
    try:
        async with grpc.aio.insecure_channel(daemon.address) as channel:
            await until(lambda: daemon._service.agent is not None or serving.done())
            if serving.done():
                serving.result()
            yield Here(daemon, App(channel))
    finally:
        daemon.stop()
        daemon.stop()  # no need to wait for what a failed test left
        await asyncio.gather(serving, return_exceptions=True)
        await daemon.shutdown()


async def until(holds: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Waits until `holds` returns something true, or awaits to it."""
    end = time.monotonic() + timeout_s
    while True:
        found = holds()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.02)


class Process:
    """`edge-agent serve`, or `cloud-server serve`, as a process of its own."""

    def __init__(
        self,
        package: str,
        folder: Path,
        *flags: str | Path,
        stderr: int | None = None,
        **environment: str,
    ) -> None:
        self.folder = folder
        self.log = folder / f"{package}-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", package, "serve", "--log-format", "json", *map(str, flags)]
        with self.log.open("wb") as file:
            self.popen = subprocess.Popen(
                command,
                stdout=file,
                stderr=file if stderr is None else stderr,
                cwd=folder,
                env=process_environment(folder, **environment),
                creationflags=STOPPABLE,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="backslashreplace")

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The log lines of calls."""
        return [line for line in self.lines if line["event"] == "call"]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log's; the last one may just be written."""
        whole = self.text.rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in whole if line.startswith("{")]

    def wait_for(self, event: str, timeout_s: float = 90.0) -> dict[str, Any]:
        """Waits for the log line of `event`."""
        end = time.monotonic() + timeout_s
        while True:
            for line in self.lines:
                if line["event"] == event:
                    return line
            assert self.popen.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.02)

    def wait_for_calls(self, number: int, timeout_s: float = 60.0, **having: Any) -> list[dict[str, Any]]:
        """The log lines of calls with these fields, once there are so many: they are written after the answer."""
        end = time.monotonic() + timeout_s
        while len(found := [call for call in self.calls if having.items() <= call.items()]) < number:
            assert time.monotonic() < end, self.text
            time.sleep(0.02)
        return found

    def wait_for_nothing_bad(self) -> bool:
        """Whether it has gone without a traceback or an error in its log."""
        return "Traceback" not in self.text and '"level": "error"' not in self.text

    def stop(self, number: int = STOP, timeout_s: float = 60.0) -> int:
        """Sends the signal; returns the exit code."""
        self.popen.send_signal(number)
        return self.popen.wait(timeout_s)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def end(self) -> None:
        """Kills it when a test is done, and gives its log to pytest, which shows it where that test has failed."""
        self.kill()
        sys.stdout.write(self.text)


@dataclass
class Finished:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Finished]


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `edge-agent` in this process, which is quicker, with settings and folders of a process of its own."""
    for name in [name for name in os.environ if name.startswith("EDGE_AGENT_")]:
        monkeypatch.delenv(name)
    for name, value in process_environment(folder).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str | Path) -> Finished:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse's way
            code = int(stopped.code or 0)
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return Finished(code, printed.out, printed.err)

    return run


def process_environment(folder: Path, **extra: str) -> dict[str, str]:
    """Of a program under test: settings only from `extra`, homes and sockets under `folder`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("EDGE_AGENT_", "CLOUD_SERVER_"))
    }
    paths = {
        "HOME": folder,
        "USERPROFILE": folder,
        "LOCALAPPDATA": folder,
        "XDG_CACHE_HOME": folder / "cache",
        "XDG_STATE_HOME": folder / "state",
        "XDG_DATA_HOME": folder / "data",
        "XDG_RUNTIME_DIR": folder,
    }
    if os.name == "nt":  # where the default address is the same for all
        address = f"127.0.0.1:{_port_of(folder)}"
        kept |= {"EDGE_AGENT_LISTEN": address, "EDGE_AGENT_ADDRESS": address}
    return kept | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}",
        "OMP_NUM_THREADS": "1",
        **{name: str(path) for name, path in paths.items()},
        **extra,
    }


@functools.cache
def _port_of(folder: Path) -> int:
    """A port that was free when the folder's first process began."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def as_shown(path: str) -> str:
    """A pattern for what messages call the path on this system."""
    return re.escape(str(Path(path)))


def short_folder() -> Path:
    """A folder whose path leaves room for a socket's name, whatever pytest's own folders are called."""
    return Path(tempfile.mkdtemp(prefix="edge-"))


async def _refuse(context: Any, code: grpc.StatusCode, message: str, field: str = "") -> None:
    """Ends a call as our servers do: with details, of which the bad `field` may be one."""
    status = status_pb2.Status(code=code.value[0], message=message)
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    await context.abort(code, message, (("grpc-status-details-bin", status.SerializeToString()),))


class ScriptedCloud(cloud_pb2_grpc.CloudServerServiceServicer):
    """A cloud server without a model, which keeps honest books and misbehaves as a test tells it to.

    `manner` is honest, refuse, drop (before it has accepted), break (after some progress), hang (the same, and then
    nothing), flood (previews without end), previews (many, then the image), lie (about the hash), text (which is no
    image), large (an image of another size), linger (a moment, after the image) or stay (without end).
    """

    PRICE = 5_000

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.manner = "honest"
        self.sizes: tuple[
            tuple[int, int], ...
        ] = ()  # width and height of the only images it makes; none: any
        self.received: list[cloud_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.asked = 0  # which model it has
        self.lookups: list[str] = []
        self.answerable: Callable[[str], bool] = lambda _: True  # a lookup of this id waits until it is
        self.charged: dict[str, int] = {}  # for each request id that was charged
        self.cancelled = 0
        self.connections = 0
        self.open = 0  # of the connections
        self.address = ""

    async def Generate(self, request: cloud_pb2.GenerateRequest, context: Any) -> None:
        self.received.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        wish = request.image
        if self.manner == "refuse":
            await _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "too dear")
        if self.sizes and (wish.width, wish.height) not in self.sizes:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "not of that size", field="width")
        if self.manner == "drop":
            await context.abort(grpc.StatusCode.INTERNAL, "the server broke")
        accepted = cloud_pb2.Accepted(
            queue_position=2, charged_micro_usd=self.PRICE, model_digest=self.digest
        )
        try:
            await context.write(cloud_pb2.GenerateResponse(accepted=accepted))
            for step in (1, 2, 3):
                progress = image_pb2.Progress(step=step, steps=3, preview=None)
                await context.write(cloud_pb2.GenerateResponse(progress=progress))
            if self.manner == "hang":
                await asyncio.sleep(3600)
            if self.manner in ("flood", "previews"):
                file = io.BytesIO()
                Image.effect_noise((400, 400), 100).save(file, "PNG")
                progress = image_pb2.Progress(step=3, steps=3, preview=file.getvalue())
                for _ in itertools.count() if self.manner == "flood" else range(PREVIEWS):
                    await context.write(cloud_pb2.GenerateResponse(progress=progress))
            if self.manner == "break":
                self.charged[wish.request_id] = self.PRICE  # it was made; only the way back broke
                await context.abort(grpc.StatusCode.INTERNAL, "the server broke")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        png = b"not an image at all" if self.manner == "text" else self.image(wish)
        self.charged[wish.request_id] = self.PRICE
        sha256 = hashlib.sha256(png if self.manner != "lie" else b"another").hexdigest()
        for start in range(0, len(png), 65_536):
            chunk = image_pb2.ImageChunk(offset=start, data=png[start : start + 65_536])
            await context.write(cloud_pb2.GenerateResponse(image_chunk=chunk))
        info = image_pb2.ImageInfo(
            sha256=sha256,
            total_bytes=len(png),
            width=wish.width,
            height=wish.height,
            seed=wish.seed,
            steps=3,
            guidance_scale=3.0,
            model_digest=self.digest,
        )
        await context.write(
            cloud_pb2.GenerateResponse(
                result=cloud_pb2.Result(
                    request_id=wish.request_id,
                    image=info,
                    charged_micro_usd=self.PRICE,
                    timings=[image_pb2.Timing(stage="generate", milliseconds=12.5)],
                )
            )
        )
        try:
            await asyncio.sleep({"linger": 0.2, "stay": 3600}.get(self.manner, 0))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def GetModel(self, request: cloud_pb2.GetModelRequest, context: Any) -> cloud_pb2.GetModelResponse:
        self.asked += 1
        return cloud_pb2.GetModelResponse(model_digest=self.digest)

    async def LookupGeneration(
        self, request: cloud_pb2.LookupGenerationRequest, context: Any
    ) -> cloud_pb2.LookupGenerationResponse:
        self.lookups.append(request.request_id)
        await until(lambda: self.answerable(request.request_id))
        charged = self.charged.get(request.request_id)
        arrived = any(request.request_id == received.image.request_id for received in self.received)
        state = "GENERATION_STATE_CANCELLED" if arrived else "GENERATION_STATE_UNKNOWN"
        if charged is not None:
            state = "GENERATION_STATE_FINISHED"
        return cloud_pb2.LookupGenerationResponse(
            request_id=request.request_id,
            state=cloud_pb2.GenerationState.Value(state),
            charged=charged is not None,
            charged_micro_usd=charged or 0,
        )

    def image(self, wish: image_pb2.ImageRequest) -> bytes:
        side = 32 if self.manner == "large" else 0
        pixels = np.random.default_rng(wish.seed).integers(
            0, 256, (wish.height + side, wish.width + side, 3), dtype=np.uint8
        )
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


@asynccontextmanager
async def scripted_cloud(digest: str) -> AsyncIterator[ScriptedCloud]:
    """The scripted cloud on a real socket."""
    async with counted(ScriptedCloud(digest)) as cloud:
        yield cloud


@asynccontextmanager
async def counted(cloud: Cloud) -> AsyncIterator[Cloud]:
    """`cloud`, as it is, behind a listener that counts the connections made to it."""
    server = grpc.aio.server()
    cloud_pb2_grpc.add_CloudServerServiceServicer_to_server(cloud, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cloud.connections += 1
        cloud.open += 1
        with suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))
        cloud.open -= 1

    listener = await asyncio.start_server(forward, "127.0.0.1", 0)
    cloud.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield cloud
    finally:
        listener.close()
        await server.stop(None)
