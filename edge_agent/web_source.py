"""A bundle folder on a web server: what is asked for, and what each answer, or none, means."""

from __future__ import annotations

import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from email.message import Message
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path

from edge_agent import version
from edge_agent.disk import READ_BYTES
from edge_agent.errors import (
    InvalidRequest,
    PullFailed,
    SourceLied,
    SourceRefused,
    SourceUnreachable,
    printable,
    quoted,
)
from edge_agent.manifest import MANIFEST, MAX_MANIFEST_BYTES, FileEntry
from edge_agent.redirects import LessSafe, Redirects, host_of

TIMEOUT_S = 30.0
"""How long a server may take to answer, and to send the next bytes."""

MODEL_INDEX = "model_index.json"
"""What a diffusers pipeline has, also one that is no bundle."""

# OpenSSL's numbers of a certificate that is not valid yet, and of one that has expired.
_OUT_OF_DATE = (9, 10)
# Its numbers of one for another name or another address.
_MISMATCH = (62, 64)
# Python reads no number of thousands of digits.
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")

_LONGEST_S = 1e9  # thirty years

_LONGEST_REASON = 300
"""Characters of what another machine says: the line in the place of a status may have 65,536."""

# Nothing remains of a limit for so many seconds: draft-ietf-httpapi-ratelimit-headers.
_SPENT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")


