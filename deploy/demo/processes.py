"""The demo's two servers: real processes on loopback, each with a log file, waited for and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_S = 300.0
"""Importing torch and loading a model takes seconds; on a busy single-board computer, minutes."""

STOP_S = 15.0
"""Longer than the grace period the servers get to finish an image."""

if sys.platform == "win32":
    # There SIGTERM ends a process at once, and Ctrl-Break, which asks it to stop, reaches groups alone.
    _STOP: int = signal.CTRL_BREAK_EVENT
    _OWN_GROUP = subprocess.CREATE_NEW_PROCESS_GROUP
else:
    _STOP, _OWN_GROUP = signal.SIGTERM, 0

GRACE_S = 5.0
POLL_S = 0.1
TAIL_LINES = 12


class DidNotStart(Exception):
    """A server ended, or was not ready in time; the message ends with the tail of its log."""


class Server:
    """`python -m PACKAGE serve ...` on a free loopback port. `stop()` it, whatever happens."""

    def __init__(self, package: str, options: Mapping[str, object], log_file: Path) -> None:
        self.name = package.replace("_", "-")
        self.log_file = log_file
        self._address = ""
        flags = [f"--{name}={value}" for name, value in {**_COMMON, **options}.items()]
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", package, "serve", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=own_environment(),
                # Ctrl-C is the demo's, which then stops the servers in order.
                start_new_session=True,
                creationflags=_OWN_GROUP,
            )

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def address(self) -> str:
        """HOST:PORT, with the port that the server found free and wrote into its log. Raises DidNotStart."""
        self._wait_for(self._find_address)
        return self._address

    def wait_until_serving(self) -> None:
        """Returns when its health service answers SERVING. Raises DidNotStart."""
        with grpc.insecure_channel(self.address(), options=(("grpc.enable_http_proxy", 0),)) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            self._wait_for(lambda: _serving(health))

    def terminate(self) -> None:
        """Told so, it finishes what it is doing. Does not wait."""
        self._process.send_signal(_STOP)

    def stop(self) -> None:
        """Tells it so, and kills it where that does not end it in time."""
        self.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tail(self) -> str:
        """The last lines of its log."""
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or "  (it is empty)"

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + START_S
        while not ready():
            if not self.running:
                raise DidNotStart(
                    f"{self.name} ended with exit code {self._process.returncode}. The end of {self.log_file}:\n"
                    f"{self.tail()}"
                )
            if time.monotonic() > until:
                raise DidNotStart(
                    f"{self.name} was not ready after {START_S:.0f} s. The end of {self.log_file}:\n{self.tail()}"
                )
            time.sleep(POLL_S)

    def _find_address(self) -> bool:
        for line in self.log_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a library's warning, or a line that is just being written
            if isinstance(event, dict) and event.get("event") == "listening":
                host, _, port = event["address"].rpartition(":")
                self._address = f"{host}:{event.get('port', port)}"
        return bool(self._address)


_COMMON: dict[str, object] = {"listen": "127.0.0.1:0", "log-format": "json", "grace-s": GRACE_S}


def own_environment() -> dict[str, str]:
    """The environment without settings of other edge agents and cloud servers: the demo brings its own."""
    foreign = ("EDGE_AGENT_", "CLOUD_SERVER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def _serving(health: Any) -> bool:
    try:
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
