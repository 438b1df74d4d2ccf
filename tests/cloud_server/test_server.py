"""The server's life: starting, being refused a start, draining, dying, and what is left afterwards."""

from __future__ import annotations

import asyncio
import importlib.abc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cloud_server import credentials, server
from cloud_server.__main__ import main
from cloud_server.errors import StartRefused, Unauthenticated
from cloud_server.server import HANG_UP_SIGNALS, STOP_SIGNALS, Server
from cloud_server.settings import STARTER, Settings
from cloud_server.tenants import Tenants
from tests import http2
from tests.cloud_server.conftest import PRICE, Client, Process, Running, serve
from tests.hangup import hanging_up
from tests.miniature import forget
from tests.running import STOP, short_folder, until
from tests.web import certificate as make_certificate

Start = Callable[..., Process]
STOPS = [STOP, *([signal.SIGHUP] if sys.platform != "win32" else [])]


@pytest.mark.parametrize("number", STOPS)
async def test_it_loads_serves_drains_and_stops(
    number: int, start: Start, model_folder: Path, tmp_path: Path
) -> None:
    """Health follows the model, a request in flight survives the signal, and a new one is sent away."""
    flags = ("--listen", "127.0.0.1:0", "--model", model_folder, "--state", tmp_path / "state")
    with hanging_up(signal.SIG_DFL) if os.name == "posix" else nullcontext():
        process = start(*flags, module="tests.cloud_server.held_device")
    async with grpc.aio.insecure_channel(await process.address()) as channel:
        client = Client(channel)
        assert await client.health_status() == "NOT_SERVING", "the model takes seconds to load"
        early = await client.generate()
        assert early.error is not None
        assert early.error.code == "UNAVAILABLE"
        assert "loading" in early.error.message
        assert "RetryInfo" in early.error.details
        serving = json.loads(await process.until('"serving"'))
        assert (serving["device"], serving["dtype"]) == ("cpu", "float32"), "what auto came to"
        assert await client.health_status() == "SERVING"
        assert await client.health_status("") == "SERVING"

        watching = client.health.Watch(health_pb2.HealthCheckRequest())
        unread = client.health.Watch(health_pb2.HealthCheckRequest())  # noqa: F841  # it is held till the end
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        long = client.call(request_id="in-flight")
        await anext(aiter(long))
        process.popen.send_signal(number)
        await process.until('"draining"')
        if number != STOP:  # a terminal that closed, and now the first of whoever shuts the machine down
            process.popen.send_signal(STOP)
        assert await client.health_status() == "NOT_SERVING"
        late = await client.generate(request_id="late")
        assert late.error is not None
        assert late.error.code == "UNAVAILABLE"
        assert "shutting down" in late.error.message
        (tmp_path / "go").touch()
        answer = await client.read(long)
        assert answer.error is None
        assert answer.result is not None, "a request in flight is finished"
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await process.exit_code() == 0
    assert "Traceback" not in process.text
    lines = [json.loads(line) for line in process.text.splitlines() if line.startswith("{")]
    assert [line["outcome"] for line in lines if line["event"] == "call"] == [
        "UNAVAILABLE",
        "UNAVAILABLE",
        "OK",
    ]


async def test_what_was_charged_survives_kill_9(start: Start, model_folder: Path, tmp_path: Path) -> None:
    flags = ("--price-micro-usd", PRICE, "--model", model_folder, "--state", tmp_path / "state")
    process = start("--listen", "127.0.0.1:0", *flags)
    await process.until('"serving"')
    async with grpc.aio.insecure_channel(await process.address()) as channel:
        client = Client(channel)
        finished = await client.generate(request_id="finished")
        assert finished.result is not None
        cut = client.call(request_id="cut-off", steps=140, width=512, height=512)
        await anext(aiter(cut))
        process.popen.kill()
        await process.exit_code()

    async with serve(tmp_path / "state", model_folder) as restarted:
        lookup = await restarted.client.lookup("finished")
        assert (lookup.charged, lookup.charged_micro_usd) == (True, PRICE)
        assert lookup.sha256 == finished.result.image.sha256
        assert await restarted.client.state("finished") == "FINISHED"
        assert await restarted.client.state("cut-off") == "FAILED"
        assert not (await restarted.client.lookup("cut-off")).charged
        assert await restarted.client.state("never-sent") == "UNKNOWN"

        again = await restarted.client.generate(request_id="finished")
        assert again.png == finished.png
        assert restarted.passes == [0], "a charged image is sent again, not made again"
        retried = await restarted.client.generate(request_id="cut-off", steps=1)
        assert retried.result is not None


