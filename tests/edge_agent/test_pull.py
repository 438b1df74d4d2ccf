"""A pull brings a bundle whole or not at all, from servers that do what servers do, and goes on where it stopped."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.errors import (
    BundleError,
    Busy,
    InvalidRequest,
    NewerBundle,
    PullFailed,
    SourceLied,
    SourceRefused,
    SourceUnreachable,
    StoreError,
)
from edge_agent.hub_source import HubSource
from edge_agent.manifest import (
    DECODER,
    DENOISER,
    MANIFEST,
    MAX_JSON_BYTES,
    SCHEMA_VERSION,
    TEXT_ENCODER,
    TOKENIZER,
)
from edge_agent.pull import SPARE_BYTES, Fetched, Pulled, pull
from edge_agent.settings import STARTER
from edge_agent.source import FolderSource, source_of
from edge_agent.store import Store
from edge_agent.web_source import WebSource
from tests.hollow import EMPTY, SIZES, hollow_bundle
from tests.running import process_environment
from tests.web import Web, certificate, web_server

KILLS = int(os.environ.get("ROUTET2I_KILLS", "2"))
"""How often a pull is killed at a random moment; a hundred take some minutes."""

NO_WAITS = (0.0, 0.0, 0.0, 0.0)
TOTAL = sum(SIZES.values())


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only to be read."""
    return hollow_bundle(tmp_path_factory.mktemp("hollow") / "bundle")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models", STARTER)


@pytest.fixture(autouse=True)
def nobody_has_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of whoever runs the tests is no business of theirs."""
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tmp_path))


@pytest.fixture
def web(hollow: Path, tmp_path: Path) -> Iterator[Web]:
    """A server with a copy of the bundle at /b that a test may damage."""
    shutil.copytree(hollow, tmp_path / "www" / "b")
    with web_server(tmp_path / "www") as web:
        yield web


def source(web: Web, **how: Any) -> WebSource:
    return WebSource(f"{web.address}/b", **how)


def fetch(source: Any, store: Store, name: str | None = None) -> Pulled:
    *_, last = pull(source, store, name, waits_s=NO_WAITS)
    assert isinstance(last, Pulled)
    return last


def same(installed: Path, original: Path) -> bool:
    def files(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }

    return files(installed) == files(original)


def assert_nothing_shows(store: Store) -> None:
    assert store.names() == ["starter"]
    assert {path.name for path in store.folder.iterdir()} <= {".partial"}


def test_the_starter_comes_whole_from_a_folder_and_from_a_server(store: Store) -> None:
    there = fetch(FolderSource(STARTER), store)
    assert (there.name, there.was_installed) == ("routet2i-starter-edge", False)
    assert there.bundle.model_digest == Bundle.open(there.bundle.folder, verify=True).model_digest
    with web_server(STARTER.parent) as web:
        again = fetch(WebSource(f"{web.address}/starter/manifest.json"), store, "second")
    assert again.fetched_bytes == there.fetched_bytes == web.sent() - web.sent(MANIFEST)
    assert again.bundle.advice == ""  # it comes calibrated
    assert same(store.folder / "second", STARTER)
    assert list((store.folder / ".partial").iterdir()) == []


def test_progress_ends_at_the_size_of_the_bundle_and_never_goes_back(web: Web, store: Store) -> None:
    events = list(pull(source(web), store))
    fetched = [event for event in events if isinstance(event, Fetched)]
    done = [event.done_bytes for event in fetched]
    assert done == sorted(done) and done[-1] == TOTAL
    assert {event.total_bytes for event in fetched} == {TOTAL}
    assert {event.file for event in fetched} >= set(SIZES)


def test_what_is_installed_is_not_fetched_again_and_not_replaced(
    web: Web, store: Store, tmp_path: Path
) -> None:
    fetch(source(web), store)
    before = web.sent()
    again = fetch(source(web), store)
    assert (again.was_installed, again.fetched_bytes) == (True, 0)
    assert list((store.folder / ".partial").iterdir()) == []  # nor is a lock left
    assert web.sent() - before == web.sent(MANIFEST) / 2  # the manifest alone
    other = FolderSource(hollow_bundle(tmp_path / "other", seed=1))
    with pytest.raises(StoreError, match=r"another bundle than this one.*--name"):
        fetch(other, store)
    weights = store.folder / "hollow" / DENOISER
    for damage in (lambda: weights.write_bytes(bytes(SIZES[DENOISER])), weights.unlink):
        damage()
        with pytest.raises(StoreError, match=r"not whole.*models remove hollow"):
            fetch(source(web), store)
    manifest = store.folder / "hollow" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(StoreError, match=r"newer than this edge-agent: update edge-agent, or .*--name"):
        fetch(source(web), store)
    assert fetch(other, store, "other").name == "other"


def test_a_server_that_stops_in_the_middle_is_asked_for_the_rest_alone(
    web: Web, store: Store, hollow: Path
) -> None:
    web.misbehave("stop", at=DENOISER, times=3)
    fetch(source(web), store)
    half = SIZES[DENOISER] // 2
    assert web.offsets(DENOISER)[:2] == [0, half] and len(web.offsets(DENOISER)) == 4
    assert web.sent(DENOISER) == SIZES[DENOISER]  # not one byte twice
    assert same(store.folder / "hollow", hollow)


def test_a_chunk_that_ends_early_is_completed(web: Web, store: Store, hollow: Path) -> None:
    web.misbehave("cut", at=DENOISER, times=1)
    fetch(source(web), store)
    assert web.offsets(DENOISER) == [0, SIZES[DENOISER] // 2]
    assert same(store.folder / "hollow", hollow)


def test_a_server_that_always_stops_is_given_up_and_the_next_pull_goes_on(
    web: Web, store: Store, hollow: Path
) -> None:
    web.misbehave("stop", at=DENOISER)
    with pytest.raises(
        SourceUnreachable, match=r"broke off in unet/model\.onnx.*goes on where this one stopped"
    ):
        fetch(source(web), store)
    assert_nothing_shows(store)
    kept = (store.partial("hollow") / DENOISER).stat().st_size
    sent = web.sent()
    web.misbehave("honest")
    fetched = fetch(source(web), store).fetched_bytes
    assert web.offsets(DENOISER)[-1] == kept > 0
    assert web.sent() - sent - (hollow / MANIFEST).stat().st_size == fetched < TOTAL - kept + 1
    assert web.sent(TEXT_ENCODER) == SIZES[TEXT_ENCODER]
    assert same(store.folder / "hollow", hollow)


def test_a_server_without_ranges_starts_that_file_over_and_no_other(
    web: Web, store: Store, hollow: Path
) -> None:
    web.misbehave("stop", at=DENOISER)
    with pytest.raises(SourceUnreachable):
        fetch(source(web), store)
    web.misbehave("no_range")
    before = web.sent(DENOISER)
    fetch(source(web), store)
    assert web.sent(DENOISER) - before == SIZES[DENOISER]
    assert web.sent(TEXT_ENCODER) == SIZES[TEXT_ENCODER]
    assert same(store.folder / "hollow", hollow)


def test_a_server_that_begins_anew_each_time_and_never_ends_is_given_up(
    web: Web, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.pull.WORTH_BYTES", SIZES[DENOISER] // 8)
    web.misbehave("anew", at=DENOISER)
    with pytest.raises(SourceUnreachable):
        fetch(source(web), store)
    assert len(web.offsets(DENOISER)) <= 2 + len(NO_WAITS)


@pytest.mark.posix
def test_what_lies_where_a_model_would_be_is_told_before_it_is_fetched(web: Web, store: Store) -> None:
    store.folder.mkdir(parents=True)
    (store.folder / "hollow").symlink_to("/nowhere")
    (store.folder / "file").write_text("")
    for name, words in (("hollow", "models remove hollow"), ("file", "is there already")):
        with pytest.raises(StoreError, match=words):
            fetch(source(web), store, name)
    assert web.sent(DENOISER) == 0


def test_a_server_that_falls_silent_is_asked_again(
    web: Web, store: Store, hollow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.web_source.TIMEOUT_S", 0.3)
    web.misbehave("hang", at=DENOISER, times=1)
    fetch(source(web), store)
    assert web.offsets(DENOISER) == [0, SIZES[DENOISER] // 2]
    assert same(store.folder / "hollow", hollow)


def test_a_hub_may_be_silent_for_as_long_as_its_variable_says(
    web: Web, store: Store, hollow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.web_source.TIMEOUT_S", 0.2)
    hub(web, hollow)
    environment = {"HF_ENDPOINT": web.address}
    web.misbehave("late", at=DENOISER, times=1)
    (trouble,) = [
        event.trouble
        for event in pull(source_of("hf:someone/hollow", environment), store, waits_s=NO_WAITS)
        if isinstance(event, Fetched) and event.trouble
    ]
    assert "no answer in time (HF_HUB_DOWNLOAD_TIMEOUT may" in trouble
    assert len(web.offsets(DENOISER)) == 2
    web.asked.clear()
    web.times = 1
    environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "20"
    fetch(source_of("hf:someone/hollow", environment), store, "again")
    assert len(web.offsets(DENOISER)) == 1


@pytest.mark.parametrize("seconds", ["ten", "-1", "1e3", "99999999", "٣"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(seconds: str) -> None:
    with pytest.raises(InvalidRequest, match="HF_HUB_DOWNLOAD_TIMEOUT is"):
        source_of("hf:someone/hollow", {"HF_HUB_DOWNLOAD_TIMEOUT": seconds})


@pytest.mark.parametrize(
    ("manner", "words"),
    [
        ("wrong", "does not match its sha256"),
        ("longer", f"has {SIZES[DENOISER] + 1} bytes where"),
        ("shorter", f"has {SIZES[DENOISER] - 1} bytes where"),
        ("endless", "goes on beyond"),
        ("other_part", "another part"),
    ],
)
def test_a_server_that_lies_is_found_out_and_what_was_right_is_kept(
    web: Web, store: Store, hollow: Path, manner: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.pull.WORTH_BYTES", SIZES[TEXT_ENCODER])
    web.misbehave(manner, at=DENOISER)
    with pytest.raises(SourceLied, match=rf"{words}.*is kept for another try; .*models remove hollow"):
        fetch(source(web), store)
    assert_nothing_shows(store)
    assert store.unfinished()["hollow"] <= TOTAL + (hollow / MANIFEST).stat().st_size
    web.misbehave("honest")
    fetch(source(web), store)
    assert web.sent(TEXT_ENCODER) == SIZES[TEXT_ENCODER]
    assert same(store.folder / "hollow", hollow)


@pytest.mark.parametrize(("manner", "kind"), [("wrong", SourceLied), ("status", SourceRefused)])
def test_a_refused_pull_leaves_nothing_that_is_soon_fetched_again(
    web: Web, store: Store, manner: str, kind: type[PullFailed]
) -> None:
    web.misbehave(manner, at=TEXT_ENCODER, code=404)  # after a schedule
    with pytest.raises(kind) as raised:
        fetch(source(web), store)
    assert "kept" not in raised.value.message
    assert list((store.folder / ".partial").iterdir()) == []


def test_a_part_that_begins_beyond_all_numbers_is_another_than_was_asked_for(web: Web, store: Store) -> None:
    web.misbehave("status", at=DENOISER, code=206, headers={"Content-Range": "bytes " + "9" * 5000 + "-1/2"})
    with pytest.raises(SourceLied, match="another part"):
        fetch(source(web), store)


@pytest.mark.parametrize("manner", ["other_part", "longer", "refused"])
def test_a_server_that_does_not_give_the_rest_as_asked_is_asked_for_the_whole_file_once(
    web: Web, store: Store, hollow: Path, manner: str
) -> None:
    """What there is of it stays until the whole file comes: a network's login page may have answered."""

    def break_off() -> bytes:
        web.misbehave("stop", at=DENOISER)
        with pytest.raises(SourceUnreachable):
            fetch(source(web), store)
        web.asked.clear()
        web.misbehave("status" if manner == "refused" else manner, at=DENOISER, code=416)
        return (store.partial("hollow") / DENOISER).read_bytes()

    there = break_off()
    with pytest.raises(SourceLied, match="is kept for another try"):
        fetch(source(web), store)
    assert web.offsets(DENOISER) == [len(there), 0]
    assert (store.partial("hollow") / DENOISER).read_bytes() == there
    break_off()
    web.times = 1
    fetch(source(web), store)
    assert web.offsets(DENOISER)[1:] == [0]
    assert same(store.folder / "hollow", hollow)


