"""The models come and go, and no request notices: unloaded when idle, loaded on demand, swapped, cancelled anywhere."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from edge_agent import graph_files, loader, memory
from edge_agent.bundle import Bundle, put_file, write_manifest
from edge_agent.device import Device
from edge_agent.diffusion import sessions
from edge_agent.diffusion.decoder import Decoder
from edge_agent.diffusion.generator import Generator, Image
from edge_agent.diffusion.sessions import Runtime, Session, Stop
from edge_agent.errors import BundleError, Cancelled
from edge_agent.manifest import CALIBRATION, DECODER, DENOISER
from edge_agent.reader import Reader
from edge_agent.resident import Resident
from edge_agent.settings import STARTER, Settings
from edge_agent.store import Store
from routet2i.edge.v1 import edge_pb2
from tests.external import move_weights
from tests.routed import SLOW_STEPS
from tests.running import (
    LOCAL,
    Answer,
    Here,
    as_shown,
    daemon_here,
    process_environment,
    short_folder,
    until,
)

CYCLES = int(os.environ.get("ROUTET2I_CYCLES", "12"))
"""Unloads in the memory test. 200 take some minutes."""

CANCELLATIONS = int(os.environ.get("ROUTET2I_CANCELLATIONS", "100"))
"""Cancellations in their test. 1,000 take some minutes."""

LONG_S = 1800
"""For the long variants; no test waits for it."""

IDLE_BYTES = 120e6

# What a bundle costs while nobody uses it, in a process that only serves: the RSS after each unload, in bytes.
CYCLING = """
import json, sys
from pathlib import Path
from edge_agent import memory
memory.share_one_heap()
from edge_agent.loader import load
from edge_agent.settings import resolve

models = load(resolve({}, {}))
facts = models.reader.bundle.manifest
found = []
for _ in range(int(sys.argv[1])):
    states = models.reader.read("two dogs on a beach").states
    nothing = models.generator.encode_negative("")
    *_, image = models.generator.generate(states, nothing, 1, facts.default_steps, facts.default_guidance)
    models.unload()
    found.append(int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory, routed_bundle: Path) -> Path:
    """The routed bundle with another default guidance: another model, by its digest. Only to be read."""
    folder = Path(shutil.copytree(routed_bundle, tmp_path_factory.mktemp("other") / "bundle"))
    write_manifest(folder, default_guidance=3.0)
    return folder


@pytest.fixture
def store(tmp_path: Path, routed_bundle: Path, other_bundle: Path) -> Store:
    """With both bundles, the routed one chosen until a test chooses another."""
    store = Store(tmp_path / "models", STARTER)
    for name, bundle in (("routed", routed_bundle), ("other", other_bundle)):
        shutil.copytree(bundle, store.folder / name)
    store.choose("routed")
    return store


@pytest_asyncio.fixture
async def here(store: Store, tmp_path: Path) -> AsyncIterator[Here]:
    async with daemon_here("", tmp_path / "state", models=store.folder) as here:
        yield here


@pytest.fixture
def folder() -> Iterator[Path]:
    made = short_folder()
    yield made
    shutil.rmtree(made)


async def reload(here: Here, model: str = "") -> edge_pb2.ReloadModelResponse:
    response: edge_pb2.ReloadModelResponse = await here.app.stub.ReloadModel(
        edge_pb2.ReloadModelRequest(model=model), timeout=60
    )
    return response


def rss() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


# Put down and taken up again


async def test_idle_models_are_unloaded_and_the_next_request_has_them_loaded_again(
    routed_bundle: Path, tmp_path: Path
) -> None:
    async with daemon_here(routed_bundle, tmp_path, keep_alive_s=0.2) as here:
        first = await here.app.generate(seed=7)
        loaded = await here.app.status()
        await until(lambda: not here.daemon.agent.models.loaded)  # type: ignore[union-attr]
        idle = await here.app.status()  # asks, and loads nothing
        assert (loaded.loaded, idle.loaded) == (True, False)
        assert idle.loaded_since > loaded.loaded_since > 1e9
        assert idle.keep_alive_seconds == 0.2
        again = await here.app.generate(seed=7)
        assert again.png == first.png
        assert (await here.app.status()).loaded_since > idle.loaded_since


