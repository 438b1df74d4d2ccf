"""A local image through the agent's socket, beside the same calls made directly. Neither process imports torch.

Its own process is started as `python deploy/bench/overhead.py BUNDLE THREADS IMAGES PROVIDERS`.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import PIL.Image

from child import Reply, answer, asked
from clock import timed
from edge_agent.bundle import Bundle
from edge_agent.diffusion.generator import MOST_DIFFERENCE, Image
from edge_agent.diffusion.providers import CPU
from edge_agent.image import encode_png
from edge_agent.reader import Reader
from edge_agent.settings import ENVIRONMENT_PREFIX
from errors import BenchError
from estimate import calm, calm_ratio, quantile
from opening import opened
from plan import PROMPTS, Plan
from routet2i.edge.v1 import edge_pb2
from routet2i.edge.v1.edge_pb2_grpc import EdgeAgentServiceStub
from routet2i.image.v1 import image_pb2
from row import Row
from stream import IN_CALLERS_THREAD, running_stream

GROUP = "agent"
PERCENT, MILLISECONDS = 3.0, 3.0  # target: the larger of the two
SERIES = ("agent_ms", "direct_ms", "status_ms", "stream_ms")
DAEMONS = 3
"""One after the other: what one adds depends by 0.3 ms on where it came to lie in memory."""
LOADED_S, WARMED_UP_S, STOPPED_S = 120.0, 1800.0, 60.0
_POLL_S = 0.05


def rows(plan: Plan) -> list[Row]:
    """What the agent adds: socket, service, decision's account, worker thread, facts in the PNG, checksum."""
    found = asked(plan.threads, "overhead.py", plan.bundle, plan.threads, plan.answers, plan.providers)
    agent, direct = found["agent_ms"], found["direct_ms"]
    added = [ours - theirs for ours, theirs in zip(agent, direct, strict=True)]
    percent = quantile([100 * extra / theirs for extra, theirs in zip(added, direct, strict=True)])
    more = quantile(added)
    return [
        Row(
            GROUP,
            "added by the agent to a local image",
            "%",
            f"<= {PERCENT:g} % or {MILLISECONDS:g} ms",
            percent,
            percent.value <= PERCENT or more.value <= MILLISECONDS,
            note=f"{more.value:+.2f} ms [{more.low:.2f}, {more.high:.2f}] to {quantile(direct).value:.1f} ms of "
            "reading the prompt, diffusion and PNG, until the app has image and result; gRPC's status comes "
            f"{quantile(found['status_ms']).value:.2f} ms later",
            calm=100 * (calm_ratio(agent, direct) - 1),
            details=found,
        ),
        Row.untargeted(
            GROUP,
            "a gRPC stream of the same messages with nothing behind it",
            quantile(found["stream_ms"]),
            "ms",
            note="the part of it that no server in Python is without",
            calm=calm(found["stream_ms"]),
        ),
    ]