def test_a_login_page_in_the_place_of_the_rest_costs_nothing_of_what_came(
    web: Web, store: Store, hollow: Path
) -> None:
    web.misbehave("stop", at=DENOISER)
    with pytest.raises(SourceUnreachable):
        fetch(source(web), store)
    came = web.sent(DENOISER)
    web.misbehave("page", at=DENOISER)
    with pytest.raises(SourceRefused, match=r"model\.onnx is a web page, a login perhaps.*for another try"):
        fetch(source(web), store)
    web.misbehave("honest")
    web.asked.clear()
    fetch(source(web), store)
    assert web.offsets(DENOISER) == [came]
    assert same(store.folder / "hollow", hollow)


def test_a_login_page_of_another_size_is_told_from_a_file_that_is_wrong(web: Web, store: Store) -> None:
    web.misbehave("shorter", at=DENOISER, headers={"Content-Type": "text/html"})
    with pytest.raises(SourceRefused, match=r"model\.onnx is a web page, a login perhaps"):
        fetch(source(web), store)


def test_a_server_without_ranges_may_call_its_files_web_pages(web: Web, store: Store, hollow: Path) -> None:
    web.misbehave("stop", at=DENOISER)
    with pytest.raises(SourceUnreachable):
        fetch(source(web), store)
    web.misbehave("no_range", at=DENOISER, headers={"Content-Type": "text/html"})
    fetch(source(web), store)
    assert same(store.folder / "hollow", hollow)


