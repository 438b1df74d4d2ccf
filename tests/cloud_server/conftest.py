"""A real cloud server on a real socket, with a tiny seeded random pipeline behind it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

import tests.running
from cloud_server.server import Server
from cloud_server.settings import Settings
from routet2i.cloud.v1 import cloud_pb2, cloud_pb2_grpc
from routet2i.image.v1 import image_pb2

PRICE = 4_000  # micro-dollars


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion in miniature, with a card that says steps and guidance and leaves the sizes free."""
    from tests.miniature import save_miniature

    folder = save_miniature(tmp_path_factory.mktemp("miniature") / "miniature")
    card = {"name": "miniature", "licence": "Apache-2.0", "steps": 4, "guidance_scale": 3.0}
    (folder / "routet2i.json").write_text(json.dumps(card))
    return folder


@dataclass
class Client:
    """What a caller of the cloud server sees."""

    channel: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self.stub: Any = cloud_pb2_grpc.CloudServerServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    def call(self, timeout: float | None = 60.0, preview: bool = False, **wish: Any) -> Any:
        """Opens a Generate stream."""
        wish = {"request_id": uuid.uuid4().hex, "prompt": "a cat on the beach", "seed": 7} | wish
        request = cloud_pb2.GenerateRequest(image=image_pb2.ImageRequest(**wish), preview=preview)
        return self.stub.Generate(request, timeout=timeout, metadata=self.metadata)

    async def generate(self, **wish: Any) -> Answer:
        """Reads a Generate stream to its end, good or bad."""
        return await self.read(self.call(**wish))

    async def read(self, call: Any) -> Answer:
        answer = Answer()
        try:
            async for response in call:
                answer.take(response)
        except grpc.aio.AioRpcError as error:
            answer.error = Refusal.of(error)
        return answer

    async def lookup(self, request_id: str) -> cloud_pb2.LookupGenerationResponse:
        request = cloud_pb2.LookupGenerationRequest(request_id=request_id)
        return await self.stub.LookupGeneration(request, timeout=30, metadata=self.metadata)

    async def state(self, request_id: str) -> str:
        state = (await self.lookup(request_id)).state
        return cloud_pb2.GenerationState.Name(state).removeprefix("GENERATION_STATE_")

    async def health_status(self, service: str = "routet2i.cloud.v1.CloudServerService") -> str:
        response = await self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


@dataclass
class Refusal:
    code: str
    message: str
    details: dict[str, Any]

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> Refusal:
        return cls(error.code().name, error.details() or "", tests.running.details_of(error))

    @property
    def field(self) -> str:
        return self.details["BadRequest"].field_violations[0].field


@dataclass
class Answer:
    accepted: cloud_pb2.Accepted | None = None
    progress: list[image_pb2.Progress] = field(default_factory=list)
    chunks: list[image_pb2.ImageChunk] = field(default_factory=list)
    result: cloud_pb2.Result | None = None
    error: Refusal | None = None
    order: list[str] = field(default_factory=list)

    def take(self, response: cloud_pb2.GenerateResponse) -> None:
        kind = response.WhichOneof("event")
        if kind is None:  # said so that no proxy takes the call for dead
            return
        self.order.append(kind)
        value = getattr(response, kind)
        if kind in ("accepted", "result"):
            setattr(self, kind, value)
        else:
            (self.progress if kind == "progress" else self.chunks).append(value)

    @property
    def png(self) -> bytes:
        return b"".join(chunk.data for chunk in self.chunks)


@dataclass
class Running:
    """A server in this process, and the denoiser passes its model has made."""

    server: Server
    client: Client
    passes: list[int] = field(default_factory=lambda: [0])

    async def idle(self) -> None:
        """Returns once nothing is in flight."""
        async with asyncio.timeout(30):
            await self.server._service.idle()

    @property
    def pipeline(self) -> Any:
        serving = self.server._service.serving
        assert serving is not None
        return serving.generator._pipeline


@asynccontextmanager
async def serve(state: Path, model: Path | str, **settings: Any) -> AsyncIterator[Running]:
    """A server in this process, ready to serve, and a client of it."""
    chosen: dict[str, Any] = {"listen": "127.0.0.1:0", "price_micro_usd": PRICE, "grace_s": 20.0}
    server = Server(Settings(state=str(state), model=str(model), **(chosen | settings)))
    await server.startup()
    serving = asyncio.create_task(server.serve())
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            running = Running(server, Client(channel))
            while server._service.serving is None:
                assert not serving.done(), serving.exception()
                await asyncio.sleep(0.01)

            def count(*_: Any) -> None:
                running.passes[0] += 1

            running.pipeline.unet.register_forward_hook(count)
            yield running
    finally:
        server.stop()
        await asyncio.gather(serving, return_exceptions=True)
        await server.shutdown()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> AsyncIterator[Running]:
    async with serve(tmp_path_factory.mktemp("state"), model_folder, max_queue=1) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def running(shared: Running) -> AsyncIterator[Running]:
    """The module's server, with nothing in flight and its passes counted from zero."""
    shared.passes[0] = 0
    yield shared
    await shared.idle()


class Process(tests.running.Process):
    """`cloud-server serve` as a process of its own, waited for without holding up the event loop."""

    async def until(self, words: str, timeout_s: float = 90.0) -> str:
        """Waits for a log line with these words."""
        async with asyncio.timeout(timeout_s):
            while True:
                for line in self.text.splitlines():
                    if words in line:
                        return line
                assert self.popen.poll() is None, self.text
                await asyncio.sleep(0.02)

    async def address(self) -> str:
        line = await self.until('"listening"')
        return f"127.0.0.1:{json.loads(line)['port']}"

    async def exit_code(self, timeout_s: float = 60.0) -> int:
        return await asyncio.to_thread(self.popen.wait, timeout_s)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts processes, and kills those that a test leaves behind."""
    started: list[Process] = []

    def start(*flags: str | Path, module: str = "cloud_server", stderr: int | None = None) -> Process:
        started.append(Process(module, tmp_path, *flags, stderr=stderr))
        return started[-1]

    yield start
    for process in started:
        process.end()
