"""A web server with a folder, which keeps a record of what it sent and misbehaves as a test tells it to."""

from __future__ import annotations

import http.server
import re
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Asked:
    """One request, and what went out for it."""

    path: str
    offset: int  # where the range begins; 0 without one
    headers: dict[str, str]
    sent: int = 0  # bytes of the body
    done: threading.Event = field(default_factory=threading.Event)


@dataclass
class Web:
    """What the server does. `manner` holds for the files whose path ends in `at`, the first `times` times.

    honest, late (after a second), no_range, stop (half of what is asked for, then the connection ends), hang (the same,
    then nothing), anew (two or three quarters in turns, from the beginning each time), wrong (one bit), longer and
    shorter (whole answers of another size), endless (no size, and no end), cut (a chunk that ends early), other_part
    (of the file than was asked for), compressed, page (of HTML, without its size), redirect (to `to`),
    chatty_redirect (the same, with a body of 64 MB), status (`code`).
    """

    folder: Path
    address: str = ""
    manner: str = "honest"
    at: str = ""
    times: int = 1 << 30
    to: str = ""
    code: int = 500
    headers: dict[str, str] = field(default_factory=dict)  # sent with every answer
    block_bytes: int = 1 << 16
    pause_s: float = 0.0  # after each block
    behind: tuple[Path, Path] | None = None  # as a proxy: the certificate and key of all servers behind it
    asked: list[Asked] = field(default_factory=list)

    def misbehave(self, manner: str, at: str = "", times: int = 1 << 30, **how: object) -> None:
        self.manner, self.at, self.times = manner, at, times
        for name, value in how.items():
            setattr(self, name, value)

    def sent(self, path: str = "") -> int:
        """Bytes of bodies that went out, for the files whose path ends so, once their answers are at an end."""
        for asked in self.asked:
            assert asked.done.wait(20)
        return sum(asked.sent for asked in self.asked if asked.path.endswith(path))

    def offsets(self, path: str) -> list[int]:
        return [asked.offset for asked in self.asked if asked.path.endswith(path)]


class _Handler(http.server.BaseHTTPRequestHandler):
    web: Web

    def do_CONNECT(self) -> None:
        """What a proxy is asked for the sake of TLS. One with a certificate is the server behind it, too."""
        web = self.web
        if web.behind is None:
            return self._head(web.code, {"Content-Length": "0"})
        self._head(200, {})
        self.request = _tls(*web.behind).wrap_socket(self.connection, server_side=True)
        self.setup()
        self.close_connection = False
        return None

    def do_GET(self) -> None:
        web, path = self.web, unquote(urlsplit(self.path).path)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        offset = int(wanted[1]) if wanted else 0
        asked = Asked(self.path, offset, dict(self.headers))
        web.asked.append(asked)
        try:
            self._answer(web, path, asked)
        finally:
            asked.done.set()

    def _answer(self, web: Web, path: str, asked: Asked) -> None:
        manner = "honest"
        if path.endswith(web.at) and web.times > 0:
            manner, web.times = web.manner, web.times - 1
        if manner == "redirect":
            return self._head(302, {"Location": web.to or self.path, "Content-Length": "0"})
        if manner == "chatty_redirect":
            self._head(302, {"Location": web.to})
            with suppress(OSError):
                self._write(asked, bytes(64_000_000))
            return None
        if manner == "status":
            return self._head(web.code, {"Content-Length": "0", **web.headers})
        if manner == "late":
            time.sleep(1)
        if manner == "page":
            self._head(200, {"Content-Type": "text/html; charset=utf-8"})
            return self._write(asked, b"<html>Who are you?</html>")
        file = web.folder / path.lstrip("/")
        if not file.is_file():
            return self._head(404, {"Content-Length": "0"})
        with suppress(OSError):  # a client that has gone
            self._send(asked, file.read_bytes(), manner)
        return None

    def _send(self, asked: Asked, whole: bytes, manner: str) -> None:
        if manner == "wrong":
            whole = whole[:-1] + bytes([whole[-1] ^ 1])
        elif manner == "longer":
            whole += b"x"
        elif manner == "shorter":
            whole = whole[:-1]
        start = 0 if manner in ("no_range", "anew") else asked.offset
        if start and start >= len(whole):
            return self._head(416, {"Content-Range": f"bytes */{len(whole)}", "Content-Length": "0"})
        body, headers = whole[start:], {}
        if start or manner == "other_part":
            first = start + (manner == "other_part")
            headers["Content-Range"] = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
        if manner == "compressed":
            headers["Content-Encoding"] = "gzip"
        if manner == "cut":
            headers["Transfer-Encoding"] = "chunked"
        elif manner != "endless":
            headers["Content-Length"] = str(len(body))
        self._head(206 if headers.get("Content-Range") else 200, headers)
        if manner == "anew":
            self._write(asked, body[: len(body) * (2 + self.web.times % 2) // 4])
            return None
        if manner in ("stop", "hang", "cut"):
            chunk = f"{len(body):x}\r\n".encode() if manner == "cut" else b""
            self.wfile.write(chunk)
            self._write(asked, body[: len(body) // 2])
            if manner == "hang":
                time.sleep(30)
            return None
        self._write(asked, body)
        while manner == "endless":
            self._write(asked, bytes(1 << 16))
        return None

    def _write(self, asked: Asked, body: bytes) -> None:
        for start in range(0, len(body), self.web.block_bytes):
            block = body[start : start + self.web.block_bytes]
            self.wfile.write(block)
            asked.sent += len(block)
            time.sleep(self.web.pause_s)

    def _head(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (self.web.headers | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name in the base class
        pass


def certificate(folder: Path, names: str) -> tuple[Path, Path]:
    """One of its own authority, for these names, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl")
    key, pem = folder / "key.pem", folder / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=models"
    options = ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(pem)]
    subprocess.run([*make.split(), *options], check=True, capture_output=True)
    return pem, key


def _tls(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what half of the tests are about."""


@contextmanager
def web_server(folder: Path, certificate: tuple[Path, Path] | None = None) -> Iterator[Web]:
    """Serves the folder on loopback, over TLS with a certificate and its key."""
    web = Web(folder)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": web}))
    if certificate is not None:
        server.socket = _tls(*certificate).wrap_socket(server.socket, server_side=True)
    web.address = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