def test_a_file_that_changed_between_two_attempts_is_fetched_anew(
    web: Web, store: Store, hollow: Path
) -> None:
    file = web.folder / "b" / DENOISER
    file.write_bytes(bytes(SIZES[DENOISER]))
    web.misbehave("stop", at=DENOISER, times=1)
    for event in pull(source(web), store, waits_s=NO_WAITS):
        if isinstance(event, Fetched) and event.trouble:
            shutil.copy(hollow / DENOISER, file)
    assert web.offsets(DENOISER) == [0, SIZES[DENOISER] // 2, 0]
    assert same(store.folder / "hollow", hollow)


def test_a_file_whose_pieces_never_fit_is_started_over_once(web: Web, store: Store) -> None:
    (web.folder / "b" / DENOISER).write_bytes(bytes(SIZES[DENOISER]))
    web.misbehave("stop", at=DENOISER, times=1)
    for event in (pulling := pull(source(web), store, waits_s=NO_WAITS)):
        if isinstance(event, Fetched) and event.trouble:
            break
    with pytest.raises(SourceLied, match="does not match its sha256"):
        list(pulling)
    assert web.offsets(DENOISER) == [0, SIZES[DENOISER] // 2, 0]


def test_a_manifest_without_end_is_not_read_to_it(web: Web, store: Store) -> None:
    web.misbehave("endless", at=MANIFEST)
    with pytest.raises(BundleError, match="larger than any manifest"):
        fetch(source(web), store)
    assert not store.folder.exists()


def test_bytes_that_the_power_took_are_fetched_again(web: Web, store: Store, hollow: Path) -> None:
    web.misbehave("stop", at=DENOISER)
    with pytest.raises(SourceUnreachable):
        fetch(source(web), store)
    partial = store.partial("hollow")
    for name in (DENOISER, TEXT_ENCODER):
        with (partial / name).open("r+b") as file:
            file.write(bytes(4096))
    (partial / DECODER).parent.mkdir(exist_ok=True)
    (partial / DECODER).write_bytes(bytes(SIZES[DECODER] + 1))
    web.misbehave("honest")
    fetch(source(web), store)
    assert same(store.folder / "hollow", hollow)


def awaits_its_place(path: Path) -> bool:
    """Whether bytes of the file are in memory alone: the file system has not even chosen where on the disk they go.

    Raises OSError where the file system does not tell (ioctl_fiemap(2)).
    """
    import fcntl

    room = 64  # extents
    answer = bytearray(struct.pack("=QQLLLL", 0, 2**64 - 1, 0, 0, room, 0) + bytes(56 * room))
    with path.open("rb") as file:
        fcntl.ioctl(file, 0xC020660B, answer)  # FS_IOC_FIEMAP
    (found,) = struct.unpack_from("=L", answer, 20)
    flags = [struct.unpack_from("=L", answer, 32 + 56 * extent + 40)[0] for extent in range(found)]
    return any(flag & 4 for flag in flags)  # FIEMAP_EXTENT_DELALLOC


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is on the disk")
def test_what_is_installed_is_on_the_disk_before_it_shows(web: Web, store: Store, tmp_path: Path) -> None:
    """As far as it can be seen without pulling the plug: what nobody has synced has no place on the disk yet."""
    (tmp_path / "unsynced").write_bytes(bytes(100_000))
    try:
        told = awaits_its_place(tmp_path / "unsynced")
    except OSError:
        told = False
    if not told:
        pytest.skip("this file system does not tell what is on the disk")
    fetch(source(web), store)
    installed = [path for path in (store.folder / "hollow").rglob("*") if path.is_file()]
    assert len(installed) == len(SIZES) + 2
    assert [path.name for path in installed if awaits_its_place(path)] == []


def test_the_files_that_another_version_has_too_are_kept(web: Web, store: Store) -> None:
    """A new calibration, or a branch that moved, is no reason to fetch gigabytes again."""
    web.misbehave("stop", at=DENOISER)
    with pytest.raises(SourceUnreachable):
        fetch(source(web), store)
    kept = (store.partial("hollow") / DENOISER).stat().st_size
    newer = web.folder / "b"
    (newer / DECODER).write_bytes(bytes(1_000))
    (newer / EMPTY).unlink()
    added = newer / "text_encoder" / "more"
    added.mkdir()
    (added / "new.txt").write_text("new")
    write_manifest(newer)
    stray = store.partial("hollow") / "text_encoder" / "more"  # a file where the new one has a folder
    stray.write_text("")
    web.misbehave("honest")
    web.asked.clear()
    fetch(source(web), store)
    assert web.offsets(DENOISER) == [kept]
    assert web.sent(TEXT_ENCODER) == 0
    assert same(store.folder / "hollow", newer)


def test_what_is_left_of_another_version_is_thrown_away(web: Web, store: Store, tmp_path: Path) -> None:
    web.misbehave("stop", at=DENOISER)
    with pytest.raises(SourceUnreachable):
        fetch(source(web), store)
    shutil.rmtree(tmp_path / "www" / "b")
    newer = hollow_bundle(tmp_path / "www" / "b", seed=2)
    web.misbehave("honest")
    fetch(source(web), store)
    assert same(store.folder / "hollow", newer)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (404, SourceRefused, r"is not there \(404\), though manifest\.json lists it"),
        (403, SourceRefused, "not for everybody"),
        (400, SourceRefused, "400"),
        (500, SourceUnreachable, "500.*goes on where this one stopped"),
        (503, SourceUnreachable, "503"),
        (429, SourceUnreachable, "429"),
    ],
)
def test_a_status_is_told(web: Web, store: Store, code: int, kind: type[PullFailed], words: str) -> None:
    web.misbehave("status", at=TEXT_ENCODER, code=code)
    with pytest.raises(kind, match=words) as raised:
        fetch(source(web), store)
    assert "text_encoder/model.onnx" in raised.value.message
    assert_nothing_shows(store)


def test_a_server_that_is_overloaded_for_a_moment_is_asked_again(web: Web, store: Store) -> None:
    web.misbehave("status", at=TEXT_ENCODER, code=503, times=2)
    events = list(pull(source(web), store, waits_s=NO_WAITS))
    assert isinstance(events[-1], Pulled)
    assert ["503" in event.trouble for event in events if isinstance(event, Fetched) and event.trouble] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "3600"},
        {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"},
        {"RateLimit": '"pages";r=2;t=7, "resolvers";r=0;t=3600'},
    ],
)
def test_a_server_that_wants_to_be_left_alone_for_long_is_left_to_the_next_pull(
    web: Web, store: Store, headers: dict[str, str]
) -> None:
    web.misbehave("status", at=TEXT_ENCODER, code=429, headers=headers)
    with pytest.raises(SourceUnreachable, match=r"\(429 .*; it says to come back in \d{4,} s"):
        fetch(source(web), store)
    assert len(web.offsets(TEXT_ENCODER)) == 1


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"Retry-After": "1", "RateLimit": '"resolvers";r=0;t=55'}, 1.0),
        ({"Retry-After": "Mon, 31 Foo 99999 99:00:00 +99", "RateLimit": '"resolvers";r=0;t=55'}, 55.0),
        ({"Retry-After": "Fri, 31 Dec 99999 23:59:59 GMT", "RateLimit": '"resolvers";r=0;t=55'}, 55.0),
        ({"Retry-After": "9" * 400}, 1e9),
        ({"RateLimit": f'"resolvers";r=0;t={"9" * 400}'}, 1e9),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"resolvers";r=9;t=55'}, None),
    ],
)
def test_a_server_says_in_one_way_or_another_when_to_come_back(
    web: Web, headers: dict[str, str], wait_s: float | None
) -> None:
    web.misbehave("status", code=429, headers=headers)
    with pytest.raises(SourceUnreachable) as raised:
        source(web).manifest()
    assert raised.value.retry_after_s == wait_s