def measure(folder: Path, threads: int, images: int, providers: str = CPU) -> Reply:
    """Images through the agent, directly, and messages alone, in turns, in milliseconds."""
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    generator = opened(folder, threads, providers)
    reader = Reader(bundle, generator.tokenizer, generator.text_encoder, routing_rate=0.5)
    negative = generator.encode_negative("")  # the agent keeps these too

    def direct(prompt: str, seed: int) -> bytes:
        states = reader.read(prompt).states
        steps, guidance = manifest.default_steps, manifest.default_guidance
        *_, image = generator.generate(states, negative, seed, steps, guidance)
        assert isinstance(image, Image)  # noqa: S101  # the last event
        return encode_png(image.pixels)

    found: Reply = {name: [] for name in SERIES}
    for _ in range(DAEMONS):
        with running_agent(folder, threads, providers) as (stub, _), running_stream() as stream:
            here: Reply = {name: [] for name in SERIES}
            for number in range(images // DAEMONS + 1):
                prompt, answer = PROMPTS[number % len(PROMPTS)], Answer(stub)
                makers = [("agent_ms", answer.image), ("direct_ms", direct)]
                pngs = []
                for name, make in makers if number % 2 else reversed(makers):
                    with timed(here[name]):
                        pngs.append(make(prompt, number))
                    if name == "agent_ms":
                        with timed(here["status_ms"]):
                            answer.end()
                if not same(*map(pixels, pngs), providers):
                    raise BenchError("the agent's image is not the one that the same calls make directly")
                here["stream_ms"].append(stream(answer.sizes, here["direct_ms"][-1] / 1e3) * 1e3)
            for name, series in here.items():
                found[name] += series[1:]  # the first pair warmed both up
    return found


class Answer:
    """The agent's answer to one call."""

    def __init__(self, stub: EdgeAgentServiceStub) -> None:
        self._stub = stub

    def image(self, prompt: str, seed: int) -> bytes:
        """The PNG, as soon as the result is there to check it by."""
        request = edge_pb2.GenerateRequest(image=image_pb2.ImageRequest(prompt=prompt, seed=seed))
        self._call, self._messages = self._stub.Generate(request), list[edge_pb2.GenerateResponse]()
        for message in self._call:
            self._messages.append(message)
            if message.HasField("result"):
                break
        return b"".join(message.image_chunk.data for message in self._messages)

    def end(self) -> None:
        """Waits for gRPC's status. Raises RpcError where it is none of success."""
        for message in self._call:
            raise BenchError(f"the agent sent more than the result: {message}")

    @property
    def sizes(self) -> list[int]:
        """Bytes of each message."""
        return [message.ByteSize() for message in self._messages]


def pixels(png: bytes) -> np.ndarray:
    """The PNG's pixels, without what its text chunks say."""
    return np.asarray(PIL.Image.open(io.BytesIO(png)))


def same(one: np.ndarray, other: np.ndarray, providers: str) -> bool:
    """Whether the pixels are those of one image. Elsewhere than on the CPU they may differ by what rounding makes of
    them: CUDA's convolutions are chosen anew for each session, by how long they take.
    """
    allowed = 0.0 if providers == CPU else MOST_DIFFERENCE
    return bool(np.linalg.norm(one - other.astype(float)) <= allowed * np.linalg.norm(other))


@contextmanager
def running_agent(
    folder: Path, threads: int, providers: str, *more: str
) -> Iterator[tuple[EdgeAgentServiceStub, int]]:
    """`edge-agent serve` on a socket of its own, once its models are loaded on the best of the providers, and its
    process id.
    """
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    with tempfile.TemporaryDirectory() as state:
        address = f"unix:{state}/agent.sock"
        settings = ["--listen", address, "--state", state, "--bundle", str(folder), "--threads", str(threads)]
        settings += ["--providers", providers, *more]
        log = Path(state) / "edge-agent.log"  # not the terminal's: the table is to be read there
        with log.open("wb") as file:
            command = [sys.executable, "-m", "edge_agent", "serve", *settings]
            daemon = subprocess.Popen(command, env=environment, stderr=file)
        try:
            _wait(daemon, log)
            with grpc.insecure_channel(address, options=IN_CALLERS_THREAD) as channel:
                stub = EdgeAgentServiceStub(channel)
                _wait_until_warm(stub, providers.split(",")[0])
                yield stub, daemon.pid
        finally:
            daemon.terminate()
            try:
                daemon.wait(STOPPED_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _wait(daemon: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + LOADED_S
    while "event=serving" not in log.read_text(errors="replace"):
        if time.monotonic() > until or daemon.poll() is not None:
            raise BenchError(
                f"edge-agent serve did not get ready:\n{log.read_text(errors='replace').strip()}"
            )
        time.sleep(_POLL_S)


def _wait_until_warm(stub: EdgeAgentServiceStub, best: str) -> None:
    until = time.monotonic() + WARMED_UP_S
    while True:
        found = stub.GetStatus(edge_pb2.GetStatusRequest()).providers
        standing = next(provider for provider in found if provider.name == best)
        if standing.state == edge_pb2.PROVIDER_STATE_IN_USE:
            return
        if standing.state != edge_pb2.PROVIDER_STATE_WARMING_UP or time.monotonic() > until:
            raise BenchError(f"edge-agent does not use {best}: {standing.reason}")
        time.sleep(_POLL_S)


if __name__ == "__main__":
    bundle_folder, thread_count, image_count, names = sys.argv[1:]
    answer(lambda: lambda: measure(Path(bundle_folder), int(thread_count), int(image_count), names))
