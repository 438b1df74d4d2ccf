"""Where a bundle comes from: a folder, a web server or the hub.

A source hands out manifest.json, and then every file that it lists, from any byte on. What it hands out is verified by
`edge_agent.pull`.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.message import Message
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path
from typing import Any, Protocol

from edge_agent import version
from edge_agent.bundle import MANIFEST, MAX_MANIFEST_BYTES, READ_BYTES, Bundle, FileEntry
from edge_agent.errors import (
    InvalidRequest,
    PullFailed,
    SourceLied,
    SourceRefused,
    SourceUnreachable,
    printable,
    quoted,
)
from edge_agent.settings import expanded

HUB = "https://huggingface.co"
"""The hub, unless HF_ENDPOINT names another."""

TIMEOUT_S = 30.0
"""How long a server may take to answer, and to send the next bytes."""

_HUB_HOSTS = ("huggingface.co", "hf.co")
_HUB_TOKEN = "Bearer hf_"  # noqa: S105  # how those begin that the hub hands out
_MODEL_INDEX = "model_index.json"
_HUB = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?", re.ASCII)
# OpenSSL's numbers of a certificate that is not valid yet, and of one that has expired.
_OUT_OF_DATE = (9, 10)
# Its numbers of one for another name or another address.
_MISMATCH = (62, 64)
_SECONDS = re.compile(r"\s*\d{1,6}\s*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Python reads no number of thousands of digits.
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")

# Nothing remains of a limit for so many seconds: draft-ietf-httpapi-ratelimit-headers.
_SPENT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")


class Source(Protocol):
    """Where a bundle comes from. Both methods raise PullFailed; the first one also BundleError."""

    @property
    def place(self) -> str:
        """What errors call it."""

    def manifest(self) -> bytes:
        """manifest.json, or so much of it that it is seen to be too large."""

    def read(self, name: str, entry: FileEntry, offset: int) -> tuple[int, Iterator[bytes]]:
        """The file's bytes from `offset` on, or from the byte that comes first in the answer."""


def source_of(text: str, environment: Mapping[str, str]) -> Source:
    """The source that `text` names: a folder, http(s)://..., or hf:OWNER/NAME[@REVISION].

    HF_ENDPOINT and HF_TOKEN of the environment say where the hub is and who asks, as does the file of `hf auth login`.
    Raises InvalidRequest.
    """
    if not text:
        raise InvalidRequest("the source is empty; name a folder, https://... or hf:OWNER/NAME")
    if text.startswith("hf:"):
        found = _HUB.fullmatch(text)
        if found is None:
            raise InvalidRequest(
                f"{text!r} names no repository of the hub; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
            )
        endpoint = environment.get("HF_ENDPOINT", "").strip() or HUB
        _check_address(endpoint, "HF_ENDPOINT", "a token belongs in HF_TOKEN")
        token, kept_in = _token(environment)
        if not (token.isascii() and token.isprintable()):
            raise InvalidRequest(
                f"{kept_in} holds characters that no token can have; set it to the token alone"
            )
        patience_s = environment.get("HF_HUB_DOWNLOAD_TIMEOUT") or "0"
        if not _SECONDS.fullmatch(patience_s):
            raise InvalidRequest(
                f"HF_HUB_DOWNLOAD_TIMEOUT is {patience_s!r}, which is no whole number of seconds below a million"
            )
        return HubSource(endpoint, found[1], found[2] or "main", token, kept_in, float(patience_s))
    if "://" in text:
        _check_address(text, "the source", "others see the command line")
        return WebSource(text)
    folder = expanded(text)
    try:
        there = folder.is_dir()
    except OSError:  # a name that no folder can have
        there = False
    if not there:
        raise InvalidRequest(
            f"there is no folder {text}; a bundle on a web server is written https://..., one on the hub hf:OWNER/NAME"
        )
    return FolderSource(folder)


