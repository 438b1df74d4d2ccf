"""The commands, as programs with exit codes: what they print, and what they say when something is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import PIL.Image
import pytest
from grpc import _channel as grpc_channel

from edge_agent import client, image_file
from edge_agent.__main__ import _drop_output
from edge_agent.client import _exhausted
from edge_agent.errors import (
    Busy,
    Draining,
    DuplicateRequest,
    GenerationFailed,
    InvalidRequest,
    NotKept,
    NotReady,
    OutOfMemory,
    QuotaExhausted,
    RouteT2IError,
    UnknownApp,
    grpc_code,
    status_details,
)
from edge_agent.manifest import DECODER
from edge_agent.settings import SOCKET_PATH_BYTES, STARTER
from edge_agent.superiority import METRICS
from routet2i.edge.v1 import edge_pb2, edge_pb2_grpc
from routet2i.image.v1 import image_pb2
from tests.running import CLOUD_PROMPT, EDGE_PROMPT, Process, Run, commands, process_environment, short_folder

DECISION = (
    "prompt", "route", "reason", "prs", "alpha", "edge_quality", "cloud_quality", "tokens", "quota", "timings_ms",
    "unfamiliar"
)  # fmt: skip
IMAGE = (
    "request_id", "route", "served_by", "reason", "fallback", "prs", "alpha", "seed", "width", "height", "file",
    "sha256", "cost_micro_usd", "timings_ms"
)  # fmt: skip
BUDGET = (
    "name", "window", "cap_micro_usd", "spent_micro_usd", "reserved_micro_usd", "remaining_micro_usd"
)  # fmt: skip
STAGES = ("tokenize", "encode", "predict", "total")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = short_folder()
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def daemon(folder: Path, routed_bundle: Path) -> Iterator[Process]:
    """A daemon at the default socket, without a cloud."""
    flags = (
        "--bundle",
        routed_bundle,
        "--threads",
        "1",
        "--budget",
        "1,0.2/hour",
        "--rate",
        "10/60,1000/2592000",
        "--max-queue",
        "7",
    )
    process = Process("edge_agent", folder, *flags)
    process.wait_for("serving")
    yield process
    process.kill()


@pytest.fixture
def run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    monkeypatch.chdir(tmp_path)
    return commands(folder, monkeypatch, capfd)


def test_generate_writes_the_image_and_says_so(run: Run, daemon: Process, tmp_path: Path) -> None:
    known = len(daemon.calls)
    finished = run("generate", EDGE_PROMPT, "-o", "cat.png", "--seed", 7)
    assert (finished.code, finished.err) == (0, "")
    assert "cat.png: 64x64, seed 7, by the edge (pareto_edge)" in finished.out
    with PIL.Image.open(tmp_path / "cat.png") as image:
        assert image.text["prompt"] == EDGE_PROMPT
    assert list(tmp_path.iterdir()) == [tmp_path / "cat.png"]
    assert daemon.wait_for_calls(known + 1)[-1]["outcome"] == "OK"  # the command has not left before the end


def test_an_image_that_cannot_be_put_in_place_leaves_nothing_behind(
    run: Run, daemon: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    finished = run("generate", EDGE_PROMPT, "-o", "cat.png")
    assert finished.code == 2 and "No space left" in finished.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_be_called_as_standard_output_is(run: Run, daemon: Process, tmp_path: Path) -> None:
    finished = run("generate", EDGE_PROMPT, "-o", "./-")
    assert finished.code == 0 and finished.out.startswith("-: 64x64")
    with PIL.Image.open(tmp_path / "-") as image:
        assert image.size == (64, 64)


def test_a_name_as_long_as_the_file_system_takes_is_no_longer_while_it_is_written(
    run: Run, daemon: Process, tmp_path: Path
) -> None:
    name = "x" * 251 + ".png"
    assert run("generate", EDGE_PROMPT, "-o", name).code == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.posix
def test_a_pipe_is_not_replaced_by_the_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequest, match=r"no regular file.*-o -"):
        image_file.checked(str(tmp_path / "pipe"))


@pytest.mark.linux
def test_a_pipe_behind_links_is_not_taken_for_a_file_that_is_still_to_be_made(tmp_path: Path) -> None:
    """As behind /dev/stdout, whose last link names no file."""
    reading, writing = os.pipe()
    (tmp_path / "stdout").symlink_to(f"/dev/fd/{writing}")
    with pytest.raises(InvalidRequest, match=r"stdout is no regular file.*-o -"):
        image_file.checked(str(tmp_path / "stdout"))
    os.close(reading)
    os.close(writing)


@pytest.mark.posix
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "out.png"])
def test_the_file_that_standard_output_goes_to_is_not_replaced_by_the_image(
    folder: Path, tmp_path: Path, name: str
) -> None:
    before = Path("/dev/stdout").readlink()
    with (tmp_path / "out.png").open("wb") as file:
        finished = subprocess.run(
            [sys.executable, "-m", "edge_agent", "generate", EDGE_PROMPT, "-o", name],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=process_environment(folder),
            check=False,
        )
    assert finished.returncode == 2 and "is standard output; write to it with -o -" in finished.stderr
    assert Path("/dev/stdout").readlink() == before


def test_a_folder_that_is_not_there_is_not_taken_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="is a folder"):
        image_file.checked(f"{tmp_path / 'new'}/")


@pytest.mark.posix
def test_a_link_that_leads_to_itself_is_refused_before_the_image_is_made(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(InvalidRequest, match="cannot be written: Too many levels of symbolic links"):
        image_file.checked(str(tmp_path / "loop.png"))


@pytest.mark.posix
def test_a_file_is_written_where_a_link_leads_and_stays_as_private_as_it_was(
    run: Run, daemon: Process, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    private = tmp_path / "kept" / "cat.png"
    private.touch(0o600)
    (tmp_path / "link.png").symlink_to(private)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "kept" / "new.png")
    for name in (("-o", "link.png"), ("--request-id", "dangling")):
        assert run("generate", EDGE_PROMPT, *name, "--seed", 1).code == 0
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "dangling.png").is_symlink()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert private.read_bytes() == (tmp_path / "kept" / "new.png").read_bytes() != b""


@pytest.mark.usefixtures("ordinary_user")
def test_a_folder_that_one_may_not_enter_is_refused_before_the_image_is_made() -> None:
    # Not tmp_path: its parents belong to the user who started the tests.
    with tempfile.TemporaryDirectory() as folder:
        closed = Path(folder) / "closed"
        closed.mkdir(0o600)
        with pytest.raises(InvalidRequest, match="cannot be written: Permission denied"):
            image_file.checked(str(closed / "cat.png"))


@pytest.mark.posix
def test_others_may_read_a_new_image_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    """And the umask stays as it was."""
    image: Any = SimpleNamespace(png=b"image", request_id="cat")
    before = os.umask(0)
    try:
        for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
            os.umask(umask)
            file = tmp_path / f"{umask}.png"
            assert image_file.write(image, file) == str(file)
            assert stat.S_IMODE(file.stat().st_mode) == mode and file.read_bytes() == b"image"
            assert os.umask(umask) == umask
    finally:
        os.umask(before)


@pytest.mark.usefixtures("daemon")
def test_an_image_is_not_paid_for_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is where a file system states no size, as some do."""
    for total, free in ((1 << 20, 0), (0, 0), (1 << 20, 4096)):
        usage = SimpleNamespace(total=total, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if total and not free:
            with pytest.raises(InvalidRequest, match="is full; make room"):
                image_file.checked(str(tmp_path / "cat.png"))
        else:
            assert image_file.checked(str(tmp_path / "cat.png")) == tmp_path / "cat.png"


def test_no_thread_has_to_begin_for_a_call_to_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C between a call and the thread that gRPC reads it with would leave a channel that never closes."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grpc_channel, "_run_channel_spin_thread", interrupted)
    assert run("generate", EDGE_PROMPT, "-o", "cat.png").code == 0


def test_a_file_that_is_named_after_the_request_is_looked_at_before_the_image_is_made(
    run: Run, daemon: Process, tmp_path: Path
) -> None:
    (tmp_path / "taken.png").mkdir()
    for request_id, words in (("taken", "taken.png is a folder"), ("kept/cat", "letters, digits")):
        finished = run("generate", EDGE_PROMPT, "--request-id", request_id)
        assert finished.code == 2 and words in finished.err
    assert run("generate", EDGE_PROMPT, "--request-id", "free").code == 0
    daemon.wait_for_calls(1, request_id="free")
    assert not {"taken", "kept/cat"} & {call["request_id"] for call in daemon.calls}


@pytest.mark.skipif(os.name == "posix", reason="Windows only")
@pytest.mark.parametrize("name", ["order:17.png", "x" * 300])
def test_a_name_that_no_file_has_on_windows_is_refused_before_the_image_is_made(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is no name of a file on Windows"):
        image_file.checked(name)


def test_generate_prints_exactly_these_fields(run: Run, daemon: Process, tmp_path: Path) -> None:
    finished = run("generate", CLOUD_PROMPT, "--json", "--steps", 8, "--negative-prompt", "a dog")
    (facts,) = finished.objects
    assert tuple(facts) == IMAGE
    assert (facts["route"], facts["served_by"], facts["fallback"]) == ("edge", "edge", None)
    assert (facts["reason"], facts["width"], facts["cost_micro_usd"]) == ("cloud_unavailable", 64, 0)
    assert facts["file"] == f"{facts['request_id']}.png"
    assert hashlib.sha256((tmp_path / facts["file"]).read_bytes()).hexdigest() == facts["sha256"]
    assert set(STAGES) < set(facts["timings_ms"])


def test_generate_writes_to_a_pipe(daemon: Process, folder: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "edge_agent", "generate", EDGE_PROMPT, "-o", "-"],
        capture_output=True,
        timeout=60,
        env=process_environment(folder),
    )
    assert (finished.returncode, finished.stderr) == (0, b"")  # and no progress, since nobody watches
    assert finished.stdout.startswith(b"\x89PNG")


def test_route_prints_exactly_these_fields_for_each_prompt(run: Run, daemon: Process) -> None:
    finished = run("route", EDGE_PROMPT, CLOUD_PROMPT, "--json")
    assert finished.err == ""
    edge, cloud = finished.objects
    for facts, prompt in ((edge, EDGE_PROMPT), (cloud, CLOUD_PROMPT)):
        assert tuple(facts) == DECISION
        assert (facts["prompt"], facts["route"]) == (prompt, "edge")
        for metrics in (facts["edge_quality"], facts["cloud_quality"], facts["tokens"][0]["pull"]):
            assert tuple(metrics) == METRICS
        assert set(facts["timings_ms"]) >= set(STAGES)
        assert tuple(facts["quota"]) == ("day", "hour")
    assert (edge["reason"], cloud["reason"]) == ("pareto_edge", "cloud_unavailable")
    assert edge["prs"] >= edge["alpha"] > cloud["prs"]


@pytest.mark.parametrize("here", [False, True])
def test_route_explains_by_deleting_each_token(
    run: Run, daemon: Process, routed_bundle: Path, here: bool
) -> None:
    where = ("--bundle", routed_bundle) if here else ()
    finished = run("route", CLOUD_PROMPT, "--explain", *where)
    assert finished.code == 0
    first, second, header, *rows = finished.out.splitlines()
    assert first == CLOUD_PROMPT
    assert "PRS" in second and "alpha" in second
    assert header.split() == ["without", "PRS", "moved"]
    moved = [abs(float(row.split()[-1])) for row in rows]
    assert moved == sorted(moved, reverse=True)
    (facts,) = run("route", CLOUD_PROMPT, "--explain", "--json", *where).objects
    assert sorted(row.split()[0] for row in rows) == sorted(token["text"] for token in facts["tokens"])
    assert max(abs(token["prs_without"] - facts["prs"]) for token in facts["tokens"]) == pytest.approx(
        moved[0], abs=1e-3
    )


@pytest.mark.parametrize("here", [False, True])
def test_route_names_what_the_predictor_has_not_learnt_of(
    run: Run, daemon: Process, routed_bundle: Path, here: bool
) -> None:
    where = ("--bundle", routed_bundle) if here else ()
    known, foreign = run("route", CLOUD_PROMPT, "two dogs 🐈", "--json", *where).objects
    assert known["unfamiliar"] == []
    assert foreign["unfamiliar"] and set(foreign["unfamiliar"]) == {"🐈"}
    assert "has not learnt of: 🐈" in run("route", "two dogs 🐈", "--explain", *where).out


def test_route_tells_equal_tokens_apart(run: Run, routed_bundle: Path) -> None:
    rows = run("route", "a cat, a dog", "--explain", "--bundle", routed_bundle).out.splitlines()[3:]
    names = {row.split("  ")[1] for row in rows}
    assert {"a (1 of 2)", "a (2 of 2)", "cat", "dog"} <= names


def test_route_says_that_an_older_daemon_explains_nothing(run: Run) -> None:
    answer = edge_pb2.RouteResponse(decision=decided().decision)
    answer.decision.prs, answer.decision.alpha = 0.6, 0.5
    answer.decision.tokens.add(text="cat")
    with answering(Route=answer) as address:
        assert (
            "the daemon is older than this command"
            in run("route", "cat", "--explain", "--agent", address).out
        )


def test_route_has_nothing_to_explain_where_the_model_reads_nothing(run: Run) -> None:
    finished = run("route", "\ue000", "--explain", "--bundle", STARTER)
    assert finished.code == 0
    assert "PRS" in finished.out and "reads nothing in it" in finished.out


def test_route_has_nothing_to_explain_without_a_predictor(run: Run, miniature_bundle: Path) -> None:
    finished = run("route", "a cat", "--explain", "--bundle", miniature_bundle)
    assert finished.code == 0
    assert "nothing to explain" in finished.out


def test_what_was_decided_before_a_prompt_is_refused_is_shown(run: Run, daemon: Process) -> None:
    finished = run("route", EDGE_PROMPT, "half \ud83d")
    assert finished.code == 2
    assert EDGE_PROMPT in finished.out
    assert "not valid UTF-8" in finished.err


def test_route_reads_prompts_from_a_pipe(
    run: Run, daemon: Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text(f"{EDGE_PROMPT}\n\n猫 🐈\r\n", encoding="utf-8-sig")
    with (tmp_path / "prompts.txt").open(encoding="utf-8") as prompts:
        monkeypatch.setattr("sys.stdin", prompts)
        finished = run("route", "first", "-", "--json")
    assert [facts["prompt"] for facts in finished.objects] == ["first", EDGE_PROMPT, "猫 🐈"]


@pytest.mark.parametrize("bundle", [False, True])
def test_a_line_that_is_no_prompt_is_told_by_its_number(
    run: Run,
    daemon: Process,
    routed_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bundle: bool,
) -> None:
    (tmp_path / "prompts.txt").write_text(f"{EDGE_PROMPT}\n\n\u200b\na cat\n", encoding="utf-8")
    own = ["--bundle", routed_bundle] if bundle else []
    with (tmp_path / "prompts.txt").open(encoding="utf-8") as prompts:
        monkeypatch.setattr("sys.stdin", prompts)
        finished = run("route", "-", *own)
    assert finished.code == 2
    assert EDGE_PROMPT in finished.out
    assert "line 3 of standard input: the prompt is empty" in finished.err
    refused = run("route", EDGE_PROMPT, "\u200b", *own)  # no line of any file
    assert refused.code == 2 and "line" not in refused.err


def test_a_table_folds_no_name_in_a_pipe_and_ends_well_where_the_pipe_is_closed(
    folder: Path, routed_bundle: Path
) -> None:
    long = " ".join(["a red apple"] * 20)
    command = [sys.executable, "-m", "edge_agent", "route", long, "--bundle", str(routed_bundle)]
    environment = process_environment(folder)
    environment.pop("COLUMNS", None)  # somebody may have said how wide it is
    for columns in ({}, {"COLUMNS": "0"}, {"COLUMNS": "20"}):
        finished = subprocess.run(
            command, capture_output=True, text=True, env=environment | columns, check=True
        )
        assert long in finished.stdout
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        finished = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    assert finished.returncode == 0 and "Traceback" not in finished.stderr


@pytest.mark.parametrize("arguments", [("--routing-rate", "1"), ()])
def test_route_works_without_a_daemon(run: Run, routed_bundle: Path, arguments: tuple[str, ...]) -> None:
    finished = run("route", EDGE_PROMPT, CLOUD_PROMPT, "--bundle", routed_bundle, "--json", *arguments)
    edge, cloud = finished.objects
    assert tuple(edge) == tuple(cloud) == DECISION
    assert cloud["reason"] == "pareto_cloud"
    assert edge["reason"] == ("pareto_cloud" if arguments else "pareto_edge")
    assert edge["quota"] == {}
    assert "without a daemon" in finished.err


def test_route_without_a_daemon_takes_the_bundle_of_the_environment(
    run: Run, routed_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # where no daemon is
    monkeypatch.delenv("EDGE_AGENT_ADDRESS", raising=False)
    monkeypatch.setenv("EDGE_AGENT_BUNDLE", str(routed_bundle))
    finished = run("route", "[bold]a cat[/bold]")
    assert finished.code == 0
    assert "[bold]a cat[/bold]" in finished.out  # brackets are the prompt's, not markup
    monkeypatch.setenv("EDGE_AGENT_BUNDLE", str(tmp_path))
    assert run("route", EDGE_PROMPT).code == 2


def test_an_empty_address_in_the_environment_names_no_daemon(
    run: Run, routed_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # where no daemon is
    monkeypatch.setenv("EDGE_AGENT_BUNDLE", str(routed_bundle))
    monkeypatch.setenv("EDGE_AGENT_ADDRESS", "")
    assert run("route", EDGE_PROMPT).code == 0


@pytest.mark.posix
def test_a_daemon_that_does_not_answer_is_said_to_be_so(
    run: Run, daemon: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.client.ANSWER_S", 0.5)
    daemon.popen.send_signal(signal.SIGSTOP)
    try:
        for command in (("status",), ("quota",), ("models", "show", "edge")):
            finished = run(*command)
            assert (finished.code, finished.out) == (3, "")
            assert "does not answer" in finished.err
        used = run("models", "use", "starter")
        assert used.code == 0
        assert "serves it when it is started again" in used.out and "does not answer" in used.out
    finally:
        daemon.popen.send_signal(signal.SIGCONT)


@pytest.mark.linux
def test_a_daemon_that_takes_no_more_connections_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is stopped, once enough callers have tried."""
    monkeypatch.setattr(client, "CONNECT_S", 0.1)
    path = str(tmp_path / "agent.sock")
    with socket.socket(socket.AF_UNIX) as stopped, socket.socket(socket.AF_UNIX) as earlier:
        stopped.bind(path)
        stopped.listen(0)
        earlier.connect(path)
        assert not client.AgentClient(f"unix:{path}").reachable()


def test_a_server_of_another_kind_is_said_to_be_no_edge_agent(run: Run, tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        for command in (("status",), ("quota",), ("route", EDGE_PROMPT), ("generate", EDGE_PROMPT)):
            finished = run(*command, "--agent", address)
            assert (finished.code, finished.out) == (2, "")
            assert f"what answers at {address} is no edge-agent" in finished.err
    finally:
        server.stop(None)
    assert list(tmp_path.iterdir()) == []


def test_route_heeds_a_settings_file_also_where_a_daemon_answers(
    run: Run, daemon: Process, routed_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "settings.toml").write_text(f"bundle = '{routed_bundle}'\nrouting_rate = 1.0\n")
    finished = run("route", EDGE_PROMPT, "--config", "settings.toml", "--json")
    assert finished.objects[0]["reason"] == "pareto_cloud"
    assert "without a daemon" in finished.err


def test_quota_prints_exactly_these_fields_for_each_budget(run: Run, daemon: Process) -> None:
    day, hour = run("quota", "--json").objects
    assert tuple(day) == tuple(hour) == BUDGET
    assert (day["name"], day["window"], day["cap_micro_usd"]) == ("day", "day", 1_000_000)
    table = run("quota").out
    assert "$1.00" in table and "$0.20" in table
    assert re.search(r"\b0 +10 +60\b", table)  # the rate: none of ten calls in 60 s
    assert re.search(r"\b0 +1000 +2592000\b", table)


def test_status_and_models_tell_what_runs(run: Run, daemon: Process, routed_bundle: Path) -> None:
    (status,) = run("status", "--json").objects
    assert (status["calibrated"], status["cloud_health"], status["max_queue"]) == (True, "not_configured", 7)
    assert status["bundle"] == str(routed_bundle)
    shown = run("status").out
    assert "--cloud" in status["advice"][0] and "--cloud" in shown
    assert {"name": "cpu", "state": "in_use", "reason": ""} in status["providers"]
    assert status["loaded"] is True
    assert re.search(r"^loaded since +20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", shown, re.MULTILINE)
    assert re.search(r"^providers +cpu: in use$", shown, re.MULTILINE)
    (edge,) = run("models", "show", "edge", "--json").objects
    (cloud,) = run("models", "show", "cloud", "--json").objects
    assert (edge["side"], edge["name"], edge["digest"]) == ("edge", "miniature", status["edge_model_digest"])
    assert (cloud["side"], cloud["digest"]) == ("cloud", status["cloud_model_digest"])
    assert (edge["price_micro_usd"], cloud["price_micro_usd"]) == (0, None)
    assert "Apache-2.0" in run("models", "show", "edge").out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("generate", ""), 2, "empty"),
        (("generate", "\u200d\u00ad\u200b"), 2, "nothing of it can be seen"),
        (("generate", "x" * 10_000), 2, "10,000"),
        (("generate", "x" * 300_000), 2, "larger"),
        (("generate", "a\x1b[31m"), 2, "U+001B"),
        (("generate", "half \udcff"), 2, "not valid UTF-8"),
        (("route", "half \ud83d"), 2, "not valid UTF-8"),
        (("quota", "--app", "half \udcff"), 2, "not valid UTF-8"),
        (("generate", "a", "--seed", "-1"), 2, "--seed"),
        (("generate", "a", "--seed", "4294967296"), 2, "4294967295"),
        (("generate", "a", "--seed", "\u00b2"), 2, "must be a whole number"),
        (("generate", "a", "--seed", "9" * 5_000), 2, "must be a whole number"),
        (("generate", "a", "--steps", "5"), 2, "4, 8"),
        (("generate", "a", "--width", "65"), 2, "64x64"),
        (("generate", "a", "--guidance-scale", "nan"), 2, "guidance_scale"),
        (("generate", "a", "--max-price", "cheap"), 2, "US dollars"),
        (("generate", "a", "--local-only", "--cloud-only"), 2, "not allowed with"),
        (("generate", "a", "--cloud-only"), 4, "--cloud"),
        (("generate", "a", "-o", "none/cat.png"), 2, "nothing can be written"),
        (("generate", "a", "-o", "."), 2, "is a folder"),
        (("generate", "a", "-o", "-", "--json"), 2, "both write to standard output"),
        (("generate", "a", "--timeout", "0"), 2, "--timeout"),
        (("generate", "a", "--timeout", "inf"), 2, "at most a year"),
        (("generate", "a", "--timeout", "nan"), 2, "at most a year"),
        (("generate", "a", "--agent", "nowhere"), 2, "HOST:PORT"),
        (("generate", "a", "--agent", "127.0.0.1:1"), 3, "edge-agent serve"),
        (("quota", "--agent", "127.0.0.1:1"), 3, "edge-agent serve"),
        (("generate", "a", "--timeout", "0.000001"), 3, "--timeout"),
        (("nonsense",), 2, "invalid choice"),
        ((), 2, "COMMAND"),
        *(
            pytest.param(*case, marks=pytest.mark.posix)
            for case in (
                (("generate", "a", "-o", "x" * 300), 2, "name too long; choose another with -o"),
                (("route", "a", "--config", "~nosuchuser/x"), 2, "no home folder"),
                (("models", "pull", "~nosuchuser/x"), 2, "no home folder"),
                (("quota", "--agent", "unix:~nosuchuser/x"), 2, "no home folder"),
                (("quota", "--agent", "unix:/" + "x" * 200), 2, f"at most {SOCKET_PATH_BYTES} bytes"),
                (("route", "a", "--agent", "unix:/none/agent.sock"), 3, "edge-agent serve"),
            )
        ),
    ],
)
def test_what_is_wrong_is_said_with_the_right_exit_code(
    run: Run, daemon: Process, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    finished = run(*arguments)
    assert (finished.code, finished.out) == (code, "")
    assert words in finished.err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_no_refusal_by_quota_or_policy(run: Run, bundle_copy: Path) -> None:
    home = short_folder()
    flags = ("--bundle", bundle_copy, "--listen", "127.0.0.1:0", "--threads", "1", "--keep-alive-s", "0.1")
    daemon = Process("edge_agent", home, *flags)
    try:
        daemon.wait_for("unloaded")
        content = (bundle_copy / DECODER).read_bytes()
        (bundle_copy / DECODER).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        finished = run("generate", "a", "--agent", daemon.wait_for("listening")["address"])
        assert (finished.code, finished.out) == (2, "")
        assert f"{Path(DECODER)} has changed" in finished.err
    finally:
        daemon.kill()
        shutil.rmtree(home)


ENDS_IN_A_CALL = """
import os
from concurrent.futures import ThreadPoolExecutor
import grpc
from routet2i.edge.v1 import edge_pb2_grpc

class Ends(edge_pb2_grpc.EdgeAgentServiceServicer):
    def Generate(self, request, context):
        os._exit(9)

server = grpc.server(ThreadPoolExecutor(1))
edge_pb2_grpc.add_EdgeAgentServiceServicer_to_server(Ends(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
server.wait_for_termination()
"""


def test_a_daemon_that_ends_in_a_call_is_said_to_have_gone(run: Run, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDS_IN_A_CALL],
        env=process_environment(tmp_path),
        stdout=subprocess.PIPE,
    ) as daemon:
        assert daemon.stdout is not None
        address = f"127.0.0.1:{int(daemon.stdout.readline())}"
        finished = run("generate", "a", "--agent", address)
        assert daemon.wait() == 9
    assert (finished.code, finished.out) == (3, "")
    assert f"the daemon at {address} went away before it was done: see its log" in finished.err


@pytest.mark.parametrize("command", ["generate", "route"])
def test_a_daemon_that_was_suspended_is_said_not_to_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The system takes the connection in its place, and nothing comes back."""
    monkeypatch.setattr(client, "_OPTIONS", [*client._OPTIONS, ("grpc.min_reconnect_backoff_ms", 200)])
    with socket.create_server(("127.0.0.1", 0)) as suspended:
        finished = run(command, "a", "--agent", f"127.0.0.1:{suspended.getsockname()[1]}")
    assert (finished.code, finished.out) == (3, "")
    assert "does not answer; see whether it is stopped or stuck, and restart it" in finished.err


@contextmanager
def answering(
    *events: edge_pb2.GenerateResponse,
    asked: list[Any] | None = None,
    refusal: RouteT2IError | None = None,
    **answers: Any,
) -> Iterator[str]:
    """The address of a daemon that gives these answers: the stream of Generate, and one for each other call. What it is
    asked it adds to `asked`; with a `refusal` that is all that Generate comes to.
    """
    asked = [] if asked is None else asked

    class Daemon(edge_pb2_grpc.EdgeAgentServiceServicer):
        def Generate(self, request: edge_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
            asked.append(request)
            if refusal is not None:
                status = status_details(refusal)
                context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
                context.abort(grpc_code(refusal), status.message)
            yield from events

    for name, answer in answers.items():
        setattr(Daemon, name, lambda _self, request, _context, answer=answer: asked.append(request) or answer)
    server = grpc.server(ThreadPoolExecutor(1))
    edge_pb2_grpc.add_EdgeAgentServiceServicer_to_server(Daemon(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def made(
    request_id: str, served_by: int = edge_pb2.ROUTE_EDGE, png: bytes = b"", **facts: Any
) -> edge_pb2.GenerateResponse:
    """The end of a stream, by default of one without a byte of an image."""
    image = image_pb2.ImageInfo(sha256=hashlib.sha256(png).hexdigest(), width=64, height=32, seed=7)
    return edge_pb2.GenerateResponse(
        result=edge_pb2.Result(request_id=request_id, image=image, served_by=served_by, **facts)
    )


def decided(
    route: int = edge_pb2.ROUTE_EDGE, reason: int = edge_pb2.DECISION_REASON_LOCAL_ONLY
) -> edge_pb2.GenerateResponse:
    """The beginning of a stream."""
    return edge_pb2.GenerateResponse(decision=edge_pb2.Decision(route=route, reason=reason))


def part(data: bytes) -> edge_pb2.GenerateResponse:
    """A part of the image."""
    return edge_pb2.GenerateResponse(image_chunk=image_pb2.ImageChunk(data=data))


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([decided(), part(b"other"), made("r-1", png=b"an image")], "damaged on its way"),
        ([decided(), part(b"an image")], "ended its answer before the image was complete"),
        ([part(b"an image"), made("r-1", png=b"an image")], "an image without its decision"),
    ],
)
def test_of_an_answer_that_is_not_whole_nothing_is_written(
    run: Run, tmp_path: Path, events: list[edge_pb2.GenerateResponse], words: str
) -> None:
    with answering(*events) as address:
        finished = run("generate", "a", "-o", "a.png", "--agent", address)
    assert (finished.code, finished.out) == (1, "")
    assert words in finished.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_with_the_flags_of_generate_is_what_the_daemon_is_asked(run: Run) -> None:
    """Also nothing, which is not the same as what the model's defaults are."""
    numbers = ("--seed", "--steps", "--guidance-scale", "--width", "--height", "--max-price")
    words = ("--negative-prompt", "a dog", "--app", "kiosk", "--request-id", "r-1")
    asked: list[edge_pb2.GenerateRequest] = []
    with answering(decided(), made("r-1"), asked=asked) as address:
        zeros = [text for name in numbers for text in (name, "0")]
        assert run("generate", "a", "--agent", address, "-o", "a.png", *zeros, *words).code == 0
        assert run("generate", "a", "--agent", address, "-o", "a.png", "--local-only").code == 0
    everything, nothing = asked
    image = everything.image
    assert (image.prompt, image.negative_prompt, image.app, image.request_id) == (
        "a",
        "a dog",
        "kiosk",
        "r-1",
    )
    names = ("seed", "steps", "guidance_scale", "width", "height", "max_price_micro_usd")
    assert [name for name in names if not image.HasField(name)] == []
    assert everything.routing == edge_pb2.ROUTING_AUTO
    drawn = nothing.image.request_id
    assert nothing.image == image_pb2.ImageRequest(prompt="a", app="default", request_id=drawn)
    assert re.fullmatch("[0-9a-f]{32}", drawn)
    assert nothing.routing == edge_pb2.ROUTING_LOCAL_ONLY


def test_generate_tells_who_made_the_image_for_how_much_and_why_not_the_cloud(run: Run) -> None:
    cloud = decided(edge_pb2.ROUTE_CLOUD, edge_pb2.DECISION_REASON_PARETO_CLOUD)
    total = [image_pb2.Timing(stage="total", milliseconds=1234.0)]
    paid = made("r-1", edge_pb2.ROUTE_CLOUD, cost_micro_usd=4_000, timings=total)
    with answering(cloud, paid) as address:
        finished = run("generate", "a", "--agent", address, "-o", "a.png")
    assert finished.out == "a.png: 64x32, seed 7, by the cloud (pareto_cloud) for $0.004, 1.23 s\n"
    assert finished.err == ""
    instead = made("r-1", fallback_error="the cloud broke off", timings=total)
    with answering(cloud, instead) as address:
        finished = run("generate", "a", "--agent", address, "-o", "a.png")
        (facts,) = run("generate", "a", "--agent", address, "-o", "a.png", "--json").objects
    assert finished.out == "a.png: 64x32, seed 7, by the edge (pareto_cloud), 1.23 s\n"
    assert "made on this device, because the cloud broke off" in finished.err
    assert (facts["fallback"], facts["prs"], facts["alpha"]) == ("the cloud broke off", None, None)


@pytest.mark.parametrize(
    ("events", "named"),
    [
        ([decided(edge_pb2.ROUTE_CLOUD)], True),
        ([decided(edge_pb2.ROUTE_CLOUD), part(b"a"), made("r-1", edge_pb2.ROUTE_CLOUD, b"other")], True),
        (
            [decided(edge_pb2.ROUTE_CLOUD), part(b"a"), made("r-1", edge_pb2.ROUTE_CLOUD, b"a")],
            True,
        ),  # but no room
        ([decided(edge_pb2.ROUTE_CLOUD), part(b"a"), made("r-1", png=b"a")], False),
        ([decided()], False),
    ],
)
def test_who_lost_an_image_that_may_be_paid_for_is_told_its_id(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[Any], named: bool
) -> None:
    def full(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    asked: list[edge_pb2.GenerateRequest] = []
    with answering(*events, asked=asked) as address:
        finished = run("generate", "a", "-o", str(tmp_path / "a.png"), "--agent", address)
    assert finished.code != 0
    assert (f"with --request-id {asked[0].image.request_id} an image" in finished.err) is named


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (DuplicateRequest("used before"), 2),
        (UnknownApp("not among those"), 2),
        (NotKept("the rest is not kept"), 2),
        (NotReady("still loading", retry_after_s=1.0), 3),
        (Draining("shutting down"), 3),
        (OutOfMemory("0 MB can be had"), 3),
        (GenerationFailed("the image is not finite"), 1),
    ],
)
def test_what_a_daemon_refuses_is_told_in_its_own_words(run: Run, refusal: RouteT2IError, code: int) -> None:
    with answering(refusal=refusal) as address:
        finished = run("generate", "a", "--agent", address)
        with pytest.raises(client.CallFailed) as failed:
            list(client.AgentClient(address).generate(prompt="a"))
    assert (finished.code, finished.err) == (code, f"edge-agent: {refusal.message}\n")
    assert failed.value.no_room is isinstance(refusal, Busy), (
        "which `models use` takes for no fault of the model"
    )


def test_quota_asks_for_an_app_and_status_tells_no_alpha_where_there_is_none(run: Run) -> None:
    asked: list[Any] = []
    budget = edge_pb2.BudgetState(
        name="day",
        window="day",
        cap_micro_usd=4,
        spent_micro_usd=1,
        reserved_micro_usd=2,
        remaining_micro_usd=3,
    )
    answers = {
        "GetQuota": edge_pb2.GetQuotaResponse(budgets=[budget]),
        "GetStatus": edge_pb2.GetStatusResponse(),
    }
    with answering(asked=asked, **answers) as address:
        (facts,) = run("quota", "--app", "kiosk", "--agent", address, "--json").objects
        table = run("quota", "--agent", address).out
        (status,) = run("status", "--agent", address, "--json").objects
    assert [request.app for request in asked[:2]] == ["kiosk", ""]
    assert list(facts.values()) == ["day", "day", 4, 1, 2, 3]
    assert table.splitlines()[1].split() == ["day", "day", "$0.000004", "$0.000001", "$0.000002", "$0.000003"]
    assert status["alpha"] is None


def test_a_proxy_for_the_world_outside_does_not_stand_between_command_and_daemon(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with answering(GetQuota=edge_pb2.GetQuotaResponse()) as address:
        assert run("quota", "--agent", address).code == 0


@pytest.mark.parametrize("name", ["../evil", "here/evil", "", "x" * 129])
def test_a_daemon_does_not_choose_the_folder_that_an_image_is_written_to(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with answering(decided(), made(name)) as address:
        finished = run("generate", "a", "--agent", address)
    assert (finished.code, finished.out) == (1, "")
    assert "what the daemon answered is wrong: request_id" in finished.err
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_what_only_a_newer_daemon_says_is_told_as_that(run: Run) -> None:
    reason = edge_pb2.Decision(route=edge_pb2.ROUTE_EDGE, reason=42)  # type: ignore[arg-type]
    route = edge_pb2.Decision(route=42, reason=edge_pb2.DECISION_REASON_LOCAL_ONLY)  # type: ignore[arg-type]
    provider = edge_pb2.Provider(name="npu", state=42)  # type: ignore[arg-type]
    for command, events, answers in (
        (("generate", "a"), [edge_pb2.GenerateResponse(decision=reason)], {}),
        (("generate", "a"), [made("r-1", served_by=42)], {}),
        (("route", "a"), [], {"Route": edge_pb2.RouteResponse(decision=route)}),
        (("status",), [], {"GetStatus": edge_pb2.GetStatusResponse(cloud_health=42)}),  # type: ignore[arg-type]
        (("status",), [], {"GetStatus": edge_pb2.GetStatusResponse(providers=[provider])}),
        (
            ("models", "show", "edge"),
            [],
            {"ListModels": edge_pb2.ListModelsResponse(models=[edge_pb2.Model(side=42)])},  # type: ignore[arg-type]
        ),
    ):
        with answering(*events, **answers) as address:
            finished = run(*command, "--agent", address)
        assert (finished.code, finished.out) == (1, "")
        assert re.search("answered 42 where .* newer than this command", finished.err)


def test_a_full_queue_is_no_refusal_by_quota() -> None:
    assert _exhausted(status_details(Busy("64 requests are waiting", retry_after_s=0.2))) == 3
    assert _exhausted(status_details(QuotaExhausted("nothing left today", budget="daily"))) == 4


def test_the_address_comes_from_flag_then_environment(
    run: Run, daemon: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = daemon.wait_for("listening")["address"]
    monkeypatch.setenv("EDGE_AGENT_ADDRESS", "127.0.0.1:1")
    assert run("quota").code == 3
    assert run("quota", "--agent", address).code == 0
    monkeypatch.setenv("EDGE_AGENT_ADDRESS", address)
    assert run("quota").code == 0


@pytest.mark.posix
def test_an_address_may_begin_at_home(run: Run, daemon: Process) -> None:
    assert run("quota", "--agent", "unix:~/edge-agent/agent.sock").code == 0  # the fixture's HOME has it, too


@pytest.mark.linux
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("status >/dev/full", "output cannot be written: No space left"),
        ("status --json >/dev/full", "output cannot be written: No space left"),
        (f"generate '{EDGE_PROMPT}' -o - >/dev/full", "output cannot be written: No space left"),
        (f"generate '{EDGE_PROMPT}' -o - >&-", "standard output is closed"),
        ("route - <&-", "standard input is closed"),
        ("route - 0>unread", "standard input cannot be read: Bad file descriptor"),
    ],
)
def test_streams_that_cannot_be_used_are_said_without_a_traceback(
    daemon: Process, folder: Path, command: str, words: str
) -> None:
    finished = shell(folder, command)
    assert finished.returncode == 2
    (said,) = finished.stderr.splitlines()
    assert words in said


@pytest.mark.linux
@pytest.mark.parametrize(
    "command",
    [
        "status --agent unix:here.sock",
        "generate cat -o pictures/cat.png",
        "generate cat",
        "serve --listen unix:here.sock",
    ],
)
def test_a_working_directory_that_was_removed_is_said_before_anything_is_made(
    daemon: Process, folder: Path, command: str
) -> None:
    known = len(daemon.calls)
    script = f'mkdir gone && cd gone && rmdir ../gone && exec "$0" -m edge_agent {command}'
    finished = subprocess.run(
        ["sh", "-c", script, sys.executable],
        capture_output=True,
        text=True,
        cwd=folder,
        env=process_environment(folder),
        check=False,
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "edge-agent: the working directory is not there any more; change to another\n"
    assert len(daemon.calls) == known


def test_a_file_that_nobody_foresaw_is_a_fault_and_not_taken_for_the_output(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_client: client.AgentClient) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    monkeypatch.setattr(client.AgentClient, "status", fails)
    with pytest.raises(PermissionError, match="somewhere"):
        run("status")


@pytest.mark.posix
def test_streams_that_were_closed_before_are_not_needed(daemon: Process, folder: Path) -> None:
    finished = shell(folder, f"generate '{EDGE_PROMPT}' -o {shlex.quote(str(folder / 'a.png'))} 2>&-")
    assert (finished.returncode, (folder / "a.png").exists()) == (0, True)
    assert (shell(folder, "quota >&-").returncode, shell(folder, "quota >&-").stderr) == (0, "")


@pytest.mark.linux
def test_remarks_that_nobody_takes_change_neither_output_nor_exit_code(
    folder: Path, routed_bundle: Path
) -> None:
    route = f"route '{EDGE_PROMPT}' --json --bundle {shlex.quote(str(routed_bundle))}"
    for command in (f"{route} 2>&-", f"{route} 2>/dev/full"):
        finished = shell(folder, command)
        assert (finished.returncode, len(finished.stdout.splitlines())) == (0, 1)
    assert shell(folder, f"{route} >&- 2>/dev/full").returncode == 0
    assert shell(folder, "route a --config none 2>/dev/full").returncode == 2


def test_output_that_was_closed_before_need_not_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    _drop_output()


def test_a_prompt_that_the_terminals_encoding_lacks_is_shown_all_the_same(
    daemon: Process, folder: Path
) -> None:
    def route(*arguments: str) -> str:
        finished = subprocess.run(
            [sys.executable, "-m", "edge_agent", "route", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=process_environment(folder, PYTHONIOENCODING="latin-1"),
        )
        assert (finished.returncode, finished.stderr) == (0, "")
        return finished.stdout

    assert "\\u732b" in route("猫")
    assert json.loads(route("--json", "猫🐈"))["prompt"] == "猫🐈"


def shell(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f"{shlex.quote(sys.executable)} -m edge_agent {command}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env=process_environment(folder, **environment),
    )


@pytest.mark.parametrize(
    ("library", "command"),
    [("grpc", ["serve"]), ("onnxruntime", ["serve"]), ("onnxruntime", ["route", "a cat"])],
)
def test_ctrl_c_while_a_library_is_being_imported_ends_the_program_quietly(
    library: str, command: list[str], tmp_path: Path
) -> None:
    """Some of them lose the exception that Python makes of it."""
    interrupted = f"""
import contextlib, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "{library}":
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["edge-agent", *{command}]
runpy.run_module("edge_agent", run_name="__main__")
"""
    finished = subprocess.run(
        [sys.executable, "-c", interrupted],
        capture_output=True,
        timeout=60,
        env=process_environment(tmp_path, EDGE_AGENT_ADDRESS=""),
    )
    assert (finished.returncode, finished.stderr) == (130, b"")


@pytest.mark.parametrize("command", [(), ("serve",), ("generate",), ("route",), ("quota",), ("status",)])
def test_help_teaches(run: Run, command: tuple[str, ...]) -> None:
    finished = run(*command, "--help")
    assert finished.code == 0
    if command in ((), ("serve",), ("generate",), ("route",)):
        assert "  edge-agent " in finished.out  # an example
    if command in ((), ("generate",), ("route",), ("quota",)):
        assert "exit codes" in finished.out or "--json prints" in finished.out


@pytest.mark.parametrize(("command", "keys"), [("route", DECISION), ("generate", IMAGE), ("quota", BUDGET)])
def test_help_names_every_key_that_json_prints(run: Run, command: str, keys: tuple[str, ...]) -> None:
    told = run(command, "--help").out.partition("--json prints")[2]
    assert [key for key in keys if not re.search(rf"\b{key}\b", told)] == []


@pytest.mark.parametrize("command", [("route", "a cat"), ("serve",)])
def test_without_onnxruntime_it_says_what_to_install(tmp_path: Path, command: tuple[str, ...]) -> None:
    without = "import sys; sys.modules['onnxruntime'] = None; from edge_agent.__main__ import main; sys.exit(main())"
    finished = subprocess.run(
        [sys.executable, "-c", without, *command],
        capture_output=True,
        text=True,
        timeout=60,
        env=process_environment(tmp_path, EDGE_AGENT_ADDRESS=""),
    )
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith(
        "edge-agent: there is no onnxruntime; install one: pip install"
    )
