"""Pulls a bundle into the store, from a folder, a web server or the hub.

    for event in pull(source_of("https://example.com/my-model", os.environ), store):
        ...  # Fetched, again and again, and at the end Pulled

A source hands out manifest.json, and then every file that it lists, from any byte on. What arrives is hashed on its
way into the store's partial folder, and never more of it taken than the manifest promises. Whatever ends a pull, the
next one goes on where it stopped; the bundle shows among the installed ones when all of it is verified, and not before.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shlex
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from edge_agent import version
from edge_agent.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    READ_BYTES,
    Bundle,
    FileEntry,
    Manifest,
    parse_manifest,
)
from edge_agent.errors import (
    BundleError,
    InvalidRequest,
    NewerBundle,
    NotABundle,
    PullFailed,
    RouteT2IError,
    SourceLied,
    SourceRefused,
    SourceUnreachable,
    StoreError,
    printable,
)
from edge_agent.settings import expanded
from edge_agent.store import Store, check_name, name_from, patiently

HUB = "https://huggingface.co"
"""The hub, unless HF_ENDPOINT names another."""

WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Pauses before a file that broke off is asked for again."""

LONGEST_WAIT_S = 60.0
"""A server that wants to be left alone for longer is left to the next pull."""

WORTH_BYTES = 1 << 20
"""An attempt that brought this much counts as none, however it ended, and a pull that was refused leaves no less."""

TIMEOUT_S = 30.0
"""How long a server may take to answer, and to send the next bytes."""

SPARE_BYTES = 16 << 20
"""What a pull leaves free on the disk."""

_MODEL_INDEX = "model_index.json"
_HUB = re.compile(r"hf:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?", re.ASCII)
# OpenSSL's numbers of a certificate that is not valid yet, and of one that has expired.
_OUT_OF_DATE = (9, 10)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Python reads no number of thousands of digits.
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True)
class Fetched:
    """How far a pull is: bytes of the whole bundle, and the file they now belong to."""

    file: str
    done_bytes: int
    total_bytes: int
    trouble: str = ""  # why the file is asked for again


