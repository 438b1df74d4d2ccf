"""What the server shows to callers and asks of them: its certificate and their tokens, both renewed while it serves."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from cloud_server.errors import StartRefused
from cloud_server.settings import Settings, expanded
from cloud_server.tenants import Tenants

log = logging.getLogger("cloud_server")

LOOKS_EVERY_S = 5.0
"""How long a changed file may go unnoticed."""

State = tuple[tuple[int, int, int] | None, ...]


class Credentials:
    """The newest of both. Raises StartRefused for what cannot be used; later on that is logged, and the old stays."""

    def __init__(self, settings: Settings) -> None:
        self.tenants = Tenants()
        self._settings = settings
        self._certificate: Any = None
        self._files: dict[str, tuple[list[Path], Callable[[], None]]] = {}
        if settings.tokens:
            self._files["tokens"] = [expanded(settings.tokens)], self._read_tokens
        if settings.tls:
            pair = [expanded(settings.tls_cert), expanded(settings.tls_key)]
            self._files["certificate"] = pair, self._read_certificate
        # Before they are read, so that no change is missed.
        self._seen = {name: _state(files) for name, (files, _) in self._files.items()}
        for _, read in self._files.values():
            read()

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Has `server` listen there and returns the port; 0, RuntimeError or OSError where it cannot."""
        if self._certificate is None:
            return server.add_insecure_port(address)
        shown = self._certificate

        def newest() -> Any:
            """Asked for by gRPC with each connection, in a thread of its own; None for no change."""
            nonlocal shown
            if self._certificate is shown:
                return None
            shown = self._certificate
            return shown

        return server.add_secure_port(address, grpc.dynamic_ssl_server_credentials(shown, newest))

    async def keep_current(self) -> None:
        """Reads again what has changed, for as long as it runs."""
        while True:
            await asyncio.sleep(LOOKS_EVERY_S)
            await asyncio.to_thread(self.renew)

    def renew(self) -> None:
        """Reads again what has changed since it was last looked at."""
        for name, (files, read) in self._files.items():
            state = _state(files)
            if state == self._seen[name]:
                continue
            self._seen[name] = state
            try:
                read()
            except StartRefused as refusal:  # half-written, perhaps: then it changes once more
                log.error("not renewed", extra={"fields": {"what": name, "error": refusal.message}})
            else:
                log.info("renewed", extra={"fields": {"what": name}})

    def _read_tokens(self) -> None:
        self.tenants = Tenants.load(self._settings.tokens)

    def _read_certificate(self) -> None:
        settings = self._settings

        def passphrase() -> str:
            # OpenSSL would ask for it on the terminal, which a service has not, and gRPC takes no such key.
            raise StartRefused(
                f"--tls-key {settings.tls_key} is encrypted; decrypt it first, as with `openssl pkey -in KEY -out NEW`"
            )

        chain, key = expanded(settings.tls_cert), expanded(settings.tls_key)
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(chain, key, passphrase)
            pairs = [(key.read_bytes(), chain.read_bytes())]
        except (OSError, ssl.SSLError) as error:
            raise StartRefused(
                f"cannot use --tls-cert {settings.tls_cert} with --tls-key {settings.tls_key}: {error}"
            ) from error
        self._certificate = grpc.ssl_server_certificate_configuration(pairs)


def _state(files: list[Path]) -> State:
    """What changes when a file is written, replaced or taken away."""
    return tuple(map(_stamp, files))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
