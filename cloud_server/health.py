"""grpc.health.v1: whether the server serves, for whoever asks once or watches."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloud_server.malformed import Malformed

Answer = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """One status for the whole process, which is `service`, or "".

    Not grpcio's own servicer: it writes to each watcher under the lock that a new status has to wait for. One who reads
    nothing would keep the others from being told, and the server from its end.
    """

    def __init__(self, service: str) -> None:
        self._services = ("", service)
        self._status: Any = Answer.NOT_SERVING
        self._changed = asyncio.Event()  # one for each status
        self._over = False

    def set(self, status: Any) -> None:
        """Says `status` from now on, and tells the watchers."""
        self._status = status
        self._changed.set()
        self._changed = asyncio.Event()

    def end(self) -> None:
        """Lets the watchers go. Whom the server's end would cut off, gRPC tells the log of, with a traceback."""
        self._over = True
        self._changed.set()

    async def Check(self, request: Any, context: Any) -> Answer:
        """The status now."""
        if await self._asked(request, context) not in self._services:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no such service here; there is {self._services[1]}"
            )
        return Answer(status=self._status)

    async def Watch(self, request: Any, context: Any) -> None:
        """The status now, and each that comes; one that passes while the watcher reads nothing is left out."""
        known = await self._asked(request, context) in self._services
        while True:
            changed = self._changed
            await context.write(Answer(status=self._status if known else Answer.SERVICE_UNKNOWN))
            await changed.wait()
            if self._over and changed is self._changed:  # the last status has been told
                return

    async def _asked(self, request: Any, context: Any) -> str:
        if isinstance(request, Malformed):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"the request cannot be read: {request.reason}"
            )
        service: str = request.service
        return service