@dataclass(frozen=True)
class Pulled:
    """The end of a pull. `fetched_bytes` came this time; none where it `was_installed` already."""

    name: str
    bundle: Bundle
    fetched_bytes: int
    was_installed: bool


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

    HF_ENDPOINT and HF_TOKEN of the environment say where the hub is and who asks. Raises InvalidRequest.
    """
    if not text:
        raise InvalidRequest("the source is empty; name a folder, https://... or hf:OWNER/NAME")
    if text.startswith("hf:"):
        found = _HUB.fullmatch(text)
        if found is None:
            raise InvalidRequest(
                f"{text!r} names no repository of the hub; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
            )
        endpoint = environment.get("HF_ENDPOINT") or HUB
        _check_address(endpoint, "HF_ENDPOINT")
        token = environment.get("HF_TOKEN", "").strip()  # a file's last line break often comes along
        if not (token.isascii() and token.isprintable()):
            raise InvalidRequest(
                "HF_TOKEN holds characters that no token can have; set it to the token alone"
            )
        return HubSource(endpoint, found[1], found[2] or "main", token)
    if "://" in text:
        _check_address(text, "the source")
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


def pull(
    source: Source, store: Store, name: str | None = None, waits_s: Sequence[float] = WAITS_S
) -> Iterator[Fetched | Pulled]:
    """Brings the bundle into the store as `name`, or as what its manifest calls it. Closing the iterator stops it.

    Raises:
        PullFailed: the source did not deliver.
        BundleError: what it has is no bundle that this program reads.
        StoreError: the name is taken by another bundle, or the disk is full.
        Busy: another process is pulling it.
    """
    if name is not None:
        check_name(name)
    text = source.manifest()
    manifest = parse_manifest(text, f"{source.place}/{MANIFEST}")
    name = name_from(manifest.name) if name is None else name
    with store.pulling(name) as partial:
        if installed := _installed(store, name, text):
            yield Pulled(name, installed, 0, was_installed=True)
            return
        with store.explained("written"):
            kept = _kept(partial, manifest)
            there = sum(min(_size(partial / path), manifest.files[path].bytes) for path in kept)
            thrown_away = store.unfinished().get(name, 0) - there
            _check_room(store, manifest.total_bytes - there, manifest, store.free_bytes + thrown_away)
            _prepare(partial, text, kept)
        fetched = done = 0
        try:
            with store.explained("written"):
                for path, entry in manifest.files.items():
                    for size, new, trouble in _fetch(source, path, entry, partial / path, waits_s):
                        fetched += new
                        yield Fetched(path, done + size, manifest.total_bytes, trouble)
                    done += entry.bytes
        except (PullFailed, StoreError) as error:
            raise type(error)(f"{error.message}{_left(partial, manifest, name, error)}") from error
        try:
            bundle = store.install(name)
        except BundleError as error:
            raise type(error)(f"{error.message}{_left(partial, manifest, name, error)}") from error
    yield Pulled(name, bundle, fetched, was_installed=False)


def _installed(store: Store, name: str, text: bytes) -> Bundle | None:
    """The bundle called `name` if it is the one with this manifest. Raises StoreError when it is another."""
    if name not in store.names():
        store.must_be_free(name)
        return None
    try:
        bundle = Bundle.open(store.path(name), verify=False)
    except NewerBundle as error:
        raise StoreError(
            f"{name} is installed and cannot be compared: {error.message}, or pull this one under a name of its own "
            "with --name"
        ) from error
    except NotABundle as error:
        raise StoreError(f"{error.message}: pull this one under another --name") from error
    except BundleError as error:
        raise StoreError(
            f"{name} is installed and not whole ({error.message}): `edge-agent models remove {name}`, then pull again"
        ) from error
    if bundle.digest != hashlib.sha256(text).hexdigest():
        raise StoreError(
            f"{name} is installed and is another bundle than this one; pull this one under a name of its own with "
            f"--name, or `edge-agent models remove {name}` first"
        )
    return bundle


def _kept(partial: Path, manifest: Manifest) -> set[str]:
    """The manifest's files that what lies there was to hold too, be it another version of the bundle."""
    path = partial / MANIFEST
    if partial.is_symlink() or not 0 < _size(path) <= MAX_MANIFEST_BYTES:
        return set()
    try:
        before = parse_manifest(path.read_bytes(), path).files
    except BundleError:
        return set()
    return {name for name, entry in manifest.files.items() if before.get(name) == entry}


def _prepare(partial: Path, text: bytes, kept: set[str]) -> None:
    """Makes the folder for the files of this manifest. Of those of another all but the `kept` ones are thrown away."""
    if _size(partial / MANIFEST) == len(text) and (partial / MANIFEST).read_bytes() == text:
        return  # the same one, which goes on
    if not kept and partial.exists():
        shutil.rmtree(partial)
    for folder, folders, files in os.walk(partial, topdown=False):
        for path in (Path(folder) / name for name in (*folders, *files)):
            if path.is_symlink() or not path.is_dir():
                if path.relative_to(partial).as_posix() not in {*kept, MANIFEST}:
                    path.unlink()
            elif not any(path.iterdir()):  # a file may take its place
                path.rmdir()
    partial.mkdir(exist_ok=True)
    new = partial / f"{MANIFEST}.new"  # one that is half written would throw away what is kept
    with new.open("wb") as file:
        file.write(text)
        _settle(file)
    patiently(os.replace, new, partial / MANIFEST)


def _left(partial: Path, manifest: Manifest, name: str, error: RouteT2IError) -> str:
    """What `error` says of what has come so far. Nothing is not kept, nor what is soon fetched again of a pull that was
    refused, as the small files come first.
    """
    goes_on = isinstance(error, (SourceUnreachable, StoreError))
    if sum(_size(partial / path) for path in manifest.files) < (1 if goes_on else WORTH_BYTES):
        shutil.rmtree(partial, ignore_errors=True)
        return ""
    if goes_on:
        return ". What has come so far is kept: the same command goes on where this one stopped"
    return f". What has come so far is kept for another try; `edge-agent models remove {name}` throws it away"