class WebSource:
    """A bundle folder on an HTTP(S) server. Query parameters of its address go along with every file's.

    Raises InvalidRequest where TLS would have to do without the authorities that SSL_CERT_FILE names.
    """

    def __init__(self, address: str) -> None:
        parts = urllib.parse.urlsplit(address)
        if parts.scheme == "https" and (wrong := _wrong_authorities()):
            raise InvalidRequest(wrong)
        path = (
            urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~").removesuffix(f"/{MANIFEST}").rstrip("/")
        )
        self._base = parts._replace(path=path, fragment="")
        # Not build_opener: it would also open file: and ftp:.
        self._opener = urllib.request.OpenerDirector()
        self._redirects = Redirects()
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        for handler in (
            # A proxy for the world outside has no business with this machine's own servers.
            urllib.request.ProxyHandler({} if local else None),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=ssl.create_default_context()),
            urllib.request.UnknownHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            self._redirects,
            urllib.request.HTTPErrorProcessor(),
        ):
            self._opener.add_handler(handler)

    @property
    def place(self) -> str:
        """The address without its query, which may hold a secret."""
        return self._base._replace(query="").geturl()

    def manifest(self) -> bytes:
        """manifest.json as the server has it now."""
        try:
            response = self._open(MANIFEST)
        except _NotThere:
            if self._has(MODEL_INDEX):
                raise unexported(self.place, self._exportable()) from None
            raise
        with response:
            text = b"".join(self._blocks(response, MANIFEST, MAX_MANIFEST_BYTES + 1))
        if text.lstrip().startswith(b"<"):
            raise SourceRefused(self._web_page(MANIFEST))
        self._settle_on(response)
        return text

    def read(self, name: str, entry: FileEntry, offset: int) -> tuple[int, Iterator[bytes]]:
        """The file's bytes from `offset` on; from the first where the server does not know ranges."""
        response = self._open(name, offset)
        try:
            start = self._start(response, name, entry, offset)
        except BaseException:
            response.close()
            raise
        return start, self._blocks(response, name, entry.bytes - start, exactly=True)

    def _start(self, response: http.client.HTTPResponse, name: str, entry: FileEntry, offset: int) -> int:
        """Where the answer begins. Raises SourceLied when it is not what was asked for, and SourceRefused."""
        start, total = 0, "*" if response.length is None else str(response.length)
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            part = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
            if part is None or int(part[1]) != offset:
                raise SourceLied(f"{self.place}: another part of {name} came than was asked for; pull again")
            start, total = offset, part[3]
        elif response.headers.get_content_type() == "text/html" and (
            total != str(entry.bytes) if offset else total not in ("*", str(entry.bytes))
        ):  # and not the file from its start
            raise SourceRefused(self._web_page(name))
        if total not in ("*", str(entry.bytes)):
            raise SourceLied(
                f"{self.place}: {name} has {total} bytes where {MANIFEST} says {entry.bytes}; have it exported again"
            )
        return start

    def _blocks(
        self, response: http.client.HTTPResponse, name: str, left: int, *, exactly: bool = False
    ) -> Iterator[bytes]:
        """The answer's body, at most `left` bytes of it; with `exactly`, neither more nor less."""
        promised = response.length  # None where only the end shows it
        got = 0
        try:
            with response:
                # One byte more than there may be, where only reading it shows that the server has more.
                more = 1 if exactly and promised is None else 0
                while block := response.read1(min(READ_BYTES, left + more)):
                    got, left = got + len(block), left - len(block)
                    if left < 0:
                        raise SourceLied(
                            f"{self.place}: {name} goes on beyond what {MANIFEST} says; have it exported again"
                        )
                    yield block
                    if left == 0 and (promised is not None or not exactly):
                        return
        except (OSError, http.client.HTTPException) as error:
            raise SourceUnreachable(f"{self.place} broke off in {name}: {self._reason(error)}") from error
        if got < (promised or 0) or (exactly and left > 0):
            raise SourceUnreachable(
                f"{self.place} broke off in {name}: {reason_of(http.client.IncompleteRead(b''))}"
            )

    def _has(self, name: str) -> bool:
        try:
            self._open(name).close()
        except PullFailed:
            return False
        return True

    def _open(self, name: str, offset: int = 0) -> http.client.HTTPResponse:
        request = urllib.request.Request(self._address(name))  # noqa: S310  # http or https, checked
        request.add_header("User-Agent", f"edge-agent/{version()}")
        request.add_header("Accept-Encoding", "identity")
        if offset:
            request.add_header("Range", f"bytes={offset}-")
        for header, value in self._credentials().items():
            request.add_unredirected_header(header, value)
        self._redirects.last, self._redirects.commit = request, ""
        try:
            response: http.client.HTTPResponse = self._opener.open(
                request, timeout=max(TIMEOUT_S, self._patience_s)
            )
        except urllib.error.HTTPError as error:
            error.close()
            raise self._refusal(error, name, self._redirects.last) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._silence(error, self._redirects.last) from error
        encodings = ",".join(response.headers.get_all("Content-Encoding", []))
        # The last one is of the upload, and what some stores leave of it on files that are as they were.
        if {each.strip().lower() for each in encodings.split(",")} - {"", "identity", "aws-chunked"}:
            response.close()
            raise SourceRefused(
                f"{self.place} sends {name} compressed, although it was asked for as it is; turn that off for bundles"
            )
        return response

    def _refusal(self, error: urllib.error.HTTPError, name: str, last: urllib.request.Request) -> PullFailed:
        """What an answer other than the file means. `last` is the request that it came to, after all redirects."""
        status, place = error.code, f"{self.place}/{name}"
        if status == http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED and last.has_proxy():
            return SourceRefused(
                f"the proxy {last.host} lets nobody through without a password (407); write HTTP_PROXY as "
                "http://USER:PASSWORD@HOST:PORT"
            )
        if last.has_proxy():  # which may be what answered
            place += f", asked for through the proxy {last.host} in HTTP_PROXY,"
        if status in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
            listed = name not in (MANIFEST, MODEL_INDEX)
            doubt = f", though {MANIFEST} lists it" if listed else "; is this the address of a bundle folder?"
            return _NotThere(f"{place} is not there ({status}){doubt}")
        if status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
            if (host := self._who(last)) != self._base.netloc:
                return SourceRefused(f"{host} refuses {name} ({status}); a firewall or proxy may block it")
            return SourceRefused(f"{place} is not for everybody ({status}); {self._how_to_be_let_in}")
        if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return SourceLied(f"{place} is shorter than {MANIFEST} says; have it exported again")
        # The server's own words are not repeated: they could be anything, and urllib's quote signed addresses.
        reason = error.reason if isinstance(error, LessSafe) else http.client.responses.get(status, "")
        said = f"{status} {reason}".strip()
        if str(error.reason).startswith(urllib.request.HTTPRedirectHandler.inf_msg):
            return SourceRefused(f"{place} redirects in a circle, or too often ({said}); check the address")
        if status >= 500 or status in (http.HTTPStatus.TOO_MANY_REQUESTS, http.HTTPStatus.REQUEST_TIMEOUT):
            after_s = _retry_after_s(error.headers)
            when = "" if after_s is None else f"; it says to come back in {after_s:.0f} s"
            more = self._how_to_ask_more if status == http.HTTPStatus.TOO_MANY_REQUESTS else ""
            return SourceUnreachable(
                f"{place} cannot be had at the moment ({said}){when}{more}", retry_after_s=after_s
            )
        if 300 <= status < 400 and not isinstance(error, LessSafe):
            said += ", which leads to no web address"
        return SourceRefused(f"{place} cannot be had ({said})")

    def _silence(self, error: Exception, last: urllib.request.Request) -> PullFailed:
        """What it means that no answer came to `last`, the request that all redirects led to."""
        own, host = self._base.netloc, self._who(last)
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            # A server without TLS may have led here, with nothing said of the authorities before.
            cure = _wrong_authorities() or (
                "if an authority of your own vouches for it, name that authority's PEM file in SSL_CERT_FILE"
                if _has_authorities()
                else "this Python finds no certificates of authorities; install ca-certificates (on macOS run its "
                "'Install Certificates.command'), or name a file of them in SSL_CERT_FILE"
            )
            if reason.verify_code in _OUT_OF_DATE:
                cure = "its owner has to renew it, unless the clock of this machine is wrong"
            elif reason.verify_code in _MISMATCH:
                cure = "write the address with the name that the certificate is for"
            return SourceRefused(
                f"the certificate of {host} is not to be trusted: {reason.verify_message.rstrip('.')}; {cure}"
            )
        if isinstance(reason, (ValueError, http.client.InvalidURL)):
            # Its own text is not repeated: it quotes headers and signed addresses.
            return SourceRefused(
                f"{own} cannot be asked: the address, one that it redirects to, or that of the proxy in HTTP_PROXY or "
                "HTTPS_PROXY is not well-formed"
            )
        wanted = urllib.parse.urlsplit(last.full_url)
        if last.host != urllib.parse.unquote(wanted.netloc):
            variable = f"{wanted.scheme.upper()}_PROXY"
            if urllib.request.getproxies().get(wanted.scheme, "").startswith("socks"):
                return SourceRefused(
                    f"{host} cannot be reached through the proxy {printable(last.host)}, which speaks SOCKS: name one "
                    f"that speaks HTTP in {variable}"
                )
            return SourceUnreachable(
                f"{host} cannot be reached through the proxy {printable(last.host)}: {self._reason(reason)}; check "
                f"{variable} (http://USER:PASSWORD@HOST:PORT), or name the host in NO_PROXY if there is a way without"
            )
        if isinstance(reason, ssl.SSLError):
            return SourceUnreachable(
                f"{host} cannot be reached over TLS: {reason_of(reason)}; check the port, and whether the address "
                "begins with http:// instead"
            )
        return SourceUnreachable(
            f"{host} cannot be reached: {self._reason(reason)}; check the address, the connection and that the server "
            "runs"
        )

    def _web_page(self, name: str) -> str:
        return f"{self.place}/{name} is a web page, a login perhaps; look at it in a browser"

    def _who(self, last: urllib.request.Request) -> str:
        """The host that `last` asks, and how it came to be asked where it is another than the source's own."""
        own, host = self._base.netloc, printable(host_of(last.full_url))
        return host if host == own else f"{host}, to which {own} redirects,"

    def _reason(self, error: object) -> str:
        return reason_of(error) + (self._how_to_be_patient if isinstance(error, TimeoutError) else "")

    # What the hub does otherwise.

    _how_to_be_let_in = "make it readable without credentials, or put the bundle where it is"
    _how_to_ask_more = ""
    _how_to_be_patient = ""
    _patience_s = 0.0  # where it is more than TIMEOUT_S

    def _address(self, name: str) -> str:
        return self._base._replace(path=f"{self._base.path}/{urllib.parse.quote(name)}").geturl()

    def _credentials(self) -> dict[str, str]:
        return {}

    def _settle_on(self, response: http.client.HTTPResponse) -> None:
        """What the manifest's answer fixes for the files that follow."""

    def _exportable(self) -> str:
        return "MODEL"


