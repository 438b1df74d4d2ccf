"""Where the daemon listens: at a Unix socket that only its user reaches, or at a loopback port of its own."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from edge_agent.address import split_address
from edge_agent.errors import StartRefused

PRIVATE = 0o700
"""Mode of the socket's folder: only the user whose daemon it is gets in."""


def check(address: str) -> None:
    """Make the socket's folder, where it is one. What then lies there, if anything, is a killed daemon's socket.

    Raises StartRefused when a daemon answers there, or something else lies there.
    """
    path = _socket(address)
    if path is None:
        return
    try:
        path.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        if not path.exists():
            return
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise StartRefused(f"{path} is there and is no socket; choose another with --listen unix:PATH")
        if _answers(path):
            raise StartRefused(
                f"an edge-agent is already running at {path}; use that one, stop it, or choose another --listen"
            )
    except OSError as error:
        raise StartRefused(
            f"cannot make the socket {path}: {error.strerror}; choose another with --listen unix:PATH"
        ) from error


def clear(address: str) -> None:
    """Take away the socket of a daemon that was killed. Raises what `check` does."""
    check(address)
    path = _socket(address)
    if path is None:
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StartRefused(f"cannot remove the old socket {path}: {error.strerror}") from error


def bind(server: grpc.aio.Server, address: str) -> str:
    """Have the server listen there; returns the address with the port that was found. Raises StartRefused."""
    before = os.umask(0o177)  # a socket file that only its owner may connect to
    try:
        port = 0 if _taken(address) else server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    finally:
        os.umask(before)
    if port == 0:
        raise StartRefused(
            f"cannot listen on {address}: it is taken, or not this machine's. Stop what uses it, or choose "
            "another address with --listen"
        )
    if _socket(address) is not None:
        return address
    host, _ = split_address(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _socket(address: str) -> Path | None:
    """The file of a Unix socket; None of another address."""
    return Path(address.removeprefix("unix:")) if address.startswith("unix:") else None


def _taken(address: str) -> bool:
    """Whether somebody listens at one of the addresses of a name. gRPC is content where another one of them is free:
    both would then get some of the calls.
    """
    if _socket(address) is not None:
        return False
    host, port = split_address(address)
    with suppress(socket.gaierror, UnicodeError):  # gRPC may know the name all the same
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return any(_in_use(family, place) for family, _, _, _, place in found)
    return False


def _in_use(family: int, place: Any) -> bool:
    try:
        with socket.socket(family) as probe:
            if os.name == "posix":  # as gRPC does; on Windows it would share the address
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        refused = probe.connect_ex(str(path))
    # A socket whose process is gone refuses. One that does not take us in (full backlog) is somebody's, and refuses on
    # macOS alone: there the lock on the ledger tells, unless that lies elsewhere.
    return refused not in (errno.ECONNREFUSED, errno.ENOENT)