@pytest.mark.parametrize("token", ["", "secret"])
def test_who_asks_the_hub_too_often_without_a_token_is_told_that_one_helps(web: Web, token: str) -> None:
    web.misbehave("status", code=429)
    with pytest.raises(SourceUnreachable) as raised:
        source_of("hf:someone/hollow", {"HF_ENDPOINT": web.address, "HF_TOKEN": token}).manifest()
    assert ("a token in HF_TOKEN raises the limit" in raised.value.message) is (not token)


def test_a_server_that_is_not_there_is_named_at_once(store: Store, web: Web) -> None:
    with pytest.raises(SourceUnreachable, match=r"127\.0\.0\.1:1 cannot be reached: Connection refused"):
        fetch(WebSource("http://127.0.0.1:1/b"), store)
    web.misbehave("status", code=500)
    with pytest.raises(SourceUnreachable, match="500"):
        fetch(source(web), store)
    assert len(web.asked) == 1
    assert not store.folder.exists()


def test_a_compressed_answer_is_refused(web: Web, store: Store) -> None:
    web.misbehave("compressed", at=DENOISER)
    with pytest.raises(SourceRefused, match="compressed"):
        fetch(source(web), store)
    web.headers = {"Content-Encoding": "aws-chunked, gzip"}
    with pytest.raises(SourceRefused, match=r"manifest\.json compressed"):
        fetch(source(web), store)


@pytest.mark.parametrize("encoding", ["", "Identity", "aws-chunked", "identity, AWS-chunked,"])
def test_an_encoding_that_changes_nothing_is_none(web: Web, encoding: str) -> None:
    web.headers = {"Content-Encoding": encoding}
    assert source(web).manifest() == (web.folder / "b" / MANIFEST).read_bytes()


def test_a_redirect_is_followed_with_the_range_and_a_circle_is_not(
    web: Web, store: Store, hollow: Path
) -> None:
    web.misbehave("stop", at=DENOISER)
    with pytest.raises(SourceUnreachable):
        fetch(source(web), store)
    kept = (store.partial("hollow") / DENOISER).stat().st_size
    web.misbehave("redirect", at=DENOISER)
    with pytest.raises(SourceRefused, match=r"redirects in a circle, or too often \(302 Found\)"):
        fetch(source(web), store)
    with web_server(hollow) as other:
        web.misbehave("redirect", at=DENOISER, to=f"{other.address}/{DENOISER}")
    host = other.address.removeprefix("http://")
    with pytest.raises(
        SourceUnreachable, match=f"^{host}, to which 127.0.0.1:.* redirects, cannot be reached"
    ):
        fetch(source(web), store)  # the other is closed by now
    with web_server(hollow) as other:
        host = other.address.removeprefix("http://")
        web.misbehave("redirect", at=DENOISER, to=f"http://user:password@{host}/{DENOISER}")
        fetch(source(web), store)
    assert other.offsets(DENOISER) == [kept]
    assert same(store.folder / "hollow", hollow)


def test_what_a_redirect_says_beside_is_not_read(web: Web, store: Store, hollow: Path) -> None:
    """It may have no end, and urllib would read it into memory."""
    with web_server(hollow) as other:
        web.misbehave("chatty_redirect", at=DENOISER, to=f"{other.address}/{DENOISER}")
        fetch(source(web), store)
    assert web.sent(DENOISER) < 32_000_000  # what sockets hold
    assert same(store.folder / "hollow", hollow)