class FolderSource:
    """A bundle folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def manifest(self) -> bytes:
        """manifest.json of a folder whose files are all there, plain, and of the sizes it says."""
        if not (self.folder / MANIFEST).exists() and (self.folder / _MODEL_INDEX).is_file():
            raise _unexported(self.place, self.place)
        Bundle.open(self.folder, verify=False)
        return b"".join(self._blocks(MANIFEST, 0, MAX_MANIFEST_BYTES))

    def read(self, name: str, entry: FileEntry, offset: int) -> tuple[int, Iterator[bytes]]:
        """The file's bytes from `offset` on."""
        return offset, self._blocks(name, offset, entry.bytes)

    def _blocks(self, name: str, start: int, end: int) -> Iterator[bytes]:
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(start)
                while start < end and (block := file.read(min(READ_BYTES, end - start))):
                    start += len(block)
                    yield block
        except OSError as error:
            raise SourceRefused(f"{self.folder / name} cannot be read: {error.strerror}") from error


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
        self._redirects = _Redirects()
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
            if self._has(_MODEL_INDEX):
                raise _unexported(self.place, self._exportable()) from None
            raise
        with response:
            text = b"".join(self._blocks(response, MANIFEST, MAX_MANIFEST_BYTES + 1))
        if text.lstrip().startswith(b"<"):
            raise SourceRefused(
                f"{self.place}/{MANIFEST} is a web page, a login perhaps; look at it in a browser"
            )
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
        """Where the answer begins. Raises SourceLied when it is not what was asked for."""
        start, total = 0, "*" if response.length is None else str(response.length)
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            part = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
            if part is None or int(part[1]) != offset:
                raise SourceLied(f"{self.place}: another part of {name} came than was asked for")
            start, total = offset, part[3]
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
                        raise SourceLied(f"{self.place}: {name} goes on beyond what {MANIFEST} says")
                    yield block
                    if left == 0 and (promised is not None or not exactly):
                        return
        except (OSError, http.client.HTTPException) as error:
            raise SourceUnreachable(f"{self.place} broke off in {name}: {self._reason(error)}") from error
        if got < (promised or 0) or (exactly and left > 0):
            raise SourceUnreachable(
                f"{self.place} broke off in {name}: {_reason(http.client.IncompleteRead(b''))}"
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
            listed = name not in (MANIFEST, _MODEL_INDEX)
            doubt = f", though {MANIFEST} lists it" if listed else "; is this the address of a bundle folder?"
            return _NotThere(f"{place} is not there ({status}){doubt}")
        if status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
            if (host := self._who(last)) != self._base.netloc:
                return SourceRefused(f"{host} refuses {name} ({status}); a firewall or proxy may block it")
            return SourceRefused(f"{place} is not for everybody ({status}); {self._how_to_be_let_in}")
        if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return SourceLied(f"{place} is shorter than {MANIFEST} says")
        # The server's own words are not repeated: they could be anything, and urllib's quote signed addresses.
        reason = error.reason if isinstance(error, _LessSafe) else http.client.responses.get(status, "")
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
                f"{host} cannot be reached over TLS: {_reason(reason)}; check the port, and whether the address begins "
                "with http:// instead"
            )
        return SourceUnreachable(
            f"{host} cannot be reached: {self._reason(reason)}; check the address, the connection and that the server "
            "runs"
        )

    def _who(self, last: urllib.request.Request) -> str:
        """The host that `last` asks, and how it came to be asked where it is another than the source's own."""
        own, host = self._base.netloc, printable(_host(last.full_url))
        return host if host == own else f"{host}, to which {own} redirects,"

    def _reason(self, error: object) -> str:
        return _reason(error) + (self._how_to_be_patient if isinstance(error, TimeoutError) else "")

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