async def test_ctrl_c_while_the_model_loads_ends_it_cleanly(
    start: Start, model_folder: Path, tmp_path: Path
) -> None:
    process = start("--listen", "127.0.0.1:0", "--model", model_folder, "--state", tmp_path / "state")
    await process.until('"listening"')
    process.popen.send_signal(STOP if os.name == "nt" else signal.SIGINT)  # a group gets no Ctrl-C there
    assert await process.exit_code() == 0
    assert "Traceback" not in process.text
    assert '"stopped"' in process.text


async def test_when_the_grace_period_is_over_what_still_runs_is_told_so_and_stops_at_its_next_step(
    tmp_path: Path, model_folder: Path
) -> None:
    """And what waits behind it. Nothing is charged, and the same request is made by the next server."""
    names = ("slow", "waiting")
    async with serve(tmp_path, model_folder, grace_s=0.2) as running:
        calls = [running.client.call(request_id=one, steps=150, width=512, height=512) for one in names]
        for call in calls:
            await anext(aiter(call))
        running.server.stop()
        stopping = asyncio.create_task(running.server.shutdown())
        for call in calls:
            answer = await running.client.read(call)
            assert answer.error is not None
            assert answer.result is None
            assert answer.error.code == "UNAVAILABLE"
            assert answer.error.message.startswith("the server was stopped before it was done; call again")
        await stopping
        assert running.passes[0] < 150
        # A second shutdown, by the fixture, finds nothing left to do.
    async with serve(tmp_path, model_folder) as restarted:
        for one in names:
            lookup = await restarted.client.lookup(one)
            assert (lookup.charged, lookup.charged_micro_usd) == (False, 0)
            assert await restarted.client.state(one) == "CANCELLED"
        again = await restarted.client.generate(request_id="slow", steps=1)
        assert again.error is None


async def test_a_lost_device_ends_the_server_so_that_it_is_started_again(
    start: Start, model_folder: Path, tmp_path: Path
) -> None:
    """Those whose images were in the making are told and not charged, and the log says what was lost and why."""
    flags = ("--listen", "127.0.0.1:0", "--model", model_folder, "--state", tmp_path / "state")
    process = start(*flags, module="tests.cloud_server.lost_device")
    names = ("drawn", "waiting")
    async with grpc.aio.insecure_channel(await process.address()) as channel:
        await process.until('"serving"')
        client = Client(channel)
        calls = [client.call(request_id=one) for one in names]
        for call in calls:
            await anext(aiter(call))
        (tmp_path / "lost").touch()
        for answer in [await client.read(call) for call in calls]:
            assert answer.error is not None
            assert answer.error.code == "INTERNAL"
            assert answer.error.message.startswith("the device cpu is lost")
        assert await process.exit_code() == 3
    (lost,) = [line for line in process.lines if line["event"] == "device lost"]
    said = "CUDA error: an illegal memory access was encountered"  # by the pipeline, and when that was looked into
    assert (lost["device"], lost["error"]) == ("cpu", f"{said}; then {said}")
    assert {"draining", "stopped"} <= {line["event"] for line in process.lines}
    ends = "cloud-server: the device cpu is lost, so the server ends; starting it again may help"
    assert process.text.splitlines()[-1] == ends
    async with serve(tmp_path / "state", model_folder) as restarted:
        for one in names:
            assert await restarted.client.state(one) == "FAILED"
            assert not (await restarted.client.lookup(one)).charged


