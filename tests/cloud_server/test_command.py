"""The command, as people and scripts run it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cloud_server.model import CARD_FILE, open_model
from tests.running import process_environment


def digest(model_folder: Path, folder: Path, output: int) -> tuple[int, str]:
    finished = subprocess.run(
        [sys.executable, "-m", "cloud_server", "digest", "--model", str(model_folder)],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment(folder),
        check=False,
    )
    return finished.returncode, finished.stderr


def test_a_digest_whose_reader_is_gone_or_whose_disk_is_full_ends_without_a_traceback(
    model_folder: Path, tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert digest(model_folder, tmp_path, writing)[0] == 0
    os.close(writing)
    with Path("/dev/full").open("w") as full:
        code, said = digest(model_folder, tmp_path, full.fileno())
    assert code == 2 and "cannot be written: No space left" in said and "Traceback" not in said
    with (tmp_path / "digest").open("w") as file:
        assert digest(model_folder, tmp_path, file.fileno())[0] == 0
    assert (tmp_path / "digest").read_text() == f"{open_model(str(model_folder)).digest}\n"


def test_a_refusal_that_nobody_takes_keeps_its_exit_code_and_stays_out_of_the_digest(tmp_path: Path) -> None:
    command = f"{sys.executable} -m cloud_server digest --model /nowhere"
    for closed in ("2>&-", "2>/dev/full"):
        finished = subprocess.run(
            ["/bin/sh", "-c", f"{command} {closed}"],
            capture_output=True,
            text=True,
            env=process_environment(tmp_path),
            check=False,
        )
        assert (finished.returncode, finished.stdout) == (2, "")


COMMIT = "c0ffee" + "0" * 34


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """The address of a hub with the one repository owner/name, which holds the files of `folder`."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            path = urlsplit(self.path).path
            name = path.removeprefix("/owner/name/resolve/").partition("/")[2]
            headers = {"X-Repo-Commit": COMMIT}
            if path.startswith("/api/models/owner/name"):
                siblings = [{"rfilename": each} for each in files]
                code, body = (
                    200,
                    json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode(),
                )
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

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name in the base class
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("card", [True, False])
def test_a_model_of_the_hub_comes_with_its_card_where_it_has_one(
    model_folder: Path, tmp_path: Path, card: bool
) -> None:
    """Diffusers downloads the files it knows, and a card that is left behind is one whose steps nobody takes."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    if not card:
        (folder / CARD_FILE).unlink()
    with hub(folder) as address:
        finished = subprocess.run(
            [sys.executable, "-m", "cloud_server", "digest", "--model", "owner/name"],
            capture_output=True,
            text=True,
            env=process_environment(tmp_path) | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")},
            check=False,
        )
    assert finished.stdout.strip() == open_model(str(folder)).digest, finished.stderr
