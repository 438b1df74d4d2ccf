"""What a hub answers is said in words that help, however many libraries its answer went through."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import constants, hf_hub_download

from cloud_server import hub
from cloud_server.errors import HubNotReached, StartRefused
from cloud_server.model import locate
from tests.hub import NOBODY, asked_here, refusing_hub, silent_hub
from tests.hub import hub as served
from tests.miniature import save_miniature
from tests.web import certificate, web_server

ASKING: dict[str, Callable[[], Any]] = {
    "its library": lambda: hf_hub_download("owner/name", "model_index.json"),
    "diffusers": lambda: DiffusionPipeline.load_config("owner/name"),
}


@pytest.mark.parametrize("asked_by", ASKING)
@pytest.mark.parametrize(
    ("status", "code", "told", "recovers"),
    [
        (401, "GatedRepo", r"agreed to its terms: do so at http\S+/owner/name, and log in with", False),
        (403, "GatedRepo", r"agreed to its terms: do so at http\S+/owner/name, and log in with", False),
        (
            401,
            "RepoNotFound",
            "has no such model, or not for everybody: look at the name; .* HF_TOKEN$",
            False,
        ),
        (
            404,
            "RepoNotFound",
            "has no such model, or not for everybody: look at the name; .* HF_TOKEN$",
            False,
        ),
        (429, "", "answers with the error 429: try again later$", True),
        (503, "", "answers with the error 503: try again later$", True),
        (404, "EntryNotFound", "^$", False),
        (403, "", "answers with the error 403$", False),
        (200, "", "answers without the headers of a hub; check HF_ENDPOINT$", False),
    ],
)
def test_an_answer_says_what_to_do(
    tmp_path: Path,
    asked_by: str,
    status: int,
    code: str,
    told: str,
    recovers: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _s: None)  # between the library's own tries
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with (
        refusing_hub(status, code) as address,
        asked_here(address, tmp_path),
        pytest.raises(Exception) as caught,  # each library raises its own
    ):
        ASKING[asked_by]()
    assert re.search(told, hub.why("owner/name", caught.value))
    assert hub.may_recover(caught.value) is recovers


@pytest.mark.parametrize("asked_by", ASKING)
@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (401, "Invalid credentials in Authorization header", r"refuses the token \(401\).* unset HF_TOKEN$"),
        (403, "", r"refuses the token \(403\).* unset HF_TOKEN$"),
        (403, "Access to this resource is disabled.", "has disabled it$"),
    ],
)
def test_who_has_a_token_is_told_what_the_hub_makes_of_it(
    tmp_path: Path, asked_by: str, status: int, message: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "expired")
    with (
        refusing_hub(status, message=message) as address,
        asked_here(address, tmp_path),
        pytest.raises(Exception) as caught,  # each library raises its own
    ):
        ASKING[asked_by]()
    assert re.search(told, hub.why("owner/name", caught.value))
    assert not hub.may_recover(caught.value)


@pytest.mark.parametrize("status", [429, 503])
def test_a_model_whose_card_the_hub_does_not_give_just_now_is_not_served_without_it(
    tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has another digest without its card, and edges go by that."""
    monkeypatch.setattr(time, "sleep", lambda _s: None)  # between the library's own tries
    model = save_miniature(tmp_path / "model")
    (model / "routet2i.json").write_text("{}")
    with (
        served(model, failing={"routet2i.json": status}) as address,
        asked_here(address, tmp_path / "cache"),
        pytest.raises(HubNotReached),
    ):
        locate("owner/name")
    with served(model) as address, asked_here(address, tmp_path / "cache"):
        assert (locate("owner/name") / "routet2i.json").is_file()


def test_a_hub_with_a_certificate_that_nobody_trusts_is_told_at_once_and_what_is_kept_serves(
    tmp_path: Path,
) -> None:
    with served(save_miniature(tmp_path / "model")) as address, asked_here(address, tmp_path / "cache"):
        folder = locate("owner/name")
    with (
        web_server(tmp_path, certificate(tmp_path, "IP:127.0.0.1")) as web,
        asked_here(web.address, tmp_path / "cache"),
    ):
        began = time.monotonic()
        assert locate("owner/name") == folder
        with pytest.raises(
            StartRefused,
            match=r"certificate of the hub.* not to be trusted: self.signed.*PEM file in [A-Z_]+$",
        ) as refused:
            locate("owner/another")
        assert time.monotonic() - began < 15  # the library tries for 23 s
    assert not isinstance(refused.value, HubNotReached)


def test_a_hub_is_out_of_reach_where_nobody_answers_and_not_where_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with silent_hub() as silent:
        # No way leads to the last one, which is for documentation, or nobody answers there.
        for address in (NOBODY, silent, "http://[2001:db8::1]"):
            with asked_here(address, tmp_path):
                assert hub.out_of_reach("owner/name")
                assert not hub.out_of_reach(tmp_path)
    with refusing_hub(503) as address, asked_here(address, tmp_path):
        assert not hub.out_of_reach("owner/name")


def test_a_hub_that_says_nothing_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(0)
        with asked_here(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path):
            assert hub.out_of_reach("owner/name") and hub.out_of_reach("owner/another")
        silent.accept()
        with pytest.raises(BlockingIOError):
            silent.accept()


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN])
def test_a_hub_to_which_no_way_leads_may_be_reached_later(number: int) -> None:
    assert hub.may_recover(OSError(number, os.strerror(number)))
    assert not hub.may_recover(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def test_what_a_model_of_the_hub_needs_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cloud_server.complete", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StartRefused, match=r"pip install 'routet2i\[cloud\]'"):
        locate("owner/name")


def test_a_model_that_is_kept_is_found_without_the_hub(tmp_path: Path) -> None:
    with served(save_miniature(tmp_path / "model")) as address, asked_here(address, tmp_path / "cache"):
        folder = locate("owner/name")
    with silent_hub() as address, asked_here(address, tmp_path / "cache"):
        assert locate("owner/name") == folder
        with pytest.raises(HubNotReached, match="cannot be reached and has left no copy here"):
            locate("owner/another")


def test_a_hub_that_is_not_to_be_asked_is_not_waited_for_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with (
        asked_here(NOBODY, tmp_path),
        pytest.raises(StartRefused, match="HF_HUB_OFFLINE is set, so the hub is not asked") as refused,
    ):
        locate("owner/name")
    assert not isinstance(refused.value, HubNotReached)