def test_what_opens_the_proxy_goes_no_further_than_the_proxy(
    web: Web, hollow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", web.address.replace("://", "://user:secret@"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with web_server(hollow) as elsewhere:
        web.misbehave("redirect", to=f"{elsewhere.address}/{MANIFEST}")
        WebSource("http://models.example.com/b").manifest()
    assert web.asked[0].headers["Proxy-Authorization"].startswith("Basic ")
    assert [
        name for asked in elsewhere.asked for name in asked.headers if name.lower().startswith("proxy")
    ] == []


def test_a_proxy_whose_address_is_none_is_named_as_a_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:s3cret")
    with pytest.raises(
        SourceRefused, match="the proxy in HTTP_PROXY or HTTPS_PROXY is not well-formed"
    ) as raised:
        WebSource("http://models.example.com/b").manifest()
    assert "s3cret" not in raised.value.message


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (0, SourceUnreachable, "models.example.com cannot be reached through the proxy {proxy}: Connection"),
        (403, PullFailed, "through the proxy {proxy}.*403"),
        (407, PullFailed, "the proxy {proxy}.*407.*USER:PASSWORD"),
    ],
)
def test_a_proxy_that_does_not_let_through_is_named(
    web: Web, monkeypatch: pytest.MonkeyPatch, scheme: str, code: int, kind: type[PullFailed], words: str
) -> None:
    address = web.address if code else "http://127.0.0.1:1"
    web.misbehave("status", code=code)
    monkeypatch.setenv(f"{scheme}_proxy", address.replace("://", "://user:s3cret@"))
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(kind, match=words.format(proxy=address.removeprefix("http://"))) as raised:
        WebSource(f"{scheme}://models.example.com/b").manifest()
    assert f"{scheme.upper()}_PROXY" in raised.value.message
    assert "s3cret" not in raised.value.message


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_speaks_socks_is_refused(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv(f"{scheme}_proxy", "socks5h://user:s3cret@127.0.0.1:1")
    words = f"proxy 127.0.0.1:1, which speaks SOCKS: name one that speaks HTTP in {scheme.upper()}_PROXY"
    with pytest.raises(SourceRefused, match=words) as raised:
        WebSource(f"{scheme}://models.example.com/b").manifest()
    assert "s3cret" not in raised.value.message


def test_where_a_redirect_leads_is_named_when_it_cannot_be_reached(web: Web) -> None:
    web.misbehave("redirect", to="http://user:s3cret@127.0.0.1:1/x?sig=s3cret")
    asked = web.address.removeprefix("http://")
    with pytest.raises(
        SourceUnreachable, match=rf"^127\.0\.0\.1:1, to which {asked} redirects, cannot be reached"
    ) as raised:
        source(web).manifest()
    assert "s3cret" not in raised.value.message


@pytest.mark.parametrize("code", [401, 403])
def test_where_a_redirect_leads_is_named_when_it_refuses_and_the_token_is_not_blamed(
    web: Web, hollow: Path, code: int
) -> None:
    with web_server(hollow) as elsewhere:
        web.misbehave("redirect", to=f"{elsewhere.address}/x?sig=s3cret")
        elsewhere.misbehave("status", code=code)
        host, asked = (each.address.removeprefix("http://") for each in (elsewhere, web))
        with pytest.raises(
            SourceRefused,
            match=rf"^{host}, to which {asked} redirects, refuses manifest\.json \({code}\); a firewall",
        ) as raised:
            source_of("hf:someone/hollow", {"HF_ENDPOINT": web.address, "HF_TOKEN": "secret"}).manifest()
    assert "HF_TOKEN" not in raised.value.message
    assert "s3cret" not in raised.value.message


def test_a_server_without_tls_is_told_from_one_that_is_not_there(web: Web) -> None:
    with pytest.raises(SourceUnreachable, match=r"over TLS: wrong version number; .*http://"):
        WebSource(web.address.replace("http:", "https:")).manifest()


def test_a_redirect_leads_to_no_file_of_this_machine(web: Web, store: Store, tmp_path: Path) -> None:
    for target in (f"file://{tmp_path}/www/b/{DENOISER}", "ftp://127.0.0.1/x"):
        web.misbehave("redirect", at=DENOISER, to=target)
        with pytest.raises(SourceRefused):
            fetch(source(web), store)


def hub(web: Web, hollow: Path, revision: str = "main") -> None:
    """Lays the bundle out as the hub does."""
    shutil.copytree(hollow, web.folder / "someone" / "hollow" / "resolve" / revision)


def test_the_hub_is_asked_at_its_plain_addresses_with_the_token_kept_to_itself(
    web: Web, store: Store, hollow: Path
) -> None:
    commit = "c0ffee" + "0" * 34
    hub(web, hollow, "v1%2F2")  # the server unquotes once: %252F asks for it
    hub(web, hollow, commit)
    environment = {"HF_ENDPOINT": web.address, "HF_TOKEN": "secret"}
    with web_server(hollow) as elsewhere:
        web.headers = {"X-Repo-Commit": commit}
        web.misbehave("redirect", at=DENOISER, to=f"{elsewhere.address}/{DENOISER}")
        fetch(source_of("hf:someone/hollow@v1%2F2", environment), store)
    assert web.asked[0].path == "/someone/hollow/resolve/v1%252F2/manifest.json"
    # Whatever the branch becomes meanwhile, the files are those of the manifest's commit.
    assert {asked.path.split("/")[4] for asked in web.asked[1:]} == {commit}
    assert {asked.headers.get("Authorization") for asked in web.asked} == {"Bearer secret"}
    assert [asked.headers.get("Authorization") for asked in elsewhere.asked] == [None]
    assert same(store.folder / "hollow", hollow)


def test_a_commit_that_the_hub_names_where_it_redirects_holds_for_all_files(
    web: Web, store: Store, hollow: Path
) -> None:
    commit = "c0ffee" + "0" * 34
    hub(web, hollow, commit)
    web.headers = {"X-Repo-Commit": commit}
    with web_server(hollow) as store_of_files:
        web.misbehave("redirect", at=MANIFEST, to=f"{store_of_files.address}/{MANIFEST}")
        fetch(source_of("hf:someone/hollow", {"HF_ENDPOINT": web.address}), store)
    assert [asked.path.split("/")[4] for asked in web.asked[:2]] == ["main", commit]
    assert same(store.folder / "hollow", hollow)


@pytest.mark.parametrize(
    ("host", "token", "goes_along"),
    [
        ("huggingface.co", "hf_secret", True),
        ("hf.co", "hf_secret", True),
        ("huggingface.co", "the-mirrors-own", False),
        ("cas-bridge.hf.co", "hf_secret", False),
        ("huggingface.co.example", "hf_secret", False),
    ],
)
def test_a_mirror_that_leaves_a_repository_to_the_hub_has_the_hubs_token_go_along_and_no_other_host_gets_it(
    web: Web,
    hollow: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    token: str,
    goes_along: bool,
) -> None:
    with web_server(hollow) as elsewhere:
        elsewhere.behind = certificate(tmp_path, f"DNS:{host}")
        monkeypatch.setenv("http_proxy", web.address)
        monkeypatch.setenv("https_proxy", elsewhere.address)
        monkeypatch.setenv("SSL_CERT_FILE", str(elsewhere.behind[0]))
        web.misbehave("redirect", to=f"https://{host}/{MANIFEST}")
        environment = {"HF_ENDPOINT": "http://mirror.example", "HF_TOKEN": token}
        source_of("hf:someone/hollow", environment).manifest()
    sent = [asked.headers.get("Authorization") for asked in (*web.asked, *elsewhere.asked)]
    assert sent == [f"Bearer {token}", f"Bearer {token}" if goes_along else None]


def test_a_token_with_its_files_line_break_is_taken_without_it(web: Web, store: Store, hollow: Path) -> None:
    hub(web, hollow)
    fetch(source_of("hf:someone/hollow", {"HF_ENDPOINT": web.address, "HF_TOKEN": " secret\r\n"}), store)
    assert {asked.headers.get("Authorization") for asked in web.asked} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("environment", "sent"),
    [
        ({}, "in ~/.cache/huggingface/token"),
        ({"HF_TOKEN": "set", "HUGGING_FACE_HUB_TOKEN": "older", "HF_TOKEN_PATH": "~/other"}, "set"),
        ({"HF_TOKEN": " ", "HUGGING_FACE_HUB_TOKEN": "older"}, "older"),
        ({"HF_TOKEN_PATH": "~/other", "HF_HOME": "~/home"}, "in ~/other"),
        ({"HF_HOME": "$HOME/home", "XDG_CACHE_HOME": "~/xdg"}, "in ~/home/token"),
        ({"XDG_CACHE_HOME": "~/xdg"}, "in ~/xdg/huggingface/token"),
        ({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, ""),
        ({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_TOKEN": "set"}, "set"),
        ({"HF_TOKEN_PATH": "~/none"}, ""),
    ],
)
def test_the_token_is_looked_for_where_the_hubs_own_library_does(
    web: Web, hollow: Path, tmp_path: Path, environment: dict[str, str], sent: str
) -> None:
    hub(web, hollow)
    for file in (".cache/huggingface/token", "other", "home/token", "xdg/huggingface/token"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"in ~/{file}\n")
    source_of("hf:someone/hollow", {"HF_ENDPOINT": web.address, **environment}).manifest()
    assert web.asked[0].headers.get("Authorization", "") == (f"Bearer {sent}" if sent else "")


def test_a_kept_token_that_does_not_serve_is_told_by_its_file(web: Web, tmp_path: Path) -> None:
    file = tmp_path / "token"
    environment = {"HF_ENDPOINT": web.address, "HF_TOKEN_PATH": str(file)}
    file.mkdir()
    with pytest.raises(InvalidRequest, match=f"^{re.escape(str(file))}, .* cannot be read: "):
        source_of("hf:someone/hollow", environment)
    file.rmdir()
    file.write_bytes("s3crét".encode())
    with pytest.raises(InvalidRequest, match=f"^{re.escape(str(file))} holds") as raised:
        source_of("hf:someone/hollow", environment)
    assert "s3" not in raised.value.message
    file.write_text("expired")
    web.misbehave(
        "status", code=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"}
    )
    with pytest.raises(SourceRefused, match=f"the token in {re.escape(str(file))} is not valid"):
        source_of("hf:someone/hollow", environment).manifest()


@pytest.mark.parametrize("token", ["s3\rcret", "s3\x00cret", "s3cret🐈", "s3crét"])
def test_a_token_that_no_header_can_hold_is_refused_and_told_to_nobody(token: str) -> None:
    with pytest.raises(InvalidRequest, match="HF_TOKEN holds") as raised:
        source_of("hf:someone/hollow", {"HF_TOKEN": token})
    assert "s3" not in raised.value.message


def test_what_http_cannot_carry_is_refused_and_told_to_nobody(web: Web, store: Store) -> None:
    """Python's own words for it quote the whole address, or the whole header."""
    web.misbehave("redirect", at=DENOISER, to="http://[::1/x?sig=s3cret")
    hub = HubSource("hf:someone/hollow", {"HF_ENDPOINT": web.address, "HF_TOKEN": "s3cret"})
    hub._token += "\r"  # which it would have been refused for
    for asked in (WebSource(f"{web.address}/b?sig=s3cret y"), hub, source(web)):
        with pytest.raises(SourceRefused, match=r"127\.0\.0\.1:\d+ cannot be asked") as raised:
            fetch(asked, store)
        assert "s3cret" not in raised.value.message


def test_the_hub_says_how_to_be_let_in_and_what_to_export(web: Web, store: Store, hollow: Path) -> None:
    asked = source_of("hf:someone/model", {"HF_ENDPOINT": web.address + "/"})
    with pytest.raises(SourceRefused, match=r"hf:someone/model@main/manifest\.json is not there"):
        fetch(asked, store)
    web.misbehave("status", code=401)
    with pytest.raises(SourceRefused, match="HF_TOKEN"):
        fetch(asked, store)
    web.misbehave("honest")
    (web.folder / "someone/model/resolve/main").mkdir(parents=True)
    (web.folder / "someone/model/resolve/main/model_index.json").write_text("{}")
    with pytest.raises(
        SourceRefused, match="no bundle: export it first with `edge-export diffusion someone/model"
    ):
        fetch(asked, store)
    (web.folder / "b" / MANIFEST).rename(web.folder / "b" / "model_index.json")
    with pytest.raises(SourceRefused, match="no bundle: export it first"):
        fetch(source(web), store)
    (web.folder / "b").rename(web.folder / "my b")
    with pytest.raises(
        SourceRefused,
        match=r"no bundle: export it first with `edge-export diffusion (['\"]).*[/\\]my b\1 OUT`",
    ):
        fetch(FolderSource(web.folder / "my b"), store)
    with pytest.raises(SourceUnreachable, match="cannot be reached"):
        fetch(source_of("hf:someone/model", {"HF_ENDPOINT": "http://127.0.0.1:1"}), store)
    assert not store.folder.exists()


@pytest.mark.parametrize(
    ("code", "headers", "token", "words"),
    [
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            "expired",
            "the token in HF_TOKEN is not valid or has expired; correct or remove it",
        ),
        (
            403,
            {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model someone/model is restricted"},
            "valid",
            "agree to its terms at {web}/someone/model; a fine-grained token must also be allowed",
        ),
        (
            401,
            {"X-Error-Code": "GatedRepo"},
            "",
            "agree to its terms at {web}/someone/model, and set HF_TOKEN to your token",
        ),
        (
            403,
            {"X-Error-Message": "Access to this resource is disabled."},
            "valid",
            "the hub has disabled it",
        ),
        (404, {"X-Error-Code": "RevisionNotFound"}, "", "it has no branch, tag or commit v1"),
        (
            404,
            {"X-Error-Code": "RepoNotFound"},
            "valid",
            "no such repository, or the token in HF_TOKEN may not read it",
        ),
        (401, {"X-Error-Code": "RepoNotFound"}, "", "no such repository, or it is private: set HF_TOKEN"),
    ],
)
def test_what_the_hub_says_beside_a_status_is_told_in_words_of_ours(
    web: Web, code: int, headers: dict[str, str], token: str, words: str
) -> None:
    web.misbehave("status", code=code, headers=headers)
    with pytest.raises(SourceRefused, match=f"^hf:someone/model@v1: .*{words.format(web=web.address)}.*"):
        source_of("hf:someone/model@v1", {"HF_ENDPOINT": web.address, "HF_TOKEN": token}).manifest()
    assert len(web.asked) == 1  # it has no pipeline either


def test_the_hub_is_the_one_everybody_knows_unless_told_otherwise() -> None:
    source = source_of("hf:stabilityai/sd-turbo", {})
    assert isinstance(source, HubSource)
    assert (
        source._address(DENOISER)
        == "https://huggingface.co/stabilityai/sd-turbo/resolve/main/unet/model.onnx"
    )


def test_a_hub_whose_address_holds_a_password_is_told_where_a_token_belongs() -> None:
    with pytest.raises(
        InvalidRequest, match=r"HF_ENDPOINT must not hold .*: a token belongs in HF_TOKEN"
    ) as raised:
        source_of("hf:a/b", {"HF_ENDPOINT": "https://user:s3cret@hub.example"})
    assert "s3cret" not in raised.value.message


def test_a_name_may_begin_with_an_underscore_and_a_hubs_address_end_with_a_blank() -> None:
    source = source_of("hf:_a/_b", {"HF_ENDPOINT": "https://hub.example/ "})
    assert isinstance(source, HubSource)
    assert source._address(MANIFEST) == "https://hub.example/_a/_b/resolve/main/manifest.json"


@pytest.mark.parametrize(
    "text",
    [
        "hf:model", "hf:a/b/c", "hf:../b", "hf:a/b@", "hf:a/b@x y", "hf:a/b@\udcff",
        "ftp://host/b", "file:///etc", "http://", "http://:1/b",
        "http://host:port/b", "http://user:pass@host/b", "http://ho st/b", "http://host/\x1b[31m", "no/such/folder",
        "x" * 300, "",
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused_before_anything_is_asked(text: str) -> None:
    with pytest.raises(InvalidRequest):
        source_of(text, {})


def test_the_query_of_an_address_goes_along_and_is_told_to_nobody(web: Web, store: Store) -> None:
    web.misbehave("status", at=DENOISER, code=500)
    with pytest.raises(SourceUnreachable) as raised:
        fetch(WebSource(f"{web.address}/b/?sig=s3cret"), store)
    assert "s3cret" not in raised.value.message
    assert all(asked.path.endswith("?sig=s3cret") for asked in web.asked)


def edit_manifest(web: Web, **changes: Any) -> None:
    path = web.folder / "b" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/outside", "a\\..\\..\\outside", "C:outside", "manifest.json"]
)
def test_a_path_that_leads_outside_is_refused_before_anything_is_written(
    web: Web, store: Store, name: str
) -> None:
    files = json.loads((web.folder / "b" / MANIFEST).read_text())["files"]
    edit_manifest(web, files=files | {name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match=r"manifest\.json lists"):
        fetch(source(web), store)
    assert not store.folder.exists()
    assert len(web.asked) == 1


def test_json_that_would_fill_the_memory_is_refused_before_it_is_fetched(web: Web, store: Store) -> None:
    files = json.loads((web.folder / "b" / MANIFEST).read_text())["files"]
    edit_manifest(web, files=files | {TOKENIZER: {"bytes": MAX_JSON_BYTES + 1, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match=r"tokenizer\.json has 67,108,865 bytes; .*at most"):
        fetch(source(web), store)
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        (
            {"schema_version": SCHEMA_VERSION + 1},
            NewerBundle,
            "newer than this edge-agent: update edge-agent",
        ),
        ({"name": "///"}, StoreError, "--name"),
        ({"name": "starter"}, StoreError, "--name"),
        ({"files": {}}, BundleError, "does not list"),
    ],
)
def test_a_manifest_that_promises_no_bundle_is_refused(
    web: Web, store: Store, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    edit_manifest(web, **changes)
    with pytest.raises(kind, match=words):
        fetch(source(web), store)
    assert len(web.asked) == 1


@pytest.mark.posix
def test_a_folder_with_a_link_in_it_is_refused(hollow: Path, store: Store, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hollow, tmp_path / "linked"))
    (folder / DENOISER).unlink()
    (folder / DENOISER).symlink_to(hollow / DENOISER)
    with pytest.raises(BundleError, match="symbolic link"):
        fetch(FolderSource(folder), store)


@pytest.mark.posix
def test_a_file_that_becomes_a_pipe_meanwhile_is_not_waited_for(
    hollow: Path, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(hollow, folder)
    pulling = pull(FolderSource(folder), store)
    next(pulling)
    (folder / DENOISER).unlink()
    os.mkfifo(folder / DENOISER)
    with pytest.raises(SourceRefused, match=r"model\.onnx is gone, or no plain file any more"):
        list(pulling)


def test_a_calibration_that_cannot_be_read_keeps_a_bundle_out(store: Store, tmp_path: Path) -> None:
    from edge_agent.manifest import CALIBRATION, PREDICTOR

    folder = hollow_bundle(tmp_path / "calibrated")
    (folder / PREDICTOR).parent.mkdir()
    (folder / PREDICTOR).write_bytes(b"x")
    (folder / CALIBRATION).write_text("{}")
    write_manifest(folder)
    with pytest.raises(BundleError, match="is not a calibration"):
        fetch(FolderSource(folder), store)
    assert_nothing_shows(store)


def test_a_bundle_that_does_not_fit_is_refused_before_it_is_fetched(web: Web, store: Store) -> None:
    files = json.loads((web.folder / "b" / MANIFEST).read_text())["files"]
    files[DENOISER]["bytes"] = 10**15
    edit_manifest(web, files=files)
    with pytest.raises(StoreError, match=r"1,000,000,000\.\d MB of .* are still to come.*--models"):
        fetch(source(web), store)
    assert len(web.asked) == 1
    assert list((store.folder / ".partial").iterdir()) == []  # not even a lock


def test_what_another_version_leaves_counts_as_room_and_stays_until_there_is_enough(
    web: Web, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.misbehave("stop", at=DECODER)
    with pytest.raises(SourceUnreachable):
        fetch(source(web), store)
    web.misbehave("honest")
    shutil.rmtree(web.folder / "b")
    hollow_bundle(web.folder / "b", seed=2)  # of the same size, and nothing alike
    left = store.unfinished()["hollow"]
    for short, room in ((1, TOTAL - left - 1), (0, TOTAL - left)):
        monkeypatch.setattr(Store, "free_bytes", SPARE_BYTES + room)
        if short:
            with pytest.raises(StoreError, match="make room"):
                fetch(source(web), store)
            assert store.unfinished() == {"hollow": left}
    fetch(source(web), store)
    assert same(store.folder / "hollow", web.folder / "b")


@pytest.mark.posix
def test_a_disk_that_fills_up_is_named_and_what_came_is_kept(web: Web, store: Store, hollow: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # the denoiser does not fit
    try:
        with pytest.raises(StoreError, match=r"make room.*goes on where this one stopped"):
            fetch(source(web), store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_nothing_shows(store)
    assert (store.partial("hollow") / DENOISER).stat().st_size == 1_000_000
    fetch(source(web), store)
    assert web.offsets(DENOISER) == [0, 1_000_000]
    assert same(store.folder / "hollow", hollow)


def fill(file: Path) -> None:
    """Takes all the room that its disk has left."""
    with file.open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    assert shutil.disk_usage(file.parent).free == 0


def alone_with_its_mounts() -> bool:
    """Whether what this thread mounts from now on is seen by nobody else, and gone with it."""
    libc = ctypes.CDLL(None)  # Linux's
    new_mounts, private, recursive = 0x20000, 0x40000, 0x4000
    return libc.unshare(new_mounts) == 0 == libc.mount(b"none", b"/", None, private | recursive, None)


@pytest.mark.linux
def test_a_real_disk_that_fills_up_half_way_is_the_same(web: Web, hollow: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", disk]
    if not alone_with_its_mounts() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk of its own")
    try:
        store = Store(disk / "models", STARTER)
        web.misbehave("stop", at=DENOISER, times=1)
        pulling = pull(source(web), store, waits_s=NO_WAITS)
        while not next(pulling).trouble:  # type: ignore[union-attr]
            pass
        fill(disk / "filler")
        with pytest.raises(StoreError, match=r"No space left on device; make room"):
            list(pulling)
        assert_nothing_shows(store)
        (disk / "filler").unlink()
        before = web.sent()
        fetch(source(web), store)
        assert web.sent() - before < TOTAL
        assert same(store.folder / "hollow", hollow)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_over_tls_only_a_trusted_server_is_pulled_from(
    hollow: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem, key = certificate(tmp_path, "IP:127.0.0.1")
    with web_server(hollow, (pem, key)) as web, web_server(hollow) as plain:
        with pytest.raises(
            SourceRefused, match=r"certificate of 127\.0\.0\.1.*not to be trusted.*SSL_CERT_FILE"
        ):
            fetch(WebSource(web.address), store)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "moved.pem"))
        plain.misbehave("redirect", to=f"{web.address}/{MANIFEST}")
        with pytest.raises(
            SourceRefused, match=r"not to be trusted.*SSL_CERT_FILE names .*moved\.pem, which"
        ):
            fetch(WebSource(plain.address), store)
        plain.asked.clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        web.misbehave("redirect", at=DENOISER, to=f"{plain.address}/{DENOISER}")
        with pytest.raises(SourceRefused, match="less safe"):
            fetch(WebSource(web.address), store)
        assert plain.asked == []
        with pytest.raises(
            SourceRefused, match=r"localhost.*not to be trusted.*the name that the certificate"
        ):
            fetch(WebSource(web.address.replace("127.0.0.1", "localhost")), store)
        web.misbehave("honest")
        fetch(WebSource(web.address), store)
    assert same(store.folder / "hollow", hollow)


@pytest.mark.posix
@pytest.mark.parametrize("folder", ["none", "empty"])
def test_a_python_without_authorities_is_told_from_a_server_without_one(
    hollow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """As one that brings its own OpenSSL, which looks elsewhere than this system keeps them."""
    monkeypatch.setenv("SSL_CERT_FILE", "")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / folder))
    with (
        web_server(hollow, certificate(tmp_path, "IP:127.0.0.1")) as web,
        pytest.raises(SourceRefused, match="this Python finds no certificates of authorities; install"),
    ):
        WebSource(web.address).manifest()


@pytest.mark.parametrize(
    ("code", "says"), [(9, "certificate is not yet valid"), (10, "certificate has expired")]
)
def test_a_certificate_that_is_not_valid_today_may_be_the_clocks_fault(code: int, says: str) -> None:
    """As where a board without a battery has just booted, in 1970."""
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, says
    silence = WebSource("https://models.example")._silence(
        error, urllib.request.Request("https://models.example/a")
    )
    assert silence.message.endswith(
        f"{says}; its owner has to renew it, unless the clock of this machine is wrong"
    )


@pytest.mark.parametrize("content", [None, "", "no certificate", "-----BEGIN CERTIFICATE-----\n!\n"])
def test_authorities_that_cannot_be_read_are_told_where_tls_needs_them(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """OpenSSL would go on without them, and blame the server's certificate."""
    file = tmp_path / "authorities.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    words = f"^SSL_CERT_FILE names {re.escape(str(file))}, which has no certificate"
    for asked in ("https://127.0.0.1:1/b", "hf:someone/hollow"):
        with pytest.raises(InvalidRequest, match=words):
            source_of(asked, {})
    assert source_of(f"{web.address}/b", {}).manifest()
    monkeypatch.setenv("SSL_CERT_FILE", "")
    source_of("https://127.0.0.1:1/b", {})


def pulling_process(web: Web, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edge_agent", "models", "pull", f"{web.address}/b", *arguments]
    return subprocess.Popen(
        command, env=process_environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("interrupted", [False, pytest.param(True, marks=pytest.mark.posix)])
def test_a_pull_that_is_killed_goes_on_and_fetches_nothing_twice(
    web: Web, hollow: Path, tmp_path: Path, interrupted: bool
) -> None:
    models = tmp_path / "data" / "routet2i" / "models"
    partial = models / ".partial" / "hollow"
    web.block_bytes, web.pause_s = 20_000, 0.05  # seconds for all of it: the signal has to meet it
    with pulling_process(web, tmp_path) as first:
        while not (partial / DENOISER).exists() or (partial / DENOISER).stat().st_size < 200_000:
            assert first.poll() is None
            time.sleep(0.005)
        if interrupted:
            first.send_signal(signal.SIGINT)
            assert first.wait() == 130
        else:
            first.kill()
    store = Store(models, STARTER)
    assert_nothing_shows(store)
    web.pause_s = 0.0
    kept = {path: (partial / path).stat().st_size for path in SIZES if (partial / path).exists()}
    whole = [path for path, size in kept.items() if size == SIZES[path]]
    assert 0 < kept[DENOISER] < SIZES[DENOISER]
    web.asked.clear()
    with pulling_process(web, tmp_path, "--json") as second:
        out, err = second.communicate()
        assert (second.returncode, err) == (0, b"")  # and no progress, since nobody watches
    assert json.loads(out)["fetched_bytes"] == TOTAL - sum(kept.values())
    assert web.offsets(DENOISER) == [kept[DENOISER]]
    assert web.sent(DENOISER) == SIZES[DENOISER] - kept[DENOISER]
    assert [path for path in whole if web.offsets(path)] == []
    assert same(models / "hollow", hollow)
    assert list((models / ".partial").iterdir()) == []


def test_a_pull_that_is_killed_at_random_moments_never_shows_half_a_bundle_and_ends_whole(
    web: Web, hollow: Path, tmp_path: Path
) -> None:
    chance = random.Random(4)
    store = Store(tmp_path / "data" / "routet2i" / "models", STARTER)
    web.block_bytes, web.pause_s = 10_000, 0.001
    for _ in range(KILLS):
        web.asked.clear()
        with pulling_process(web, tmp_path) as pulling:
            while not web.asked and pulling.poll() is None:  # the program has started
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.8))
            pulling.kill()
        if "hollow" in store.names():
            assert same(store.folder / "hollow", hollow)
            store.remove("hollow")
    with pulling_process(web, tmp_path) as pulling:
        assert pulling.wait() == 0
    assert same(store.folder / "hollow", hollow)
    assert list((store.folder / ".partial").iterdir()) == []


@pytest.mark.posix
def test_a_pull_shows_its_progress_on_a_terminal(web: Web, tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    web.block_bytes, web.pause_s = 100_000, 0.02
    web.misbehave("stop", at=DENOISER, times=1)
    command = [sys.executable, "-m", "edge_agent", "models", "pull", f"{web.address}/b"]
    with subprocess.Popen(
        command, env=process_environment(tmp_path, COLUMNS="200"), stdout=subprocess.PIPE, stderr=theirs
    ) as pulling:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # how a terminal ends
            while block := os.read(ours, 65_536):
                shown += block
        assert pulling.wait() == 0
    os.close(ours)
    assert f"asking for {web.address}/b".encode() in shown
    assert DENOISER.encode() in shown
    assert b"waiting: " in shown and b"broke off" in shown
    assert b"2.0 MB" in shown


def test_a_server_cannot_write_on_the_terminal(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answers = [b"HTTP/1.1 500 \x1b[31mred\r\n\r\n", b"\x1b[31mred\r\n\r\n", b"x" * 60_000 + b"\r\n\r\n"]

        def answer() -> None:
            for text in answers:
                caller, _ = listener.accept()
                with caller:
                    caller.recv(65_536)
                    caller.sendall(text)

        threading.Thread(target=answer, daemon=True).start()
        for _ in answers:
            with pytest.raises(SourceUnreachable) as raised:
                fetch(WebSource(f"http://127.0.0.1:{listener.getsockname()[1]}/b"), store)
            assert raised.value.message.isprintable() and len(raised.value.message) < 500


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("302 \x1b[31mred\r\nLocation: /b/manifest.json?sig=s3cret", "302 Found"),
        (
            "302 \x1b[31mred\r\nLocation: file:///s3cret\x1b[2J?sig=s3cret",
            "302 Found, which leads to no web address",
        ),
        (
            "302 \x1b[31mred\r\nLocation: ftp://s3cret@ho\x1bst/x?sig=s3cret",
            r"redirects to ftp://ho%1Bst, which",
        ),
        ("300 \x1b[31mred", "300 Multiple Choices"),
        ("399 \x1b[31mred", r"\(399, which leads to no web address\)"),
    ],
)
def test_a_redirect_that_is_not_followed_is_told_in_words_of_ours(
    store: Store, head: str, words: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    caller, _ = listener.accept()
                    with caller:
                        caller.recv(65_536)
                        caller.sendall(f"HTTP/1.1 {head}\r\nContent-Length: 0\r\n\r\n".encode())

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(SourceRefused, match=words) as raised:
            fetch(WebSource(f"http://127.0.0.1:{listener.getsockname()[1]}/b"), store)
    assert raised.value.message.isprintable()
    assert "s3cret" not in raised.value.message


def test_two_pulls_of_one_bundle_do_not_meet(web: Web, store: Store, hollow: Path) -> None:
    first = pull(source(web), store)
    next(first)
    next(first)
    with pytest.raises(Busy, match="another pull of hollow is under way"):
        next(pull(source(web), store))
    assert isinstance(list(first)[-1], Pulled)
    assert fetch(source(web), store).was_installed
    assert same(store.folder / "hollow", hollow)


def test_two_processes_that_pull_at_once_leave_one_whole_bundle(
    web: Web, hollow: Path, tmp_path: Path
) -> None:
    web.block_bytes, web.pause_s = 100_000, 0.01
    both = [pulling_process(web, tmp_path) for _ in range(2)]
    ends = [(process.communicate()[1].decode(), process.returncode) for process in both]
    assert {code for _, code in ends} <= {0, 3} and 0 in {code for _, code in ends}
    assert all("another pull of hollow" in err for err, code in ends if code == 3)
    assert same(tmp_path / "data" / "routet2i" / "models" / "hollow", hollow)


def test_a_pull_that_is_closed_lets_go_of_its_lock_and_keeps_what_came(web: Web, store: Store) -> None:
    pulling = pull(source(web), store)
    for event in pulling:
        if isinstance(event, Fetched) and event.file == DENOISER and event.done_bytes > 400_000:
            break
    pulling.close()  # type: ignore[attr-defined]
    assert store.unfinished()["hollow"] > 400_000
    assert (store.partial("hollow") / MANIFEST).exists()
    assert fetch(source(web), store).fetched_bytes < TOTAL


def test_an_empty_file_is_made_without_asking(web: Web, store: Store) -> None:
    fetch(source(web), store)
    assert (store.folder / "hollow" / EMPTY).read_bytes() == b""
    assert web.offsets(EMPTY) == []