class HubSource(WebSource):
    """A repository of the hub, at a branch, tag or commit. A branch that moves during a pull is not followed."""

    _how_to_be_let_in = (
        "set HF_TOKEN to a token that may read it, or look at the name: perhaps there is no such thing"
    )

    _how_to_be_patient = " (HF_HUB_DOWNLOAD_TIMEOUT may say to wait longer, in seconds)"

    def __init__(
        self,
        endpoint: str,
        repository: str,
        revision: str,
        token: str,
        kept_in: str = "HF_TOKEN",
        patience_s: float = 0.0,
    ) -> None:
        super().__init__(f"{endpoint.rstrip('/')}/{repository}")
        self._repository, self._revision = repository, revision
        self._token, self._kept_in = token, kept_in
        self._patience_s = patience_s
        self._how_to_ask_more = "" if token else "; a token in HF_TOKEN raises the limit"

    @property
    def place(self) -> str:
        """As it is written on the command line."""
        return f"hf:{self._repository}@{self._revision}"

    def _refusal(self, error: urllib.error.HTTPError, name: str, last: urllib.request.Request) -> PullFailed:
        """What the hub says in its headers beside the status, in words of ours."""
        told = {
            "Invalid credentials in Authorization header": (
                f"the token in {self._kept_in} is not valid or has expired; correct or remove it"
            ),
            "Access to this resource is disabled.": "the hub has disabled it",
            "GatedRepo": f"agree to its terms at {self._base.geturl()}"
            + (
                "; a fine-grained token must also be allowed to read gated repositories"
                if self._token
                else ", and set HF_TOKEN to your token"
            ),
            "RevisionNotFound": f"it has no branch, tag or commit {self._revision}",
            "RepoNotFound": "there is no such repository, or "
            + (
                f"the token in {self._kept_in} may not read it"
                if self._token
                else "it is private: set HF_TOKEN"
            ),
        }
        for header in ("X-Error-Code", "X-Error-Message"):
            if why := told.get(error.headers.get(header, "")):
                return SourceRefused(f"{self.place}: {why} ({error.code})")
        return super()._refusal(error, name, last)

    def _address(self, name: str) -> str:
        revision = urllib.parse.quote(self._revision, safe="")
        path = f"{self._base.path}/resolve/{revision}/{urllib.parse.quote(name)}"
        return self._base._replace(path=path).geturl()

    def _credentials(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _settle_on(self, response: http.client.HTTPResponse) -> None:
        commit = response.headers.get("X-Repo-Commit") or self._redirects.commit
        if _COMMIT.fullmatch(commit):
            self._revision = commit

    def _exportable(self) -> str:
        return self._repository


class _NotThere(SourceRefused):
    """The server has no such file."""


class _LessSafe(urllib.error.HTTPError):
    """A redirect that is not followed; its reason is in our words."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to other web addresses, never out of TLS, with credentials only on the same server or to the
    hub, and without reading what comes along with them.
    """

    last: urllib.request.Request
    """Where they have led so far. Whoever opens an address sets it."""

    commit: str
    """That the hub named on the way: where it redirects to, none may be known. Set likewise."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not know it

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,
        code: int,
        msg: str,  # noqa: ARG002  # urllib passes it
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request:
        """The request that follows; raises _LessSafe where none may."""
        self.commit = headers.get("X-Repo-Commit") or self.commit
        fp.close()  # urllib would read its body, which may have no end, into memory
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            reason = printable(f"redirects to {new.scheme}://{_host(newurl)}, which is less safe")
            raise _LessSafe(req.full_url, code, reason, headers, fp)
        # What opens the proxy is added anew where the next request goes through it, too.
        headers = {name: value for name, value in req.headers.items() if name != "Proxy-authorization"}
        request = urllib.request.Request(newurl, headers=headers)  # noqa: S310  # http or https
        same_server = (old.scheme, old.netloc) == (new.scheme, new.netloc)
        to_the_hub = new.scheme == "https" and new.hostname in _HUB_HOSTS
        authorization = req.unredirected_hdrs.get("Authorization", "")
        # Mirrors such as hf-mirror.com leave private repositories to the hub. A mirror's own token is not for it.
        if authorization and (same_server or (to_the_hub and authorization.startswith(_HUB_TOKEN))):
            request.add_unredirected_header("Authorization", authorization)
        self.last = request
        return request


def _token(environment: Mapping[str, str]) -> tuple[str, str]:
    """The token for the hub and where it is kept, looked for where the hub's own library does; empty without one."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := environment.get(variable, "").strip():  # a file's last line break often comes along
            return token, variable
    if environment.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "", ""
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or f"{cache}/huggingface"
    file = environment.get("HF_TOKEN_PATH") or f"{home}/token"
    file = os.path.expandvars(os.path.expanduser(file))  # noqa: PTH111  # no home, no token: that is no error
    try:
        return Path(file).read_text(encoding="latin-1").strip(), file
    except (FileNotFoundError, NotADirectoryError):
        return "", ""
    except OSError as error:
        raise InvalidRequest(
            f"{file}, which `hf auth login` keeps the token in, cannot be read: {_reason(error)}; "
            "HF_HUB_DISABLE_IMPLICIT_TOKEN=1 does without"
        ) from error


def _wrong_authorities() -> str:
    """What is wrong with the file in SSL_CERT_FILE, which OpenSSL passes over in silence; empty where nothing is."""
    file = os.environ.get("SSL_CERT_FILE")
    if not file:
        return ""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except OSError as error:  # ssl's own among them
        return (
            f"SSL_CERT_FILE names {file}, which has no certificate that can be read: {_reason(error)}; name a PEM "
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
        return float(after)
    with suppress(ValueError, OverflowError):  # a date that no calendar has
        if date := parsedate_tz(after):
            return max(0.0, mktime_tz(date) - time.time())
    spent = _SPENT.search(headers.get("RateLimit", ""))
    return float(spent[1]) if spent else None


def _host(address: str) -> str:
    """Host and port, without the password that somebody may have written before them."""
    return urllib.parse.urlsplit(address).netloc.rpartition("@")[2]


def _check_address(address: str, what: str, why_without: str) -> None:
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


def _unexported(place: str, model: str) -> SourceRefused:
    return SourceRefused(
        f"{place} is a diffusers pipeline and no bundle: export it first with "
        f"`edge-export diffusion {quoted(model)} OUT`, and pull OUT"
    )


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended early"
    if isinstance(error, ssl.SSLError) and error.reason:  # such as WRONG_VERSION_NUMBER
        return error.reason.replace("_", " ").lower()
    said = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return printable(said)  # some of it may be the server's
