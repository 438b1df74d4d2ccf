"""Who may call: bearer tokens and the tenants they stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cloud_server.errors import StartRefused, Unauthenticated
from cloud_server.settings import expanded

DEFAULT_TENANT = "default"
MIN_TOKEN_CHARACTERS = 16  # shorter ones can be guessed


@dataclass(frozen=True)
class Tenants:
    """Tenants by the SHA-256 of their token, so that no token stays in memory. None: no token is asked for."""

    by_digest: Mapping[bytes, str] | None = None

    @classmethod
    def load(cls, file: str) -> Tenants:
        """Reads a file of lines `TENANT TOKEN`; empty lines and lines that start with # count for nothing.

        A tenant may have several tokens, so that a new one works before the old one goes. Raises StartRefused.
        """
        path = expanded(file)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()  # as Windows saves it, too
        except (OSError, UnicodeDecodeError) as error:
            raise StartRefused(f"cannot read the tokens file {path}: {error}") from error
        by_digest: dict[bytes, str] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            words = line.split()
            if len(words) != 2 or len(words[1]) < MIN_TOKEN_CHARACTERS:
                raise StartRefused(
                    f"{path}, line {number}: expected TENANT TOKEN, the token with at least "
                    f"{MIN_TOKEN_CHARACTERS} characters"
                )
            tenant, token = words
            if not (token.isascii() and token.isprintable()):
                raise StartRefused(
                    f"{path}, line {number}: the token has characters that no call can bear; take letters, digits and "
                    "punctuation of ASCII"
                )
            if by_digest.setdefault(_digest(token), tenant) != tenant:
                raise StartRefused(f"{path}, line {number}: this token already stands for another tenant")
        if not by_digest:
            raise StartRefused(
                f"the tokens file {path} has no tokens; write one line TENANT TOKEN for each caller"
            )
        return cls(by_digest)

    def identify(self, authorization: str | None) -> str:
        """The tenant of an `authorization` header ("Bearer TOKEN"). Raises Unauthenticated."""
        if self.by_digest is None:
            return DEFAULT_TENANT
        if authorization is None:
            raise Unauthenticated(
                "this server asks for a token: send the metadata 'authorization: Bearer TOKEN'"
            )
        scheme, _, token = authorization.partition(" ")
        tenant = self.by_digest.get(_digest(token.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise Unauthenticated(
                "this token is not known here; check it, or ask the server's operator for one"
            )
        return tenant


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
