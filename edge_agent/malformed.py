"""Requests whose bytes are not what the .proto files describe: each service refuses them as it does others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError


@dataclass(frozen=True)
class Malformed:
    """What stands in for a request whose bytes are not what the .proto files describe."""

    reason: str


class HandOverMalformed(grpc.aio.ServerInterceptor):
    """Lets the services refuse malformed requests themselves; gRPC would answer UNKNOWN and log a traceback.

    Reflection, which is not ours, refuses one without a question in its own way, so that is what it gets.
    """

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """GRPC's hook; see the class."""
        handler = await continuation(details)
        if handler is None:
            return handler

        def deserialize(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError as error:
                if handler.request_streaming:
                    return handler.request_deserializer(b"")
                return Malformed(str(error))

        return handler._replace(request_deserializer=deserialize)
