"""Addresses as users write them: HOST:PORT, [IPV6]:PORT or unix:PATH."""

from __future__ import annotations

import ipaddress


def must_be_text(address: str) -> str:
    """`address`. Raises ValueError where it has bytes that are no UTF-8, which gRPC cannot call."""
    try:
        address.encode()
    except UnicodeEncodeError as error:
        raise ValueError("an address must be UTF-8; choose one without other bytes") from error
    return address


def split_address(address: str) -> tuple[str, int]:
    """("::1", 50051) for "[::1]:50051". Raises ValueError when it is not HOST:PORT."""
    if "://" in address:
        raise ValueError(f"{address!r} begins with a scheme; HOST:PORT alone is expected")
    host, colon, port = must_be_text(address).rpartition(":")
    if not (colon and host and port.isdecimal() and len(port) <= 5 and int(port) <= 65_535):
        raise ValueError(f"{address!r} is neither unix:PATH nor HOST:PORT")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if bracketed is not (":" in bare) or {"[", "]"} & set(bare):
        raise ValueError(
            f"{address!r}: IPv6 addresses stand in brackets, such as [::1]:50051, and others do not"
        )
    return bare, int(port)


def is_local(address: str) -> bool:
    """Whether `address` lies within this machine. Raises ValueError when it is none."""
    if address.startswith("unix:"):
        return True
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