async def test_models_that_nobody_has_asked_for_are_unloaded_too(store: Store, tmp_path: Path) -> None:
    """Those of the start, and those of a reload."""
    async with daemon_here("", tmp_path / "state", models=store.folder, keep_alive_s=0.05) as here:
        for _ in range(2):
            assert here.daemon.agent is not None
            models = here.daemon.agent.models
            await until(lambda models=models: not models.loaded)
            await reload(here, "other")
        assert here.daemon.agent.models is not models


async def test_a_request_that_begins_as_the_time_is_over_keeps_the_models(here: Here) -> None:
    """Between the timer and the thread that unloads them."""
    assert here.daemon.agent is not None
    models, loop = here.daemon.agent.models, asyncio.get_running_loop()
    await here.app.generate()
    await here.restless()
    go_on = threading.Event()
    one = ThreadPoolExecutor(1)
    loop.set_default_executor(one)
    busy = loop.run_in_executor(None, go_on.wait, 60)
    models.keep_alive_s = 0.01
    models.rest()
    await asyncio.sleep(0.1)  # the timer has fired, and its work waits for the thread
    with models:
        go_on.set()
        await busy
        await asyncio.to_thread(lambda: None)  # after it
        assert models.loaded
    await until(lambda: not models.loaded)


async def test_a_decision_that_begins_while_models_are_unloaded_holds_nobody_up(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have to load a graph that was there a moment ago: not in the event loop, where it else is quick."""
    assert here.daemon.agent is not None
    models, loop = here.daemon.agent.models, asyncio.get_running_loop()
    threads: list[str] = []
    read = models.reader.read

    def seen(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(*arguments)

    monkeypatch.setattr(models.reader, "read", seen)
    for _ in range(2):  # the second knows that reading is quick
        await here.app.route()
    go_on = threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(1))
    busy = loop.run_in_executor(None, go_on.wait, 60)
    models.keep_alive_s = 0.01
    models.rest()
    await asyncio.sleep(0.1)
    await here.app.route()
    go_on.set()
    await busy
    loop_name = threading.current_thread().name
    assert threads[1] == loop_name and threads[2].startswith("reading")


async def test_a_decision_loads_no_more_than_it_reads(routed_bundle: Path, tmp_path: Path) -> None:
    async with daemon_here(routed_bundle, tmp_path) as here:
        models = here.daemon.agent.models  # type: ignore[union-attr]
        models.unload()
        await here.app.route()
        assert all(session.loaded_at for session in models.reader.sessions)
        assert models.generator.denoiser.session.loaded_at is None


async def test_no_request_is_dropped_while_the_models_come_and_go(
    routed_bundle: Path, tmp_path: Path
) -> None:
    async with daemon_here(routed_bundle, tmp_path) as here:
        models = here.daemon.agent.models  # type: ignore[union-attr]
        expected = (await here.app.generate(seed=3)).png
        over = asyncio.Event()
        times = 0

        async def disturb() -> None:
            nonlocal times
            while not over.is_set():
                await asyncio.to_thread(models.unload)
                times += 1
                await asyncio.sleep(0.05)

        disturbing = asyncio.create_task(disturb())
        while times < 3:
            answers = await asyncio.gather(*(here.app.generate(seed=3) for _ in range(3)))
            assert {answer.code for answer in answers} == {"OK"}
            assert {answer.png for answer in answers} == {expected}
            await here.app.route()
        over.set()
        await disturbing


async def test_the_empty_negative_prompt_is_read_once_for_each_bundle(here: Here, store: Store) -> None:
    """Its states outlive the graphs, and do not pass over to other models."""
    agent = here.daemon.agent
    assert agent is not None
    await here.app.generate()
    kept = agent._nothing_negative
    assert kept is not None
    await asyncio.to_thread(agent.models.unload)
    await here.app.generate()
    assert agent._nothing_negative is kept
    store.choose("other")
    await reload(here)
    assert here.daemon.agent._nothing_negative is None
    await here.app.generate()
    assert here.daemon.agent._nothing_negative is not kept


async def test_what_an_image_takes_is_measured_anew_for_other_models(here: Here, store: Store) -> None:
    agent = here.daemon.agent
    assert agent is not None
    guess = agent.device.expected_s((64, 64), 4)
    await here.app.generate()
    assert agent.device.expected_s((64, 64), 4) != guess
    store.choose("other")
    await reload(here)
    assert agent.device.expected_s((64, 64), 4) == guess


async def test_zero_keeps_them_for_good(routed_bundle: Path, tmp_path: Path) -> None:
    async with daemon_here(routed_bundle, tmp_path, keep_alive_s=0) as here:
        await here.app.generate()
        assert here.daemon.agent.models._timer is None  # type: ignore[union-attr]
        assert (await here.app.status()).keep_alive_seconds == 0


def alter(file: Path) -> None:
    """Other bytes, as many as there were."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_files_that_changed_meanwhile_are_not_loaded(bundle_copy: Path) -> None:
    """The bundle's hashes were checked when it was opened; other bytes must not slip in later."""
    path = bundle_copy / DECODER
    session = Session(path, ["latent_sample"], ["sample"], Runtime(threads=1))
    session.unload()
    path.write_bytes(path.read_bytes())
    with pytest.raises(BundleError, match=f"{as_shown(DECODER)} has changed since"):
        session.run({"latent_sample": [[[[0.0]]]]})  # type: ignore[dict-item]
    path.unlink()
    with pytest.raises(BundleError, match=f"{as_shown(DECODER)} is gone: put it back"):
        session.run({"latent_sample": [[[[0.0]]]]})  # type: ignore[dict-item]


def test_files_that_were_replaced_by_their_own_bytes_are_loaded_again(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a copy does, and file systems that number a file anew once memory was short. Gigabytes are read once."""
    sha256, read = graph_files.sha256_of, []
    monkeypatch.setattr(graph_files, "sha256_of", lambda path: read.append(path) or sha256(path))
    decoder = Decoder(Bundle.open(bundle_copy), Runtime(threads=1))
    session, latents = decoder.session, np.zeros((1, 4, 8, 8), np.float32)
    before = decoder.decode(latents)
    content = (bundle_copy / DECODER).read_bytes()
    for _ in range(2):
        session.unload()
        (bundle_copy / "another").write_bytes(content)
        os.replace(bundle_copy / "another", bundle_copy / DECODER)
        read.clear()
        for _ in range(2):
            assert np.array_equal(decoder.decode(latents), before) and not session.fault
            session.unload()
        assert read == [bundle_copy / DECODER]
    alter(bundle_copy / DECODER)
    read.clear()
    for _ in range(2):
        with pytest.raises(BundleError, match="has changed since"):
            decoder.decode(latents)
    assert session.fault and read == [bundle_copy / DECODER]
    (bundle_copy / DECODER).write_bytes(content)
    assert np.array_equal(decoder.decode(latents), before) and not session.fault


def test_only_the_graph_and_its_weights_have_to_stay_as_they_were(bundle_copy: Path) -> None:
    """A desktop's leavings, and what else comes to lie beside them, are not onnxruntime's to read."""
    weights = bundle_copy / "vae_decoder" / "weights.bin"
    move_weights(bundle_copy / DECODER, weights, weights.name)
    write_manifest(bundle_copy)
    decoder = Decoder(Bundle.open(bundle_copy), Runtime(threads=1))
    session = decoder.session
    latents = np.zeros((1, 4, 8, 8), np.float32)
    for name in (".DS_Store", "model.onnx~", "config.json"):
        session.unload()
        (bundle_copy / "vae_decoder" / name).write_bytes(b"x")
        decoder.decode(latents)
    session.unload()
    alter(weights)
    with pytest.raises(BundleError, match=f"{as_shown(DECODER)} has changed since"):
        decoder.decode(latents)


def test_a_new_calibration_does_not_keep_the_predictor_from_being_loaded_again(tmp_path: Path) -> None:
    """`edge-export calibrate` puts one into the bundle that is served."""
    folder = Path(shutil.copytree(STARTER, tmp_path / "bundle"))
    reader = Reader.open(Bundle.open(folder), 0.5, Runtime(threads=1))
    before = reader.read("a red apple").prs
    made = folder / "made"
    made.write_bytes((folder / CALIBRATION).read_bytes())
    put_file(folder, CALIBRATION, made)
    for session in reader.sessions:
        session.unload()
    assert reader.read("a red apple").prs == before


def test_files_that_changed_before_the_first_load_or_the_warm_up_are_not_loaded(bundle_copy: Path) -> None:
    """What counts is what they were when the bundle was checked."""
    bundle = Bundle.open(bundle_copy)
    generator = Generator(bundle, Runtime(threads=1))
    alter(bundle_copy / DECODER)
    for load in (
        lambda: Decoder(bundle, Runtime()),
        lambda: generator.on(Runtime(threads=1), Runtime(threads=1)),
    ):
        with pytest.raises(BundleError, match=f"{as_shown(DECODER)} has changed since"):
            load()


async def test_an_image_of_a_file_that_changed_meanwhile_is_no_refusal_by_policy(
    bundle_copy: Path, tmp_path: Path
) -> None:
    async with daemon_here(bundle_copy, tmp_path) as here:
        here.daemon.agent.models.unload()  # type: ignore[union-attr]
        alter(bundle_copy / DECODER)
        answer = await here.app.generate()
        assert (answer.code, "restart edge-agent" in answer.message) == ("DATA_LOSS", True)


@pytest.mark.parametrize("bring", [shutil.move, shutil.copytree])
async def test_a_bundle_that_was_moved_away_is_a_problem_in_the_status_until_it_is_back(
    bundle_copy: Path, tmp_path: Path, bring: Callable[[Path, Path], Any]
) -> None:
    """Whichever way it comes back: a copy's files are others, of the same bytes."""
    async with daemon_here(bundle_copy, tmp_path / "state") as here:
        before = (await here.app.status()).advice
        here.daemon.agent.models.unload()  # type: ignore[union-attr]
        shutil.move(bundle_copy, tmp_path / "away")
        answer = await here.app.generate()
        told = "is gone: put it back, or choose another model"
        assert (answer.code, told in answer.message) == ("DATA_LOSS", True)
        assert any(told in each for each in (await here.app.status()).advice)
        bring(tmp_path / "away", bundle_copy)
        assert (await here.app.status()).advice == before
        assert (await here.app.generate()).code == "OK"


@pytest.mark.timeout(LONG_S)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process holds on Linux only")
def test_idle_memory_stays_small_and_the_same(folder: Path) -> None:
    """On the starter, in a process of its own. ROUTET2I_CYCLES=200 is the long variant."""
    command = [sys.executable, "-c", CYCLING, str(CYCLES)]
    done = subprocess.run(
        command, env=process_environment(folder), capture_output=True, text=True, check=True, timeout=LONG_S
    )
    found = json.loads(done.stdout)
    assert max(found) <= IDLE_BYTES
    assert found[-1] - found[2] < 3e6  # the first ones settle


# Another bundle


async def test_a_new_bundle_is_taken_up_while_requests_run(here: Here, store: Store) -> None:
    """Those that began before end on the old models, which go then; those that come after get the new."""
    old, new = (Bundle.open(path, verify=False).model_digest for path in map(store.path, ("routed", "other")))
    agent = here.daemon.agent
    assert agent is not None
    slow = here.app.call(steps=SLOW_STEPS, seed=1)
    begun = await here.app.read(slow, until="progress")
    assert begun.decision is not None
    waiting = [asyncio.create_task(here.app.generate(seed=seed)) for seed in range(4)]
    await until(lambda: agent.device.images == 5)

    store.choose("other")
    answered = await reload(here)
    assert answered.edge_model_digest == new
    assert Path(answered.bundle) == store.path("other")
    assert (await here.app.status()).predecessors == [str(store.path("routed"))]
    after = asyncio.create_task(here.app.generate(seed=9))
    rest = await here.app.read(slow)
    before = await asyncio.gather(*waiting)
    assert rest.result is not None
    assert rest.result.edge_model_digest == begun.decision.edge_model_digest == old
    assert rest.result.image.model_digest == old
    for answer in before:
        assert answer.code == "OK"
        assert answer.result is not None
        assert answer.result.image.model_digest == old
    latest = await after
    assert latest.result is not None
    assert latest.result.image.model_digest == latest.result.edge_model_digest == new
    assert latest.result.image.guidance_scale == 3.0
    await until(lambda: not any(session.loaded_at for session in agent.models.generator.sessions))
    status = await here.app.status()
    assert (status.served_by_edge, status.predecessors) == (6, [])


async def test_the_status_names_all_models_that_are_still_used(here: Here, store: Store) -> None:
    """Also those whose successors have been succeeded in turn: none of their folders may go."""
    assert here.daemon.agent is not None
    over, calls = threading.Event(), []
    here.daemon.agent.device._worker.submit(over.wait, 60)  # as with an image that takes long
    for name in ("other", "routed"):
        calls.append(here.app.call())
        await here.app.read(calls[-1], until="decision")
        await reload(here, name)
    used = sorted(str(store.path(name)) for name in ("routed", "other"))
    assert list((await here.app.status()).predecessors) == used
    over.set()
    assert [(await here.app.read(call)).code for call in calls] == ["OK"] * 2
    await here.restless()
    assert not (await here.app.status()).predecessors


async def test_models_without_room_are_refused_and_what_was_loaded_of_them_goes_at_once(
    here: Here, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error, which the caller's call still holds, would keep the graphs before the one that has no room."""
    loaded, left = [], []
    made = sessions.Session.__init__

    def init(session: Session, path: Path, *rest: Any) -> None:
        if path.parent.name == Path(DECODER).parent.name:  # the last
            left[:] = [graph for graph in loaded if graph() is not None]
            monkeypatch.setattr(memory, "available_bytes", lambda: 0)
            monkeypatch.setattr(sessions, "LARGE_BYTES", 0)
        made(session, path, *rest)
        loaded.append(weakref.ref(session))

    given_back: list[int] = []
    monkeypatch.setattr(sessions.Session, "__init__", init)
    monkeypatch.setattr(
        memory, "give_back", lambda: given_back.append(sum(graph() is not None for graph in loaded))
    )
    store.choose("other")
    with pytest.raises(grpc.aio.AioRpcError, match="0 MB can be had") as refused:
        await reload(here)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert left and given_back == [0]
    monkeypatch.undo()
    assert (await here.app.generate()).code == "OK"


async def test_a_model_is_served_by_its_name_whatever_is_chosen(
    here: Here, store: Store, routed_bundle: Path, tmp_path: Path
) -> None:
    assert Path((await here.app.status()).models_folder) == store.folder
    assert Path((await reload(here, "other")).bundle) == store.path("other")
    assert store.current == "routed"
    with pytest.raises(grpc.aio.AioRpcError, match="there is no model 'none'") as refused:
        await reload(here, "none")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert Path((await here.app.status()).bundle) == store.path("other")
    async with daemon_here(routed_bundle, tmp_path / "own", models=store.folder) as own:
        assert not (await own.app.status()).models_folder
        with pytest.raises(
            grpc.aio.AioRpcError, match="serves the --bundle that it was started with"
        ) as refused:
            await reload(own, "other")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_models_folder_that_hangs_takes_no_more_than_one_thread(
    here: Here, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Money is set aside, settled and released in the others."""
    found, goes_on = os.path.realpath, threading.Event()

    def realpath(path: Any, **more: Any) -> Any:
        if path == store.folder:
            assert goes_on.wait(60)
        return found(path, **more)

    monkeypatch.setattr(os.path, "realpath", realpath)
    asked = [asyncio.create_task(here.app.status()) for _ in range(64)]
    try:
        await asyncio.sleep(0.2)  # they have come so far
        assert await here.app.stub.GetQuota(edge_pb2.GetQuotaRequest(), timeout=10)
    finally:
        goes_on.set()
    assert {Path((await status).models_folder) for status in asked} == {store.folder}


@pytest.mark.parametrize("stays", [False, True])
async def test_what_is_refused_is_in_the_log_where_its_caller_has_gone(
    here: Here, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stays: bool
) -> None:
    """He who stays is told, and the log's line of his call says so."""
    caplog.set_level(logging.INFO, "edge_agent")
    load, go_on = loader.load, threading.Event()

    def slow(settings: Settings, taken: Collection[str], model: str) -> Resident:
        assert go_on.wait(60)
        return load(settings, taken, model)

    monkeypatch.setattr(loader, "load", slow)
    (store.path("other") / DENOISER).write_bytes(b"damaged")
    asking = here.app.stub.ReloadModel(edge_pb2.ReloadModelRequest(model="other"), timeout=60)
    await until(lambda: here.daemon._reloading.locked())
    if not stays:
        asking.cancel()
        await until(lambda: any(record.message == "call" for record in caplog.records))
    go_on.set()
    await until(lambda: not here.daemon._tasks)
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await asking
    refused = [record for record in caplog.records if record.message == "model refused"]
    assert len(refused) == (0 if stays else 1)
    assert all(str(Path(DENOISER)) in record.__dict__["fields"]["error"] for record in refused)


async def test_a_model_that_is_removed_while_it_is_loaded_is_not_served(
    here: Here, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by somebody else, after who asked for it has gone away."""

    def removed_meanwhile(*arguments: Any) -> Reader:
        found = Reader(*arguments)
        store.remove("other")
        return found

    monkeypatch.setattr(loader, "Reader", removed_meanwhile)
    with pytest.raises(grpc.aio.AioRpcError, match="was removed while it was loaded"):
        await reload(here, "other")
    assert (await here.app.generate()).code == "OK"


async def test_a_reload_whose_caller_goes_away_is_finished_all_the_same(here: Here, store: Store) -> None:
    """Else the models that were loaded would be nobody's to serve or to unload."""
    old = here.daemon.agent
    assert old is not None
    store.choose("other")
    leaving = here.app.stub.ReloadModel(edge_pb2.ReloadModelRequest(), timeout=60)
    await until(lambda: here.daemon._reloading.locked())
    leaving.cancel()
    await until(lambda: here.daemon.agent is not old)
    assert Path((await here.app.status()).bundle) == store.path("other")
    await until(lambda: not old.models.loaded)
    assert here.daemon._tasks == set()


async def test_a_reload_that_waits_for_another_is_not_begun_once_its_caller_has_gone(
    here: Here, caplog: pytest.LogCaptureFixture
) -> None:
    """Else callers in a hurry would have the models loaded once for each of them."""
    caplog.set_level(logging.INFO, "edge_agent")
    async with here.daemon._reloading:
        calls = [here.app.stub.ReloadModel(edge_pb2.ReloadModelRequest(), timeout=0.2) for _ in range(9)]
        await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: caplog.messages.count("call") == len(calls))
    await reload(here)
    assert caplog.messages.count("serving") == 1


@pytest.mark.posix
async def test_what_a_link_led_to_is_served_until_a_reload(
    routed_bundle: Path, store: Store, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(routed_bundle)
    async with daemon_here(link, tmp_path / "state") as here:
        link.unlink()
        link.symlink_to(store.path("other"))
        assert Path((await here.app.status()).bundle) == routed_bundle
        assert Path((await reload(here)).bundle) == store.path("other")


async def test_a_shutdown_does_not_wait_for_a_reload(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, go_on = loader.load, threading.Event()

    def slow(settings: Settings, taken: Collection[str], model: str) -> Resident:
        assert go_on.wait(60)
        return load(settings, taken, model)

    async with daemon_here(routed_bundle, tmp_path) as here:
        monkeypatch.setattr(loader, "load", slow)
        reloading = asyncio.create_task(reload(here))
        await until(lambda: here.daemon._reloading.locked())
        here.daemon.stop()
        here.daemon.stop()  # the reload's caller waits, too
        await asyncio.wait_for(here.daemon.shutdown(), 30)
        assert here.daemon.still_working
        go_on.set()
        await until(lambda: not here.daemon.still_working)
    assert here.daemon._tasks == set()
    assert not here.daemon._reloading.locked()
    assert isinstance((await asyncio.gather(reloading, return_exceptions=True))[0], BaseException)


async def test_a_reload_is_told_what_the_models_that_serve_run_on(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be about to go: what they fill is not passed over for want of room."""
    load, told = loader.load, list[Collection[str]]()

    def noted(settings: Settings, taken: Collection[str], model: str) -> Resident:
        told.append(taken)
        return load(settings, taken, model)

    monkeypatch.setattr(loader, "load", noted)
    await reload(here)
    assert told == [{"cpu"}]


@pytest.mark.parametrize("ends", [True, False])
async def test_a_shutdown_waits_for_an_operator_to_end_and_not_for_ever(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    begun, over, close = threading.Event(), threading.Event(), Device.close

    def generate(*_: object, stop: Stop, **__: object) -> Iterator[Image]:
        begun.set()
        try:
            while ends and not over.wait(0.01):
                stop.check()
        except Cancelled:
            time.sleep(0.3)  # as an operator takes that has begun
            raise
        assert over.wait(60)
        yield from ()

    async with daemon_here(routed_bundle, tmp_path) as here:
        agent = here.daemon.agent
        assert agent is not None
        monkeypatch.setattr(Device, "close", lambda device: close(device, 30.0 if ends else 0.05))
        monkeypatch.setattr(agent.models.generator, "generate", generate)
        call = here.app.call()
        assert await asyncio.to_thread(begun.wait, 60)
        here.daemon.stop()
        here.daemon.stop()
        await asyncio.wait_for(here.daemon.shutdown(), 60)
        assert here.daemon.still_working is not ends
        over.set()
        await until(lambda: not here.daemon.still_working)
        assert (await here.app.read(call)).code == "UNAVAILABLE"


async def test_models_that_others_have_succeeded_are_let_go(here: Here, store: Store) -> None:
    """The first ones, too, that the daemon began with."""
    assert here.daemon.agent is not None
    models = weakref.ref(here.daemon.agent.models)
    await here.app.generate()
    store.choose("other")
    await reload(here)

    def gone() -> bool:
        gc.collect()
        return models() is None

    await until(gone)


async def test_streams_without_end_see_no_gap_while_bundles_change(here: Here, store: Store) -> None:
    over = asyncio.Event()

    async def ask(seed: int) -> list[Answer]:
        answers = []
        while not over.is_set():
            answers.append(await here.app.generate(seed=seed, routing=LOCAL))
        return answers

    asking = [asyncio.create_task(ask(seed)) for seed in range(3)]
    for name in ("other", "routed", "other"):
        store.choose(name)
        await reload(here)
        served = (await here.app.status()).served_by_edge
        await until(lambda served=served: here.daemon.agent.tally.served["edge"] > served + 3)  # type: ignore
    over.set()
    answers = [answer for found in await asyncio.gather(*asking) for answer in found]
    assert {answer.code for answer in answers} == {"OK"}
    made = {
        (answer.result.image.seed, answer.result.image.model_digest, answer.png)
        for answer in answers
        if answer.result
    }
    assert len(made) == 6  # each seed on each model, and always the same


async def test_a_corrupt_bundle_is_refused_by_its_file_and_the_old_one_goes_on(
    here: Here, store: Store
) -> None:
    expected = (await here.app.generate(seed=5)).png
    damaged = store.path("other") / DENOISER
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    store.choose("other")
    with pytest.raises(
        grpc.aio.AioRpcError, match=f"{as_shown(DENOISER)} does not match its sha256"
    ) as refused:
        await reload(here)
    assert refused.value.code() is grpc.StatusCode.DATA_LOSS
    status = await here.app.status()
    assert Path(status.bundle) == store.path("routed")
    assert status.loaded
    assert (await here.app.generate(seed=5)).png == expected


# Cancelled anywhere


@pytest.mark.timeout(LONG_S)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process holds on Linux only")
async def test_cancelled_anywhere_the_next_image_is_the_same_and_no_memory_stays(
    routed_bundle: Path, tmp_path: Path
) -> None:
    """At random moments: while it waits, loads, reads, denoises, decodes or sends.

    ROUTET2I_CANCELLATIONS=1000 is the long variant; `deploy/bench --only cancellation` measures how long it takes.
    """
    draw = random.Random(0)
    async with daemon_here(routed_bundle, tmp_path) as here:
        agent = here.daemon.agent
        assert agent is not None
        began = asyncio.get_running_loop().time()
        expected = (await here.app.generate(seed=11, preview=True)).png
        whole_s = asyncio.get_running_loop().time() - began
        settled = 0
        for number in range(CANCELLATIONS):
            if number % 10 == 0:
                await asyncio.to_thread(agent.models.unload)
            call = here.app.call(seed=number, preview=True)
            reading = asyncio.create_task(here.app.read(call))
            await asyncio.sleep(draw.uniform(0, 1.2 * whole_s))
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if number % 20 == 19:
                assert (await here.app.generate(seed=11, preview=True)).png == expected
            if number == CANCELLATIONS // 3:
                await here.restless()
                await asyncio.to_thread(agent.models.unload)
                settled = rss()
        await here.restless()
        await asyncio.to_thread(agent.models.unload)
        grown = rss() - settled
        assert grown < 12e6, f"{grown / 1e6:.1f} MB more after {CANCELLATIONS} cancellations"
        assert (await here.app.generate(seed=11, preview=True)).png == expected
        assert (await here.app.status()).queue_length == 0