async def test_a_step_that_hangs_keeps_neither_its_caller_nor_the_command_from_the_end(
    start: Start, model_folder: Path, tmp_path: Path
) -> None:
    """As in a driver that answers no more. What can be told and written down still is."""
    flags = ("--listen", "127.0.0.1:0", "--model", model_folder, "--state", tmp_path / "state")
    process = start(*flags, "--grace-s", "0", module="tests.cloud_server.hanging_device")
    async with grpc.aio.insecure_channel(await process.address()) as channel:
        await process.until('"serving"')
        call = Client(channel).call(request_id="hangs")
        await anext(aiter(call))
        await process.until("a step hangs")
        process.popen.send_signal(STOP)
        answer = await Client(channel).read(call)
        assert answer.error is not None
        assert answer.error.code == "UNAVAILABLE"
        assert answer.error.message.startswith("the server was stopped before it was done")
        assert await process.exit_code(20) == 0
    assert process.lines[-1]["event"] == "stopped"
    async with serve(tmp_path / "state", model_folder) as restarted:
        assert await restarted.client.state("hangs") == "CANCELLED"


@pytest.mark.posix
async def test_under_nohup_and_with_a_log_that_nobody_reads_it_answers_until_it_is_told_to_stop(
    start: Start, model_folder: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ("--model", model_folder, "--state", tmp_path / "state")
    with hanging_up(signal.SIG_IGN):
        process = start("--listen", address, *flags, stderr=subprocess.PIPE)
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.wait_for(channel.channel_ready(), 60)
        client = Client(channel)
        process.popen.send_signal(signal.SIGHUP)
        for _ in range(1_000):  # a pipe holds 64 KiB: some 400 lines
            await client.lookup("none")
    process.popen.terminate()
    assert await process.exit_code(30) == 0


async def test_a_call_whose_method_is_no_text_ends_neither_the_server_nor_the_calls_under_way(
    tmp_path: Path, model_folder: Path
) -> None:
    """At which gRPC 1.84 and 1.85 close the port for good, whoever calls, and write to memory that they have freed."""
    async with serve(tmp_path, model_folder) as running:
        address = f"127.0.0.1:{running.server.port}"
        go = threading.Event()

        def held(*_: Any) -> None:
            go.wait(60)

        running.pipeline.unet.register_forward_pre_hook(held)
        call = running.client.call(request_id="under-way")
        await anext(aiter(call))
        await asyncio.to_thread(http2.call, address, b"/routet2i.\xec/x")
        await asyncio.sleep(0.5)  # by then they have
        go.set()
        async with grpc.aio.insecure_channel(address) as channel:
            assert (await Client(channel).generate(request_id="new", steps=1)).result is not None
        assert (await running.client.read(call)).result is not None


async def test_who_watches_its_health_and_reads_nothing_does_not_hold_up_the_others(
    tmp_path: Path, model_folder: Path
) -> None:
    """Nor the end, which has to tell them. No token is asked of either."""
    async with serve(tmp_path, model_folder) as running:
        with http2.unread(f"127.0.0.1:{running.server.port}", b"/grpc.health.v1.Health/Watch"):
            assert await running.client.health_status("") == "SERVING", "by then it has been called"
            watched = running.client.health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
            assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
            running.server._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
            assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_bytes_that_are_no_message_leave_no_traceback(
    start: Start, model_folder: Path, tmp_path: Path
) -> None:
    process = start("--listen", "127.0.0.1:0", "--model", model_folder, "--state", tmp_path / "state")
    async with grpc.aio.insecure_channel(await process.address()) as channel:
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff\xff")
        reflection = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        assert [b"invalid argument" in told async for told in reflection(iter([b"\xff\xff"]))] == [True]
    assert "Unexpected" not in process.text and "Traceback" not in process.text


async def test_who_asks_again_while_it_leaves_gets_the_same_exit_code(
    start: Start, model_folder: Path, tmp_path: Path
) -> None:
    """In whatever way, at any moment until it has gone."""
    process = start("--listen", "127.0.0.1:0", "--model", model_folder, "--state", tmp_path / "state")
    await process.until('"serving"')
    while process.popen.poll() is None:
        for number in (*STOP_SIGNALS, *HANG_UP_SIGNALS) if os.name == "posix" else [STOP]:
            with suppress(OSError, SystemError):  # on Windows it may just have gone
                process.popen.send_signal(number)
        await asyncio.sleep(0.01)
    assert process.popen.wait() == 0
    assert "Traceback" not in process.text


@pytest.mark.posix
async def test_strangers_who_speak_no_tls_hold_up_nothing_where_nobody_reads_the_log(
    start: Start, model_folder: Path, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        host, port = free.getsockname()
    chain, key = certificate
    (tmp_path / "tokens").write_text("acme 0123456789abcdef\n")
    tls = ("--tls-cert", chain, "--tls-key", key, "--tokens", tmp_path / "tokens")
    flags = ("--model", model_folder, "--state", tmp_path / "state")
    process = start("--listen", f"{host}:{port}", *tls, *flags, stderr=subprocess.PIPE)
    trusted = grpc.ssl_channel_credentials(chain.read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{port}", trusted) as channel:
        await asyncio.wait_for(channel.channel_ready(), 60)
    for _ in range(600):  # gRPC has 200 bytes to say of each, and a pipe holds 64 KiB
        with socket.create_connection((host, port), timeout=10) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(ConnectionError):
                stranger.recv(100)
    process.popen.terminate()
    assert await process.exit_code(30) == 0


@pytest.mark.posix
async def test_threads_sleep_while_they_wait_unless_the_environment_says_otherwise(
    start: Start, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")  # OpenMP tells what it goes by
    for state, policy, count in (("one", "PASSIVE", "0"), ("other", "ACTIVE", "7")):
        process = start("--listen", "127.0.0.1:0", "--model", model_folder, "--state", tmp_path / state)
        for words in (f"OMP_WAIT_POLICY = '{policy}'", f"GOMP_SPINCOUNT = '{count}'"):
            await process.until(words)
        monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")


@pytest.mark.asyncio(loop_scope="module")
async def test_reflection_lists_the_service(running: Running) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(running.client.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = [service.name async for reply in call for service in reply.list_services_response.service]
    assert {"routet2i.cloud.v1.CloudServerService", "grpc.health.v1.Health"} <= set(names)


@pytest.mark.parametrize("host", ["a..b", "a" * 70, "\udcff"])
async def test_a_name_that_no_host_can_have_is_refused_in_a_line(tmp_path: Path, host: str) -> None:
    starting = Server(Settings(listen=f"{host}:0", state=str(tmp_path / "state")))
    with pytest.raises(StartRefused, match="cannot listen on"):
        await starting.startup()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])  # which is [::1], too, and that is free
def test_a_taken_port_is_said_with_exit_code_2(
    start: Start, model_folder: Path, tmp_path: Path, host: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"{host}:{taken.getsockname()[1]}"
        process = start("--listen", address, "--model", model_folder, "--state", tmp_path / "state")
        assert process.popen.wait(60) == 2
    assert f"cannot listen on {address}" in process.text
    assert "--listen" in process.text
    assert "Traceback" not in process.text


@pytest.mark.asyncio(loop_scope="module")
async def test_two_servers_cannot_share_a_port_or_a_journal(running: Running, tmp_path: Path) -> None:
    state = Path(running.server.settings.state)
    with pytest.raises(StartRefused, match="another cloud-server uses it"):
        await Server(Settings(listen="127.0.0.1:0", state=str(state))).startup()
    same_port = Settings(listen=f"127.0.0.1:{running.server.port}", state=str(tmp_path / "other"))
    with pytest.raises(StartRefused, match="cannot listen"):
        await Server(same_port).startup()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--listen", "0.0.0.0:50052"], "--tls-cert"),
        (["--listen", "[::]:50052"], "--tls-cert"),
        (["--listen", "cloud.example:50052"], "--tls-cert"),
        (["--listen", "127.0.0.1"], "HOST:PORT"),
        (["--listen", "127.0.0.1:70000"], "HOST:PORT"),
        (["--tls-cert", "cert.pem"], "go together"),
        (["--tls-cert", "no.pem", "--tls-key", "no.pem"], "no.pem"),
        (["--tokens", "no-tokens.txt", "--listen", "127.0.0.1:0"], "no-tokens.txt"),
        (["--model", "no-such-folder", "--listen", "127.0.0.1:0"], "no model folder no-such-folder"),
        (["--max-queue", "-1"], "--max-queue"),
        (["--threads", "999999999"], "--threads must be at most 1024"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused_with_what_to_do(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--state", str(tmp_path / "state"), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("cloud-server: ")
    assert words in error


def test_a_model_that_cannot_be_loaded_is_refused_by_its_folder(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    flags = ["--listen", "127.0.0.1:0", "--state", str(tmp_path / "state"), "--model", str(broken)]
    assert main(["serve", *flags]) == 2
    error = capsys.readouterr().err
    assert f"cannot load the model in {broken}" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("card", "flags", "words"),
    [
        ({}, ["--max-steps", "5"], "steps is 25; 1 to 5 are served"),
        ({"steps": 8}, ["--max-steps", "5"], "steps is 8; 1 to 5 are served"),
        ({"guidance_scale": 200}, [], "guidance_scale must lie between 0 and 100"),
        ({"width": 60, "height": 64}, [], "width is 60; served are multiples of 8"),
    ],
)
def test_a_model_whose_own_defaults_would_be_refused_is_not_served(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    card: object,
    flags: list[str],
    words: str,
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "routet2i.json").write_text(json.dumps(card))
    where = ["--listen", "127.0.0.1:0", "--state", str(tmp_path / "state"), "--model", str(folder)]
    assert main(["serve", *where, *flags]) == 2
    assert f"cloud-server: the model's own defaults are not served: {words}" in capsys.readouterr().err


# "meta" computes nothing, for "hpu" torch looks for a package, of "xla" it says all that it has in its place.
@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta", "hpu", "xla"])
def test_a_device_that_is_not_here_is_refused_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    def read(_: str) -> None:
        raise AssertionError("the model was read first")

    monkeypatch.setattr(server, "open_model", read)
    where = ["--listen", "127.0.0.1:0", "--state", str(tmp_path / "state")]
    assert main(["serve", *where, "--device", device]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith(f"cloud-server: --device {device} cannot be used: ") and len(complaint) < 500


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("CUDA error: no kernel image is available for execution on the device", 2),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", 3),
        ("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized", 3),
        ("CUDA error: out of memory", 3),
        ("No HIP GPUs are available", 3),
        ("No XPU devices are available", 3),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_computes_nothing_is_refused_and_one_that_may_do_so_later_with_exit_code_3(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    said: str,
    code: int,
) -> None:
    """The unit starts the server again after the one and not after the other."""
    asked = []

    def ones(*_: int, device: str) -> None:
        asked.append(device)
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    where = ["--listen", "127.0.0.1:0", "--state", str(tmp_path / "state"), "--device", device]
    assert main(["serve", *where]) == code
    assert asked == ["cuda"]
    name = "--device auto (here cuda)" if device == "auto" else "--device cuda"
    words = "cannot be used now" if code == 3 else "cannot be used"
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith(f"cloud-server: {name} {words}: {said}. ")
    assert ("Give --device cpu" in complaint) is (code == 2)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError("libcublas.so.12: cannot open shared object file"), 2),
        (RuntimeError("in a word " * 60 + "CUDA error: out of memory"), 3),
    ],
)
def test_a_torch_that_cannot_be_imported_is_no_traceback(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
) -> None:
    """Nor is what decides lost where much is said before it."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch":
                raise error

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert main(["serve", "--listen", "127.0.0.1:0", "--state", str(tmp_path / "state")]) == code
    assert "--device auto cannot be used" in capsys.readouterr().err


def test_a_model_that_lacks_weights_is_refused_by_their_name(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    incomplete = shutil.copytree(model_folder, tmp_path / "incomplete")
    forget(incomplete / "text_encoder", "text_model.final_layer_norm.bias")
    flags = ["--listen", "127.0.0.1:0", "--state", str(tmp_path / "state"), "--model", str(incomplete)]
    assert main(["serve", *flags]) == 2
    begins = f"cloud-server: cannot load the model in {incomplete}: "
    missing = r"text_encoder has no weights (text_model\.)?final_layer_norm\.bias\. Save it again with"
    assert re.search(re.escape(begins) + missing, capsys.readouterr().err)


def test_a_model_whose_index_names_no_scheduler_is_refused_by_what_it_lacks(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    incomplete = shutil.copytree(model_folder, tmp_path / "incomplete")
    index = json.loads((incomplete / "model_index.json").read_text())
    del index["scheduler"]
    (incomplete / "model_index.json").write_text(json.dumps(index))
    flags = ["--listen", "127.0.0.1:0", "--state", str(tmp_path / "state"), "--model", str(incomplete)]
    assert main(["serve", *flags]) == 2
    assert "model_index.json names no scheduler" in capsys.readouterr().err


def test_without_settings_the_model_is_the_starter() -> None:
    assert Path(Settings().model) == STARTER
    assert STARTER.parent.name == "cloud_server"


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    return make_certificate(tmp_path, "DNS:localhost")


async def test_beyond_loopback_tls_and_tokens_let_the_right_caller_in(
    tmp_path: Path, model_folder: Path, certificate: tuple[Path, Path]
) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("acme acme-token-0123456789\n")
    chain, key = map(str, certificate)
    settings = {"listen": "0.0.0.0:0", "tls_cert": chain, "tls_key": key, "tokens": str(tokens)}
    async with serve(tmp_path / "state", model_folder, **settings) as running:
        address = f"localhost:{running.server.port}"
        trusted = grpc.ssl_channel_credentials(certificate[0].read_bytes())
        async with grpc.aio.secure_channel(address, trusted) as channel:
            answer = await Client(channel, (("authorization", "Bearer acme-token-0123456789"),)).generate()
            assert answer.result is not None
            stranger = await Client(channel).generate()
            assert stranger.error is not None
            assert stranger.error.code == "UNAUTHENTICATED"
        clear = await running.client.generate(timeout=5)
        assert clear.error is not None
        assert clear.error.code == "UNAVAILABLE", "nothing is served in clear"
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials()) as channel:
            untrusting = await Client(channel).generate(timeout=5)
            assert untrusting.error is not None
            assert untrusting.error.code == "UNAVAILABLE", "the certificate is what the caller checks"


async def test_a_renewed_certificate_is_shown_to_the_next_caller_and_a_wrong_one_to_none(
    tmp_path: Path, model_folder: Path, certificate: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The server serves on all the while; a pair is of no use until both its files are there."""
    (tmp_path / "new").mkdir()
    chain, key = certificate
    old, (new, new_key) = chain.read_bytes(), make_certificate(tmp_path / "new", "DNS:localhost")
    async with serve(tmp_path / "state", model_folder, tls_cert=str(chain), tls_key=str(key)) as running:

        async def served(trusted: bytes) -> bool:
            channel = grpc.aio.secure_channel(
                f"localhost:{running.server.port}", grpc.ssl_channel_credentials(trusted)
            )
            async with channel:
                return (await Client(channel).generate(timeout=10)).error is None

        renew = running.server._credentials.renew
        assert await served(old)
        shutil.copyfile(new, chain)
        renew()
        assert [record.message for record in caplog.records if "renewed" in record.message] == ["not renewed"]
        assert await served(old)
        shutil.copyfile(new_key, key)
        renew()
        assert await served(new.read_bytes())
        assert not await served(old)
        renew()
        assert [record.message for record in caplog.records if "renewed" in record.message] == [
            "not renewed",
            "renewed",
        ]


async def test_tokens_are_read_again_once_their_file_has_changed(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(credentials, "LOOKS_EVERY_S", 0.05)
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("acme acme-token-0123456789\n")
    async with serve(tmp_path / "state", model_folder, tokens=str(tokens)) as running:

        async def outcome(token: str) -> str:
            metadata = (("authorization", f"Bearer {token}"),)
            answer = await Client(running.client.channel, metadata).generate(request_id="one")
            return answer.error.code if answer.error is not None else "OK"

        def renewals() -> list[str]:
            return [record.message for record in caplog.records if "renewed" in record.message]

        assert await outcome("acme-token-0123456789") == "OK"
        assert await outcome("acme-token-9876543210") == "UNAUTHENTICATED"
        tokens.write_text("acme acme-token-9876543210\nacme short\n")
        await until(lambda: renewals() == ["not renewed"])
        assert await outcome("acme-token-0123456789") == "OK"
        tokens.unlink()
        await until(lambda: renewals() == ["not renewed"] * 2)
        assert await outcome("acme-token-0123456789") == "OK"
        tokens.write_text("acme acme-token-9876543210\n")
        await until(lambda: renewals()[2:] == ["renewed"])
        assert await outcome("acme-token-0123456789") == "UNAUTHENTICATED"
        assert await outcome("acme-token-9876543210") == "OK"


@pytest.mark.usefixtures("ordinary_user")
def test_rights_that_are_put_right_renew_what_could_not_be_read(caplog: pytest.LogCaptureFixture) -> None:
    """As between the two steps of a script that copies a file and gives it away. A failure is logged once."""
    caplog.set_level("INFO")
    folder = short_folder()
    tokens = folder / "tokens"
    tokens.write_text("acme acme-token-0123456789\n")
    known = credentials.Credentials(Settings(tokens=str(tokens)))
    tokens.write_text("acme acme-token-9876543210\n")
    tokens.chmod(0o000)
    known.renew()
    known.renew()
    assert [record.message for record in caplog.records] == ["not renewed"]
    tokens.chmod(0o400)
    known.renew()
    assert [record.message for record in caplog.records] == ["not renewed", "renewed"]
    assert known.tenants.identify("Bearer acme-token-9876543210") == "acme"
    shutil.rmtree(folder)


@pytest.mark.posix
def test_a_pipe_in_the_place_of_the_tokens_holds_up_no_renewal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("acme acme-token-0123456789\n")
    known = credentials.Credentials(Settings(tokens=str(tokens)))
    tokens.unlink()
    os.mkfifo(tokens)
    known.renew()
    assert "no regular file any more" in caplog.records[-1].__dict__["fields"]["error"]
    assert known.tenants.identify("Bearer acme-token-0123456789") == "acme"
    tokens.unlink()
    tokens.write_text("acme acme-token-9876543210\n")
    known.renew()
    assert known.tenants.identify("Bearer acme-token-9876543210") == "acme"


def test_a_line_that_is_commented_out_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("acme acme-token-0123456789\n #alice alice-token-0123456789\n")
    with pytest.raises(Unauthenticated):
        Tenants.load(str(tmp_path / "tokens")).identify("Bearer alice-token-0123456789")


def test_a_token_is_known_however_its_header_is_written(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("acme acme-token-0123456789\n")
    tenants = Tenants.load(str(tmp_path / "tokens"))
    for scheme in ("Bearer ", "bearer ", "BEARER   "):
        assert tenants.identify(f"{scheme}acme-token-0123456789 ") == "acme"
    for header in ("Basic acme-token-0123456789", "Bearer", "", "Bearer t\udcf6ken"):
        with pytest.raises(Unauthenticated):
            tenants.identify(header)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("acme one-token-0123456789\nglobex one-token-0123456789\n", "line 2: .* another tenant"),
        ("acme one-token-0123456789\nglobex 0123456789abcde\n", "line 2: .* at least 16 characters"),
        ("acme one-token-0123456789 too\n", "line 1: expected TENANT TOKEN"),
        ("# acme acme-token-0123456789\n\n", "has no tokens"),
    ],
)
def test_a_tokens_file_that_makes_no_sense_is_refused_with_what_to_do(
    tmp_path: Path, lines: str, says: str
) -> None:
    (tmp_path / "tokens").write_text(lines)
    with pytest.raises(StartRefused, match=says):
        Tenants.load(str(tmp_path / "tokens"))
    (tmp_path / "tokens").write_text("acme one-token-0123456789\n" * 2)
    assert Tenants.load(str(tmp_path / "tokens")).identify("Bearer one-token-0123456789") == "acme"


@pytest.mark.posix
def test_tokens_from_a_pipe_are_read_once(tmp_path: Path) -> None:
    """As in --tokens <(fetch-tokens); whoever opened it again would wait for ever."""
    os.mkfifo(pipe := tmp_path / "tokens")
    writing = threading.Thread(target=pipe.write_text, args=("acme acme-token-0123456789\n",))
    writing.start()
    known = credentials.Credentials(Settings(tokens=str(pipe)))
    writing.join()
    known.renew()
    assert known.tenants.identify("Bearer acme-token-0123456789") == "acme"


async def test_renewing_goes_on_after_an_error_that_nobody_thought_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(credentials, "LOOKS_EVERY_S", 0.02)
    tokens = tmp_path / "tokens"
    tokens.write_text("acme acme-token-0123456789\n")
    known = credentials.Credentials(Settings(tokens=str(tokens)))
    read, attempts = known._renewables["tokens"].read, 0

    def fails_at_first() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise MemoryError
        read()

    known._renewables["tokens"].read = fails_at_first
    tokens.write_text("acme acme-token-9876543210\n")
    renewing = asyncio.create_task(known.keep_current())
    await until(lambda: known.tenants == Tenants.load(str(tokens)))
    renewing.cancel()
    assert attempts == 2
    assert "MemoryError" in caplog.records[0].__dict__["fields"]["error"]


@pytest.mark.parametrize("token", ["tökenAAAAAAAAAAAAAAAA", "token\x07AAAAAAAAAAAAAA"])
def test_a_token_that_no_call_can_bear_is_refused_with_its_line(tmp_path: Path, token: str) -> None:
    (tmp_path / "tokens").write_text(f"acme 0123456789abcdef\nacme {token}\n", encoding="utf-8")
    with pytest.raises(StartRefused, match="line 2: the token has characters that no call can bear"):
        Tenants.load(str(tmp_path / "tokens"))


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("rsa:2048", True),
        ("ec -pkeyopt ec_paramgen_curve:P-384", True),
        ("ec -pkeyopt ec_paramgen_curve:P-521", False),
        ("ed25519", False),
    ],
)
def test_a_key_with_which_no_client_speaks_is_refused(tmp_path: Path, kind: str, taken: bool) -> None:
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    make = f"openssl req -x509 -newkey {kind} -nodes -days 1 -subj /CN=localhost -keyout {key} -out {chain}"
    subprocess.run(make.split(), check=True, capture_output=True)
    settings = Settings(tls_cert=str(chain), tls_key=str(key))
    with (
        nullcontext() if taken else pytest.raises(StartRefused, match="make one of RSA's, or of the elliptic")
    ):
        credentials.Credentials(settings)


@pytest.mark.parametrize("form", ["pkcs8 -topk8", "ec -aes256"])
def test_an_encrypted_key_is_refused_without_asking_for_its_passphrase(
    form: str, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    chain, key = certificate
    locked = tmp_path / "locked.pem"
    encrypt = f"openssl {form} -in {key} -out {locked} -passout pass:secret"
    subprocess.run(encrypt.split(), check=True, capture_output=True)
    command = [
        sys.executable,
        "-m",
        "cloud_server",
        "serve",
        "--tls-cert",
        str(chain),
        "--tls-key",
        str(locked),
    ]
    # In a session without a terminal OpenSSL asks on standard error.
    refused = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True, timeout=60
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"cloud-server: --tls-key {locked} is encrypted; decrypt it first")


def test_beyond_loopback_tls_alone_is_not_enough(
    certificate: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    chain, key = map(str, certificate)
    assert main(["serve", "--listen", "0.0.0.0:0", "--tls-cert", chain, "--tls-key", key]) == 2
    assert "--tokens" in capsys.readouterr().err
