"""Both programs as processes of their own, on models in miniature and, once it is there, on the starter."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloud_server.settings import STARTER as CLOUD_STARTER
from edge_agent.settings import STARTER
from tests.running import Process, short_folder

PRICE = 4_000  # micro-dollars that the cloud server charges
CEILING = 10_000  # what the daemon reserves: the default of --max-price


class Gate:
    """A door before the cloud server, which counts the connections made through it."""

    def __init__(self, port: int) -> None:
        self.connections = 0
        self._there = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                self.connections += 1
                try:
                    there = socket.create_connection(("127.0.0.1", self._there))
                except OSError:
                    here.close()
                    continue
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class World:
    """A pair of models, with the cloud server running."""

    name: str
    bundle: Path
    model: Path
    folder: Path
    cloud: Process = field(init=False)
    cloud_address: str = field(init=False)

    def start_cloud(self, listen: str) -> None:
        """Starts the cloud server, whose books lie in `folder`, and waits until it serves."""
        self.cloud = Process(
            "cloud_server",
            self.folder,
            *("--model", self.model, "--listen", listen, "--state", self.folder / "cloud-state"),
            *("--price-micro-usd", str(PRICE), "--max-steps", "1000"),
        )
        self.cloud.wait_for("serving", timeout_s=150)
        self.cloud_address = f"127.0.0.1:{self.cloud.wait_for('listening')['port']}"


def _worlds() -> Iterator[object]:
    yield "miniature"
    ready = (STARTER / "manifest.json").is_file() and (CLOUD_STARTER / "model_index.json").is_file()
    reason = "the starter's models are not there: edge-export starter makes them"
    yield pytest.param("starter", marks=pytest.mark.skipif(not ready, reason=reason))


@pytest.fixture(scope="module", params=_worlds())
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "starter":
        bundle, model = STARTER, CLOUD_STARTER
    else:
        bundle = request.getfixturevalue("routed_bundle")
        model = request.getfixturevalue("cloud_model")
    folder = short_folder()
    world = World(request.param, bundle, model, folder)
    try:
        world.start_cloud("127.0.0.1:0")
        yield world
    finally:
        world.cloud.end()
    shutil.rmtree(folder)


@dataclass
class Edge:
    """A daemon and the folder of its state."""

    process: Process
    address: str


StartEdge = Callable[..., Edge]


@pytest.fixture
def start_edge(world: World, tmp_path: Path) -> Iterator[StartEdge]:
    """Starts daemons of the world's bundle, and kills those that a test leaves behind."""
    started: list[Process] = []

    def start(*flags: str | Path) -> Edge:
        process = Process(
            "edge_agent",
            tmp_path,
            *("--bundle", world.bundle, "--listen", "127.0.0.1:0", "--threads", "1", *flags),
        )
        started.append(process)
        process.wait_for("serving")
        return Edge(process, process.wait_for("listening")["address"])

    yield start
    for process in started:
        process.end()


@pytest.fixture
def gate(world: World) -> Iterator[Gate]:
    gate = Gate(int(world.cloud_address.rpartition(":")[2]))
    yield gate
    gate.close()
