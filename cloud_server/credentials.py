"""What the server shows to callers and asks of them: its certificate and their tokens, both renewed while it serves."""

from __future__ import annotations

import asyncio
import base64
import re
import ssl
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from cloud_server.errors import StartRefused
from cloud_server.log import events
from cloud_server.settings import Settings, expanded
from cloud_server.tenants import Tenants

log = events("cloud_server")

# The first is the server's own.
_CERTIFICATE = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----([^-]*)-----END")
# How a certificate names its key's kind, in DER: RSA, P-256, P-384. No signature is called so.
_KEYS = tuple(map(bytes.fromhex, ("06092a864886f70d010101", "06082a8648ce3d030107", "06052b81040022")))

LOOKS_EVERY_S = 5.0
"""How long a changed file may go unnoticed."""

Stamps = tuple[tuple[int, ...] | None, ...]


@dataclass
class _Renewable:
    """What is read from files, as they were when it was last read, and why it could not be read since."""

    files: list[Path]
    read: Callable[[], None]
    seen: Stamps = ()
    failure: str = ""

    def renew(self) -> bool:
        """Reads the files where they have changed, and whether it did. Raises what `read` raises, then and until they
        can be read: rights may be put right, or a key written, without a file that changes again.
        """
        stamps = tuple(map(_stamp, self.files))  # before they are read, so that no change is missed
        changed = stamps != self.seen
        if changed:
            for file, stamp in zip(self.files, stamps, strict=True):
                if self.seen and stamp is None and _is_there(file):  # a pipe would have its reader wait
                    raise StartRefused(f"{file} is no regular file any more; put one in its place")
            self.read()
        self.seen, self.failure = stamps, ""
        return changed


class Credentials:
    """The newest of both. Raises StartRefused for what cannot be used; later on that is logged, and the old stays."""

    def __init__(self, settings: Settings) -> None:
        self.tenants = Tenants()
        self._settings = settings
        self._certificate: Any = None
        self._renewables: dict[str, _Renewable] = {}
        if settings.tokens:
            self._renewables["tokens"] = _Renewable([expanded(settings.tokens)], self._read_tokens)
        if settings.tls:
            pair = [expanded(settings.tls_cert), expanded(settings.tls_key)]
            self._renewables["certificate"] = _Renewable(pair, self._read_certificate)
        for renewable in self._renewables.values():
            renewable.renew()

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
            with suppress(RuntimeError):  # no thread is to be had now
                await asyncio.to_thread(self.renew)

    def renew(self) -> None:
        """Reads again what has changed since it was last read. Raises nothing; the log says what came of it."""
        for name, renewable in self._renewables.items():
            self._renew(name, renewable)

    def _renew(self, name: str, renewable: _Renewable) -> None:
        try:
            if renewable.renew():
                log.info("renewed", what=name)
        except Exception as error:  # StartRefused, or what nobody thought of, which must not end the renewing
            failure = error.message if isinstance(error, StartRefused) else repr(error)
            if failure != renewable.failure:  # once, and not every few seconds
                log.error("not renewed", what=name, error=failure)
            renewable.failure = failure

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
        first = _CERTIFICATE.search(pairs[0][1])
        if first and not any(kind in base64.b64decode(first[1]) for kind in _KEYS):
            raise StartRefused(
                f"--tls-cert {settings.tls_cert} is for a key of a kind that gRPC's clients do not take: make one of "
                "RSA's, or of the elliptic curve P-256 or P-384"
            )
        self._certificate = grpc.ssl_server_certificate_configuration(pairs)


def _is_there(file: Path) -> bool:
    with suppress(OSError):  # which reading tells better
        return file.exists()
    return False


def _stamp(file: Path) -> tuple[int, ...] | None:
    """What changes when a file is written, replaced or given other rights; None for one that is none, as a pipe, which
    can be read but once.
    """
    try:
        found = file.stat()
    except OSError:
        return None
    return (
        (found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_ino)
        if stat.S_ISREG(found.st_mode)
        else None
    )
