"""The daemon's life as a process of its own: it starts or says why not, serves, drains, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from edge_agent import loader
from edge_agent.__main__ import main
from edge_agent.client import BAD_INPUT, UNREACHABLE
from edge_agent.daemon import HANG_UP_SIGNALS, STOP_SIGNALS, Daemon, run
from edge_agent.errors import BundleError
from edge_agent.quota import Ledger
from edge_agent.settings import resolve
from routet2i.edge.v1 import edge_pb2, edge_pb2_grpc
from routet2i.image.v1 import image_pb2
from tests import http2
from tests.edge_agent.test_cloud import make_certificate
from tests.hangup import hanging_up
from tests.routed import SLOW_STEPS
from tests.running import SERVICE, STOP, App, Process, process_environment, short_folder, until

Start = Callable[..., Process]
Refused = Callable[..., str]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = short_folder()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def start(folder: Path, routed_bundle: Path) -> Iterator[Start]:
    """Starts daemons with the routed bundle, and kills those that a test leaves behind."""
    started: list[Process] = []

    def start(*flags: str | Path, **environment: str) -> Process:
        flags = ("--bundle", routed_bundle, "--threads", "1", *flags)
        started.append(Process("edge_agent", folder, *flags, **environment))
        return started[-1]

    yield start
    for process in started:
        process.end()


@pytest.fixture
def refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What a daemon that cannot start says, ending with `code`. In this process, which is quicker."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.setattr("edge_agent.log.configure", lambda **_: None)  # pytest has the root logger

    def refused(*flags: str | Path, code: int = BAD_INPUT, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["serve", *map(str, flags)]) == code
        return capsys.readouterr().err

    return refused


def health(address: str) -> str:
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        response = stub.Check(request, timeout=20)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


@pytest.mark.posix
def test_by_default_it_listens_where_only_its_owner_gets_in(start: Start, folder: Path) -> None:
    process = start()
    path = folder / "edge-agent" / "agent.sock"
    assert process.wait_for("serving")["calibrated"] is True
    assert process.wait_for("listening")["address"] == f"unix:{path}"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert health(f"unix:{path}") == "SERVING"
    assert process.stop(signal.SIGINT) == 0
    assert not path.exists()


def test_it_drains_and_leaves_with_zero(start: Start, folder: Path) -> None:
    process = start("--listen", "127.0.0.1:0")
    address = process.wait_for("listening")["address"]
    process.wait_for("serving")
    finished: list[str] = []
    with grpc.insecure_channel(address) as channel:
        stub = edge_pb2_grpc.EdgeAgentServiceStub(channel)
        image = image_pb2.ImageRequest(prompt="a cat", steps=SLOW_STEPS)
        calls = [stub.Generate(edge_pb2.GenerateRequest(image=image), timeout=60) for _ in range(2)]

        def read(call: Any) -> None:
            finished.append([response.WhichOneof("event") for response in call][-1])

        assert all(next(call).WhichOneof("event") == "decision" for call in calls)
        readers = [threading.Thread(target=read, args=(call,)) for call in calls]
        for reader in readers:
            reader.start()
        process.popen.send_signal(STOP)
        process.wait_for("draining")
        health_stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = health_stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as refusal:
            stub.GetStatus(edge_pb2.GetStatusRequest(), timeout=20)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        for reader in readers:
            reader.join()
    assert finished == ["result"] * 2
    assert process.popen.wait(60) == 0
    assert process.wait_for_nothing_bad()


def test_a_second_signal_does_not_wait_and_callers_are_told_what_became_of_their_images(start: Start) -> None:
    process = start("--listen", "127.0.0.1:0")
    address = process.wait_for("listening")["address"]
    process.wait_for("serving")
    with grpc.insecure_channel(address) as channel:
        stub = edge_pb2_grpc.EdgeAgentServiceStub(channel)
        image = image_pb2.ImageRequest(prompt="a cat", steps=SLOW_STEPS)
        calls = [stub.Generate(edge_pb2.GenerateRequest(image=image), timeout=60) for _ in range(32)]
        for call in calls:
            assert next(call).WhichOneof("event") == "decision"
        process.popen.send_signal(STOP)
        process.wait_for("draining")
        assert process.stop() == 0
        endings = [ending for call in calls if (ending := _ending(call))]
        assert endings, "images that were waiting were made all the same"
        told = "the daemon was stopped before it was done; call again once it is started"
        assert set(endings) == {(grpc.StatusCode.UNAVAILABLE, told)}
        assert {(call["outcome"], call["error"]) for call in process.calls if call["outcome"] != "OK"} == {
            ("UNAVAILABLE", told)
        }


@pytest.mark.posix
def test_a_terminal_that_closes_ends_no_call_midway(start: Start) -> None:
    with hanging_up(signal.SIG_DFL):
        process = start("--listen", "127.0.0.1:0")
    address = process.wait_for("listening")["address"]
    process.wait_for("serving")
    with grpc.insecure_channel(address) as channel:
        stub = edge_pb2_grpc.EdgeAgentServiceStub(channel)
        image = image_pb2.ImageRequest(prompt="a cat", steps=SLOW_STEPS)
        call = stub.Generate(edge_pb2.GenerateRequest(image=image), timeout=60)
        assert next(call).WhichOneof("event") == "decision"
        process.popen.send_signal(signal.SIGHUP)
        process.wait_for("draining")
        process.popen.send_signal(signal.SIGHUP)  # the shell's, and then the kernel's
        process.popen.send_signal(signal.SIGTERM)  # the first of whoever shuts the machine down
        assert [response.WhichOneof("event") for response in call][-1] == "result"
    assert process.popen.wait(60) == 0


@pytest.mark.posix
def test_under_nohup_it_outlives_its_terminal(start: Start) -> None:
    with hanging_up(signal.SIG_IGN):
        process = start("--listen", "127.0.0.1:0")
    address = process.wait_for("listening")["address"]
    process.wait_for("serving")
    process.popen.send_signal(signal.SIGHUP)
    assert health(address) == "SERVING"
    assert process.stop() == 0


def _ending(call: Any) -> tuple[grpc.StatusCode, str] | None:
    """How the call was broken off; None where it came to its end."""
    try:
        list(call)
    except grpc.RpcError:
        return call.code(), call.details()
    return None


@pytest.mark.posix
def test_the_socket_of_a_killed_daemon_is_taken_over_and_a_live_one_is_not(
    start: Start, folder: Path, refused: Refused
) -> None:
    first = start()
    first.wait_for("serving")
    assert "already running" in refused("--state", folder / "other")
    first.kill()
    assert (folder / "edge-agent" / "agent.sock").exists()
    second = start()
    second.wait_for("serving")
    assert health(f"unix:{folder}/edge-agent/agent.sock") == "SERVING"


@pytest.mark.posix
def test_of_two_that_start_at_once_only_the_one_with_the_ledger_clears_a_socket_away(
    folder: Path, refused: Refused
) -> None:
    path = folder / "agent.sock"
    with socket.socket(socket.AF_UNIX) as bound_and_not_listening_yet:
        bound_and_not_listening_yet.bind(str(path))
        ledger = Ledger.open(folder / "quota.sqlite3", ())
        held = refused("--state", folder, "--listen", f"unix:{path}", code=UNREACHABLE)
        assert "in use by another edge-agent" in held
        ledger.close()
        assert path.exists()


@pytest.mark.posix
def test_what_lies_at_the_sockets_place_is_left_alone(folder: Path, refused: Refused) -> None:
    (folder / "file").write_text("precious")
    assert "no socket" in refused("--listen", f"unix:{folder}/file")
    assert (folder / "file").read_text() == "precious"
    assert "cannot make the socket" in refused("--listen", f"unix:{folder}/file/agent.sock")


def test_a_port_in_use_is_refused(folder: Path, refused: Refused) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen on {address}" in refused("--listen", address)
        by_name = address.replace("127.0.0.1", "localhost")  # also [::1], which is free
        assert f"cannot listen on {by_name}" in refused("--listen", by_name)


def test_the_log_says_at_the_start_what_is_not_as_it_should_be(folder: Path) -> None:
    models = ("--models", folder / "misspelt", "--listen", "127.0.0.1:0")
    never = ("--cloud", "127.0.0.1:1", "--budget", "0.001", "--max-price", "0.01")
    process = Process("edge_agent", folder, *models, *never, EDGE_AGENT_BUGDET="1")
    try:
        process.wait_for("serving")
        assert process.stop() == 0
    finally:
        process.kill()
    advice = [line["do"] for line in process.lines if line["event"] == "advice"]
    assert any(f"the models folder {folder / 'misspelt'} is not there" in each for each in advice)
    assert any("never has room for one: raise --budget" in each for each in advice)
    assert "EDGE_AGENT_BUGDET is no setting: did you mean EDGE_AGENT_BUDGET?" in advice


def test_a_file_for_a_models_folder_is_refused(folder: Path, refused: Refused) -> None:
    (folder / "file").touch()
    words = refused("--models", folder / "file", "--listen", "127.0.0.1:0")
    assert (
        f"{Path('file/.current')} cannot be read: Not a directory; choose another folder with --models"
        in words
    )


def test_the_command_says_why_it_cannot_start_without_a_traceback(folder: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "edge_agent", "serve", "--bundle", folder / "none"],
        capture_output=True,
        text=True,
        timeout=60,
        env=process_environment(folder),
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("edge-agent: no bundle at")


def test_an_address_beyond_this_machine_is_refused(folder: Path, refused: Refused) -> None:
    assert "loopback" in refused("--listen", "0.0.0.0:0")
    assert "EDGE_AGENT_LISTEN" in refused(EDGE_AGENT_LISTEN="[::]:0")


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_bundle_is_refused_by_the_files_name(
    folder: Path, bundle_copy: Path, damage: str, refused: Refused
) -> None:
    file = bundle_copy / "unet" / "model.onnx"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert str(file) in refused("--bundle", bundle_copy)


@pytest.mark.posix
def test_links_that_lead_to_themselves_are_no_bundle(folder: Path, refused: Refused) -> None:
    (folder / "loop").symlink_to("loop")
    assert "no bundle at" in refused("--bundle", folder / "loop")


def test_a_ledger_that_cannot_be_used_is_refused(folder: Path, routed_bundle: Path, refused: Refused) -> None:
    state = folder / "ledger"
    state.mkdir()
    file = state / "quota.sqlite3"
    file.write_bytes(b"this is not a database, but it is long enough to look at" * 100)
    assert "not a quota ledger" in refused("--bundle", routed_bundle, "--state", state)
    file.unlink()
    sqlite3.connect(file).executescript("CREATE TABLE t (x); INSERT INTO t VALUES (1);").close()
    assert "another program's database" in refused("--bundle", routed_bundle, "--state", state)
    file.unlink()
    held = Ledger.open(file, ())
    assert "another edge-agent" in refused("--bundle", routed_bundle, "--state", state, code=UNREACHABLE)
    held.close()
    file.unlink()
    state.rmdir()
    state.write_text("a file where the folder should be")
    assert str(file) in refused("--bundle", routed_bundle, "--state", state)


@pytest.mark.posix
def test_a_disk_that_takes_no_ledger_now_is_no_reason_never_to_try_again(folder: Path) -> None:
    finished = subprocess.run(
        ["/bin/sh", "-c", f"ulimit -f 1; {sys.executable} -m edge_agent serve"],
        capture_output=True,
        text=True,
        timeout=60,
        env=process_environment(folder),
    )
    assert finished.returncode == UNREACHABLE
    assert "cannot be read or written: check the disk" in finished.stderr


def test_a_provider_that_does_not_work_here_is_refused(refused: Refused, routed_bundle: Path) -> None:
    words = refused("--bundle", routed_bundle, "--providers", "cpu,nosuch")
    assert "--providers names nosuch, which this onnxruntime" in words and "Traceback" not in words


def test_a_token_that_cannot_be_read_is_refused(folder: Path, refused: Refused) -> None:
    words = refused("--cloud", "127.0.0.1:1", "--cloud-token", folder / "none")
    assert "cannot read the token" in words


@pytest.mark.parametrize(
    "content", ["", "tenant 0123456789abcdef", "# mine\n0123456789abcdef", "0123456789abcdef\u00e9"]
)
def test_a_file_that_holds_more_or_less_than_a_token_is_refused(
    folder: Path, refused: Refused, content: str
) -> None:
    file = folder / "token.txt"
    file.write_text(content, encoding="utf-8-sig")  # as Windows saves it
    assert "must hold one token" in refused("--cloud", "127.0.0.1:1", "--cloud-token", file)


@pytest.mark.parametrize("content", [None, "", "no certificate", "-----BEGIN CERTIFICATE-----\n!\n"])
def test_certificates_that_cannot_be_read_are_refused(
    folder: Path, refused: Refused, content: str | None
) -> None:
    file = folder / "ca.pem"
    if content is not None:
        file.write_text(content)
    words = refused("--cloud", "localhost:1", "--cloud-ca", file)
    assert f"--cloud-ca {file} has no certificate that can be read" in words


def test_each_request_has_one_line_without_its_prompt(start: Start, folder: Path) -> None:
    process = start("--listen", "127.0.0.1:0", EDGE_AGENT_ROUTING_RATE="0.25")
    address = process.wait_for("listening")["address"]
    process.wait_for("serving")
    with grpc.insecure_channel(address) as channel:
        stub = edge_pb2_grpc.EdgeAgentServiceStub(channel)
        image = image_pb2.ImageRequest(prompt="a secret cat", request_id="r-1", app="kiosk")
        list(stub.Generate(edge_pb2.GenerateRequest(image=image), timeout=60))
        with pytest.raises(grpc.RpcError):
            list(stub.Generate(edge_pb2.GenerateRequest(image=image_pb2.ImageRequest()), timeout=60))
    assert process.stop() == 0
    made, bad = process.calls
    assert made.items() >= {"request_id": "r-1", "app": "kiosk", "outcome": "OK", "served_by": "edge"}.items()
    assert {"route", "reason", "prs", "alpha", "sha256", "encode_ms", "denoise_ms", "total_ms"} <= set(made)
    assert bad["outcome"] == "INVALID_ARGUMENT" and "empty" in bad["error"]
    assert "secret" not in process.text


def test_a_call_whose_method_is_no_text_ends_neither_the_daemon_nor_the_calls_under_way(
    start: Start, folder: Path
) -> None:
    """At which gRPC 1.84 and 1.85 close the address for good, and write to memory that they have freed."""
    process = start("--listen", "127.0.0.1:0" if os.name == "nt" else f"unix:{folder}/agent.sock")
    address = process.wait_for("listening")["address"]
    process.wait_for("serving")
    image = image_pb2.ImageRequest(prompt="a cat", steps=SLOW_STEPS)
    with grpc.insecure_channel(address) as channel:
        call = edge_pb2_grpc.EdgeAgentServiceStub(channel).Generate(edge_pb2.GenerateRequest(image=image))
        assert next(call).HasField("decision")
        http2.call(address, b"/routet2i.\xec/x")
        time.sleep(0.5)  # by then they have
        assert health(address) == "SERVING"
        *_, last = call
        assert last.HasField("result")
    assert process.stop() == 0


async def test_a_proxy_that_hangs_up_with_a_code_of_its_own_does_not_end_the_daemon(start: Start) -> None:
    """As Apache does. At a code past 12 gRPC 1.84 and 1.85 end the process."""
    async with http2.proxy(200, b"", kind="application/grpc", goaway=70_007) as cloud:
        process = start("--listen", "127.0.0.1:0", "--cloud", cloud)
        await asyncio.to_thread(process.wait_for, "serving")
        async with grpc.aio.insecure_channel(process.wait_for("listening")["address"]) as channel:
            answer = await App(channel).generate(routing=edge_pb2.ROUTING_CLOUD_ONLY)
            assert answer.code == "UNAVAILABLE"
            assert await App(channel).health() == "SERVING"


async def test_bytes_that_are_no_message_leave_no_traceback_whoever_sends_them(start: Start) -> None:
    junk = b"\xff\xff"
    body = struct.pack(">BI", 0, len(junk)) + junk
    async with http2.proxy(200, body, kind="application/grpc", after_s=0.5) as cloud:
        process = start("--listen", "127.0.0.1:0", "--cloud", cloud)
        await asyncio.to_thread(process.wait_for, "serving")
        async with grpc.aio.insecure_channel(process.wait_for("listening")["address"]) as channel:
            with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
                await channel.unary_unary("/grpc.health.v1.Health/Check")(junk)
            reflection = channel.stream_stream(
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
            )
            assert [b"invalid argument" in told async for told in reflection(iter([junk]))] == [True]
            answer = await App(channel).generate(routing=edge_pb2.ROUTING_CLOUD_ONLY)
            assert "cannot be read" in answer.message
    assert "deserializing" in process.text  # of what the cloud sent
    assert "Unexpected" not in process.text and "Traceback" not in process.text


async def test_a_model_that_is_refused_once_the_daemon_leaves_is_no_line_of_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, end = threading.Event(), threading.Event()

    def load(*_: object) -> None:
        begun.set()
        end.wait()
        raise BundleError("a file of it is damaged")

    monkeypatch.setattr(loader, "load", load)

    async def live() -> None:
        daemon = Daemon(resolve({"listen": "127.0.0.1:0", "state": str(folder)}, {}))
        await daemon.startup()
        serving = asyncio.create_task(daemon.serve())
        await until(begun.is_set)
        daemon.stop()
        await serving
        end.set()
        await until(lambda: not daemon.still_working)
        await daemon.shutdown()

    await live()
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_who_watches_its_health_and_reads_nothing_holds_up_neither_the_others_nor_the_end(
    start: Start,
) -> None:
    process = start("--listen", "127.0.0.1:0")
    address = process.wait_for("listening")["address"]
    process.wait_for("serving")
    with (
        http2.unread(address, b"/grpc.health.v1.Health/Watch"),
        grpc.insecure_channel(address) as channel,
    ):
        assert health(address) == "SERVING"  # by then it has been called
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watched = stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        process.popen.send_signal(STOP)
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert process.popen.wait(10) == 0
    assert "Traceback" not in process.text


@pytest.mark.parametrize("number", (*STOP_SIGNALS, *HANG_UP_SIGNALS) if os.name == "posix" else [STOP])
def test_who_asks_again_while_it_leaves_gets_the_same_exit_code(start: Start, number: signal.Signals) -> None:
    with hanging_up(signal.SIG_DFL) if os.name == "posix" else nullcontext():
        process = start("--listen", "127.0.0.1:0")
    process.wait_for("serving")
    while process.popen.poll() is None:
        with suppress(OSError, SystemError):  # on Windows it may just have gone
            process.popen.send_signal(number)
        time.sleep(0.01)
    assert process.popen.wait() == 0
    assert "Traceback" not in process.text


@pytest.mark.posix
def test_a_log_that_nobody_reads_holds_up_neither_calls_nor_the_end(
    folder: Path, routed_bundle: Path
) -> None:
    address = f"unix:{folder}/agent.sock"
    command = [sys.executable, "-m", "edge_agent", "serve", "--bundle", routed_bundle, "--listen", address]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, env=process_environment(folder)) as daemon,
        grpc.insecure_channel(address) as channel,
    ):
        stub = edge_pb2_grpc.EdgeAgentServiceStub(channel)
        request = edge_pb2.RouteRequest(image=image_pb2.ImageRequest(prompt="a cat"))
        try:
            while not _served(stub, request):
                assert daemon.poll() is None
            for _ in range(600):  # a pipe holds 64 KiB: some 200 lines
                stub.Route(request, timeout=20)
            daemon.terminate()
            assert daemon.wait(20) == 0
        finally:
            daemon.kill()


def test_what_grpc_has_to_say_of_a_cloud_that_speaks_no_tls_is_no_line_of_the_log(
    start: Start, tmp_path: Path
) -> None:
    """It would be of another form, and where nobody reads the log gRPC's own threads would wait for it to be read."""
    pem = make_certificate(tmp_path)[1]
    with socket.create_server(("127.0.0.1", 0)) as cloud:
        host, port = cloud.getsockname()
        process = start("--listen", "127.0.0.1:0", "--cloud", f"{host}:{port}", "--cloud-ca", pem)
        address = process.wait_for("listening")["address"]
        process.wait_for("serving")
        threading.Thread(target=_answer_in_plain_text, args=(cloud,), daemon=True).start()
        with grpc.insecure_channel(address) as channel:
            image = image_pb2.ImageRequest(prompt="a cat")
            request = edge_pb2.GenerateRequest(image=image, routing=edge_pb2.ROUTING_CLOUD_ONLY)
            with pytest.raises(grpc.RpcError, match=r"TLS|SSL|andshake"):
                list(edge_pb2_grpc.EdgeAgentServiceStub(channel).Generate(request, timeout=60))
        assert process.stop() == 0
    assert [line for line in process.text.splitlines() if not line.startswith("{")] == []


def _answer_in_plain_text(server: socket.socket) -> None:
    with suppress(OSError):  # it is closed
        while True:
            caller, _ = server.accept()
            with caller, suppress(ConnectionError):
                caller.recv(65_536)
                caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def _served(stub: Any, request: edge_pb2.RouteRequest) -> bool:
    try:
        stub.Route(request, timeout=20, wait_for_ready=True)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE  # it is still loading
        return False
    return True


async def test_signals_stop_the_daemon_also_where_the_event_loop_takes_none(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:  # as on Windows
        raise NotImplementedError

    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, *HANG_UP_SIGNALS)}
    monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", unsupported)
    flags = {"listen": "127.0.0.1:0", "bundle": str(routed_bundle), "state": str(tmp_path), "threads": "1"}
    running = asyncio.create_task(run(resolve(flags, {})))
    try:
        await until(lambda: signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM])
        signal.raise_signal(signal.SIGTERM)
        await asyncio.wait_for(running, 60)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
