"""A bundle on the hub: a web server that wants a token, has revisions, and says more than its status does."""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from edge_agent.errors import InvalidRequest, PullFailed, SourceRefused
from edge_agent.web_source import WebSource, check_address, reason_of

HUB = "https://huggingface.co"
"""The hub, unless HF_ENDPOINT names another."""

_HUB = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?", re.ASCII)
_SECONDS = re.compile(r"\s*\d{1,6}\s*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubSource(WebSource):
    """A repository of the hub, at a branch, tag or commit. A branch that moves during a pull is not followed."""

    _how_to_be_let_in = (
        "set HF_TOKEN to a token that may read it, or look at the name: perhaps there is no such thing"
    )

    _how_to_be_patient = " (HF_HUB_DOWNLOAD_TIMEOUT may say to wait longer, in seconds)"

    def __init__(self, text: str, environment: Mapping[str, str]) -> None:
        """The one that `text` names: hf:OWNER/NAME[@REVISION]. Raises InvalidRequest."""
        found = _HUB.fullmatch(text)
        if found is None or not text.isprintable():  # as what is no UTF-8
            raise InvalidRequest(
                f"{text!r} names no repository of the hub; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
            )
        endpoint = environment.get("HF_ENDPOINT", "").strip() or HUB
        check_address(endpoint, "HF_ENDPOINT", "a token belongs in HF_TOKEN")
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
        super().__init__(f"{endpoint.rstrip('/')}/{found[1]}")
        self._repository, self._revision = found[1], found[2] or "main"
        self._token, self._kept_in = token, kept_in
        self._patience_s = float(patience_s)
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
            f"{file}, which `hf auth login` keeps the token in, cannot be read: {reason_of(error)}; "
            "HF_HUB_DISABLE_IMPLICIT_TOKEN=1 does without"
        ) from error
