"""A hub with one repository, over real HTTP: what its library asks for, with the headers that it looks at."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants, file_download, hf_api

from cloud_server import hub as asking

COMMIT = "c0ffee" + "0" * 34

NOBODY = "http://127.0.0.1:9"
"""The address of a hub that cannot be reached."""


class _Silent(http.server.BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name in the base class
        pass


@contextmanager
def _served(handler: type[_Silent]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def hub(folder: Path, repository: str = "owner/name", failing: Mapping[str, int] = {}) -> Iterator[str]:
    """The address of a hub with the one repository, which holds the files of `folder`; instead of those that are
    `failing` it answers with a status of HTTP.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    class Handler(_Silent):
        def do_HEAD(self) -> None:
            path = urlsplit(self.path).path
            name = path.removeprefix(f"/{repository}/resolve/").partition("/")[2]
            headers = {"X-Repo-Commit": COMMIT}
            if path.startswith(f"/api/models/{repository}/tree/"):  # which newer versions ask for
                tree = [
                    {"type": "file", "path": each, "size": file.stat().st_size, "oid": each}
                    for each, file in files.items()
                ]
                code, body = 200, json.dumps(tree).encode()
            elif path.startswith(f"/api/models/{repository}"):
                about = {
                    "id": repository,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": each} for each in files],
                }
                code, body = 200, json.dumps(about).encode()
            elif name in failing:
                code, body = failing[name], b""
            elif name in files:
                code, body = 200, files[name].read_bytes()
                headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
            else:
                code, body = 404, b""
                headers["X-Error-Code"] = "EntryNotFound"
            self.send_response(code)
            for header, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            self.do_HEAD()

    with _served(Handler) as address:
        yield address


@contextmanager
def silent_hub() -> Iterator[str]:
    """The address of a hub that takes calls and never says anything, for which a fifth of a second is waited."""
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def asked_here(address: str, cache: Path) -> Iterator[None]:
    """This process's own library asks the hub at `address`, and keeps what it gets in `cache`, where else two variables
    of the environment say so before it is imported.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(hf_api.api, "endpoint", address)
        patch.setattr(asking, "_unreached", {})  # the address may have been another's
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # where the library's versions look
            patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield


@contextmanager
def refusing_hub(status: int, code: str = "", message: str = "") -> Iterator[str]:
    """The address of a hub that answers everything with this status of HTTP, and this code and message of its own."""
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"}

    class Handler(_Silent):
        def do_GET(self) -> None:
            self.send_response(status)
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815  # their names in the base class

    with _served(Handler) as address:
        yield address
