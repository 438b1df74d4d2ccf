"""One call as bytes, for what no gRPC client sends."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

import grpc

from edge_agent.settings import split_address

CLOSES_THE_ADDRESS = tuple(map(int, grpc.__version__.split(".")[:2])) >= (1, 84)
"""Whether gRPC does so at a call whose method is no UTF-8; before, that call alone failed."""

_HEADERS, _DATA, _SETTINGS = 1, 0, 4
_END_STREAM, _END_HEADERS = 1, 4


def call(address: str, method: bytes) -> None:
    """Calls `method`, such as /package.Service/Method, at unix:PATH or HOST:PORT; returns once there is an answer."""
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": method,
        b":authority": b"localhost",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }
    with _connected(address) as connection:
        connection.settimeout(10)
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, b"")
            + _frame(_HEADERS, _END_HEADERS, 1, b"".join(map(_literal, fields, fields.values())))
            + _frame(_DATA, _END_STREAM, 1, bytes(5))  # an empty message
        )
        with suppress(ConnectionError):
            connection.recv(1000)


def _connected(address: str) -> socket.socket:
    if not address.startswith("unix:"):
        return socket.create_connection(split_address(address))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address.removeprefix("unix:"))
    return connection


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field as it is, in HPACK."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