class _NotThere(SourceRefused):
    """The server has no such file."""


def _wrong_authorities() -> str:
    """What is wrong with the file in SSL_CERT_FILE, which OpenSSL passes over in silence; empty where nothing is."""
    file = os.environ.get("SSL_CERT_FILE")
    if not file:
        return ""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except OSError as error:  # ssl's own among them
        return (
            f"SSL_CERT_FILE names {file}, which has no certificate that can be read: {reason_of(error)}; name a PEM "
            "file, or unset it"
        )
    return ""


def _has_authorities() -> bool:
    """Whether Python finds any, be they in OpenSSL's folder, in its file or on Windows the system's own."""
    folder = ssl.get_default_verify_paths().capath
    in_folder = folder is not None and any(Path(folder).glob("*"))
    return in_folder or ssl.create_default_context().cert_store_stats()["x509"] > 0


def _retry_after_s(headers: Message) -> float | None:
    """When the server wants to be asked again: in seconds, by a date, or as the hub says it; None where it does not."""
    after = headers.get("Retry-After", "").strip()
    if after.isdecimal():
        return _seconds(after)
    with suppress(ValueError, OverflowError):  # a date that no calendar has
        if date := parsedate_tz(after):
            return max(0.0, mktime_tz(date) - time.time())
    spent = _SPENT.search(headers.get("RateLimit", ""))
    return _seconds(spent[1]) if spent else None


def _seconds(digits: str) -> float:
    return min(float(digits), _LONGEST_S)  # of a few hundred it would be infinity


def check_address(address: str, what: str, why_without: str) -> None:
    """Raises InvalidRequest, calling it `what`, where it is none, or holds a password; `why_without` goes with that."""
    try:
        parts = urllib.parse.urlsplit(address)
        good = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and address.isprintable()
            and " " not in parts.netloc
        )
        _ = parts.port
    except ValueError:
        good = False
    if not good:
        raise InvalidRequest(f"{what} is {address!r}, which is no http:// or https:// address")
    if "@" in parts.netloc:
        raise InvalidRequest(f"{what} must not hold a user name or password: {why_without}")


def unexported(place: str, model: str) -> SourceRefused:
    """What a pipeline that is no bundle is refused with; `model` is what the export calls it."""
    return SourceRefused(
        f"{place} is a diffusers pipeline and no bundle: export it first with "
        f"`edge-export diffusion {quoted(model)} OUT`, and pull OUT"
    )


def reason_of(error: object) -> str:
    """Why something could not be read, in a phrase fit for a terminal."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended early"
    if isinstance(error, ssl.SSLError) and error.reason:  # such as WRONG_VERSION_NUMBER
        return error.reason.replace("_", " ").lower()
    said = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return printable(said[:_LONGEST_REASON])  # some of it may be the server's
