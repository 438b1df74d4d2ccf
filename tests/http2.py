"""Calls and answers as bytes, for what no gRPC client or server sends."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from edge_agent.address import split_address

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7
_END_STREAM, _END_HEADERS = 1, 4
_WINDOW_SIZE = 4  # of a setting
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def call(address: str, method: bytes) -> None:
    """Calls `method`, such as /package.Service/Method, at unix:PATH or HOST:PORT; returns once there is an answer."""
    with _connected(address) as connection:
        connection.settimeout(10)
        connection.sendall(_call(method))
        with suppress(ConnectionError):
            connection.recv(1000)


@contextmanager
def unread(address: str, method: bytes) -> Iterator[None]:
    """Calls `method` and takes no byte of its answer."""
    with _connected(address) as connection:
        connection.sendall(_call(method, settings=struct.pack(">HI", _WINDOW_SIZE, 0)))
        yield


@asynccontextmanager
async def proxy(
    status: int,
    body: bytes,
    *,
    kind: str = "text/html",
    reset: int | None = None,
    goaway: int | None = None,
    after_s: float = 0.0,
) -> AsyncIterator[str]:
    """The address of what answers every call as proxies do: with this status and body, and no trailers.

    With `reset` the call ends with RST_STREAM and that code, with `goaway` its connection with that one's. `after_s` is
    how long after the body it ends.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readexactly(len(_PREFACE))
            writer.write(_frame(_SETTINGS, 0, 0, b""))
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3], "big"))
                if head[3] == _SETTINGS and not head[4]:
                    writer.write(_frame(_SETTINGS, 1, 0, b""))
                if head[3] == _HEADERS:
                    stream = int.from_bytes(head[5:], "big")
                    fields = _literal(b":status", b"%d" % status) + _literal(b"content-type", kind.encode())
                    writer.write(_frame(_HEADERS, _END_HEADERS, stream, fields))
                    writer.write(_frame(_DATA, 0, stream, body))
                    await asyncio.sleep(after_s)
                    if goaway is not None:
                        writer.write(_frame(_GOAWAY, 0, 0, struct.pack(">II", stream, goaway)))
                        break
                    if reset is None:
                        writer.write(_frame(_DATA, _END_STREAM, stream, b""))
                    else:
                        writer.write(_frame(_RST_STREAM, 0, stream, struct.pack(">I", reset)))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


def _call(method: bytes, settings: bytes = b"") -> bytes:
    """A new connection's first bytes: a call with an empty message."""
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": method,
        b":authority": b"localhost",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }
    return (
        _PREFACE
        + _frame(_SETTINGS, 0, 0, settings)
        + _frame(_HEADERS, _END_HEADERS, 1, b"".join(map(_literal, fields, fields.values())))
        + _frame(_DATA, _END_STREAM, 1, bytes(5))
    )


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