def _check_room(store: Store, needed: int, manifest: Manifest, free: int) -> None:
    if needed + SPARE_BYTES > free:
        raise StoreError(
            f"{megabytes(needed)} of {megabytes(manifest.total_bytes)} are still to come and {store.folder} has room "
            f"for {megabytes(max(0, free - SPARE_BYTES))}; make room, or choose another folder with --models"
        )


def _fetch(
    source: Source, name: str, entry: FileEntry, path: Path, waits_s: Sequence[float]
) -> Iterator[tuple[int, int, str]]:
    """Completes and verifies one file. Yields the bytes there are of it, those among them that are new, and what
    went wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        digest, size = _hashed(file, entry)
        started_over = False
        failures = 0
        most = size  # that there have been; a server that begins anew each time has brought nothing before it has more
        yield size, 0, ""
        while True:
            pieced = size > 0
            try:
                if size < entry.bytes:
                    start, blocks = source.read(name, entry, size)
                    with closing(blocks):  # type: ignore[type-var]  # it is a generator
                        if start != size:
                            digest, size, pieced = _emptied(file), 0, False
                        for block in blocks:
                            file.write(block)
                            digest.update(block)
                            size += len(block)
                            yield size, len(block), ""
            except SourceUnreachable as error:
                file.flush()
                failures = 1 if size - most >= WORTH_BYTES else failures + 1
                most = max(most, size)
                if failures > len(waits_s) or (error.retry_after_s or 0.0) > LONGEST_WAIT_S:
                    raise
                yield size, 0, error.message
                time.sleep(max(waits_s[failures - 1], error.retry_after_s or 0.0))
                continue
            except SourceLied as error:
                lie = error
            else:
                if digest.hexdigest() == entry.sha256:
                    break
                lie = SourceLied(
                    f"{source.place}: {name} does not match its sha256 in {MANIFEST}, so it was altered on the way or "
                    "at its source; nothing was installed: pull again, or have it exported again"
                )
            digest, size = _emptied(file), 0
            most = 0
            # Pieces may not belong together: the power can have gone, or the file was another in between.
            if started_over or not pieced:
                raise lie
            started_over = True
        _settle(file)


def _hashed(file: IO[bytes], entry: FileEntry) -> tuple[Any, int]:
    """The sha256 so far, and the size, of what is there; a file that is too long is emptied."""
    if os.fstat(file.fileno()).st_size > entry.bytes:
        return _emptied(file), 0
    file.seek(0)
    digest, size = hashlib.sha256(), 0
    while block := file.read(READ_BYTES):
        digest.update(block)
        size += len(block)
    return digest, size


def _emptied(file: IO[bytes]) -> Any:
    file.truncate(0)
    return hashlib.sha256()


def _settle(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def megabytes(count: int) -> str:
    """Such as "12.8 MB"."""
    return f"{count / 1e6:,.1f} MB"


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
            raise SourceUnreachable(f"{self.place} broke off in {name}: {_reason(error)}") from error
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
        self._redirects.last = request
        try:
            response: http.client.HTTPResponse = self._opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            raise self._refusal(error, name, self._redirects.last) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._silence(error, self._redirects.last) from error
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
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
            return _NotThere(f"{place} is not there ({status}); is this the address of a bundle folder?")
        if status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
            return SourceRefused(f"{place} is not for everybody ({status}); {self._how_to_be_let_in}")
        if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return SourceLied(f"{place} is shorter than {MANIFEST} says")
        # The server's own words are not repeated: they could be anything, and urllib's quote signed addresses.
        reason = error.reason if isinstance(error, _LessSafe) else http.client.responses.get(status, "")
        said = f"{status} {reason}".strip()
        if str(error.reason).startswith(urllib.request.HTTPRedirectHandler.inf_msg):
            return SourceRefused(f"{place} redirects in a circle, or too often ({said}); check the address")
        if status >= 500 or status in (http.HTTPStatus.TOO_MANY_REQUESTS, http.HTTPStatus.REQUEST_TIMEOUT):
            after = error.headers.get("Retry-After", "")
            return SourceUnreachable(
                f"{place} cannot be had at the moment ({said})",
                retry_after_s=float(after) if after.isdecimal() else None,
            )
        return SourceRefused(f"{place} cannot be had ({said})")

    def _silence(self, error: Exception, last: urllib.request.Request) -> PullFailed:
        """What it means that no answer came to `last`, the request that all redirects led to."""
        own, host = self._base.netloc, printable(_host(last.full_url))
        if host != own:
            host = f"{host}, to which {own} redirects,"
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            # A server without TLS may have led here, with nothing said of the authorities before.
            cure = _wrong_authorities() or (
                "if an authority of your own vouches for it, name that authority's PEM file in SSL_CERT_FILE"
            )
            if reason.verify_code in _OUT_OF_DATE:
                cure = "its owner has to renew it, unless the clock of this machine is wrong"
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
            return SourceUnreachable(
                f"{host} cannot be reached through the proxy {printable(last.host)}: {_reason(reason)}; check "
                f"{variable} (http://USER:PASSWORD@HOST:PORT), or name the host in NO_PROXY if there is a way without"
            )
        if isinstance(reason, ssl.SSLError):
            return SourceUnreachable(
                f"{host} cannot be reached over TLS: {_reason(reason)}; check the port, and whether the address begins "
                "with http:// instead"
            )
        return SourceUnreachable(
            f"{host} cannot be reached: {_reason(reason)}; check the address, the connection and that the server runs"
        )

    # What the hub does otherwise.

    _how_to_be_let_in = "make it readable without credentials, or put the bundle where it is"

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

    def __init__(self, endpoint: str, repository: str, revision: str, token: str) -> None:
        super().__init__(f"{endpoint.rstrip('/')}/{repository}")
        self._repository, self._revision, self._token = repository, revision, token

    @property
    def place(self) -> str:
        """As it is written on the command line."""
        return f"hf:{self._repository}@{self._revision}"

    def _address(self, name: str) -> str:
        revision = urllib.parse.quote(self._revision, safe="")
        path = f"{self._base.path}/resolve/{revision}/{urllib.parse.quote(name)}"
        return self._base._replace(path=path).geturl()

    def _credentials(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _settle_on(self, response: http.client.HTTPResponse) -> None:
        commit = response.headers.get("X-Repo-Commit", "")
        if _COMMIT.fullmatch(commit):
            self._revision = commit

    def _exportable(self) -> str:
        return self._repository


class _NotThere(SourceRefused):
    """The server has no such file."""


class _LessSafe(urllib.error.HTTPError):
    """A redirect that is not followed; its reason is in our words."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to other web addresses, never out of TLS, with credentials only on the same server, and without
    reading what comes along with them.
    """

    last: urllib.request.Request
    """Where they have led so far. Whoever opens an address sets it."""

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
        fp.close()  # urllib would read its body, which may have no end, into memory
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            reason = printable(f"redirects to {new.scheme}://{_host(newurl)}, which is less safe")
            raise _LessSafe(req.full_url, code, reason, headers, fp)
        # What opens the proxy is added anew where the next request goes through it, too.
        headers = {name: value for name, value in req.headers.items() if name != "Proxy-authorization"}
        request = urllib.request.Request(newurl, headers=headers)  # noqa: S310  # http or https
        if (old.scheme, old.netloc) == (new.scheme, new.netloc):
            for header, value in req.unredirected_hdrs.items():
                if header == "Authorization":
                    request.add_unredirected_header(header, value)
        self.last = request
        return request


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


def _host(address: str) -> str:
    """Host and port, without the password that somebody may have written before them."""
    return urllib.parse.urlsplit(address).netloc.rpartition("@")[2]


def _check_address(address: str, what: str) -> None:
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
        raise InvalidRequest(f"{what} must not hold a user name or password: others see the command line")


def _unexported(place: str, model: str) -> SourceRefused:
    return SourceRefused(
        f"{place} is a diffusers pipeline and no bundle: export it first with "
        f"`edge-export diffusion {shlex.quote(model)} OUT`, and pull OUT"
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
