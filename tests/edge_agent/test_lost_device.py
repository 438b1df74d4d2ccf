"""A device that is lost to the process, as a GPU that fell off the bus, costs the images under way and no later ones.

Here it is onnxruntime's second provider in its CPU build, whose sessions fail from some moment on as CUDA's do.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edge_agent import loader
from edge_agent.client import UNREACHABLE
from edge_agent.diffusion import plugins, providers
from edge_agent.resident import Resident
from edge_agent.settings import Settings, resolve
from tests.running import LOCAL, ROOT, Here, Process, daemon_here, process_environment, until

NAME = "azure"
SAID = "CUDA failure 700: an illegal memory access was encountered ; GPU=0"


class Device:
    """What becomes of it."""

    lost = False
    falters = False  # once
    said = SAID


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device, run = Device(), ort.InferenceSession.run

    def runs(session: ort.InferenceSession, *how: Any) -> Any:
        if "AzureExecutionProvider" in session.get_providers() and (device.lost or device.falters):
            device.falters = False
            raise RuntimeError(device.said)
        return run(session, *how)

    monkeypatch.setattr(plugins._Session, "run", runs)
    monkeypatch.setattr(providers, "PREFERENCE", (NAME, providers.CPU))
    monkeypatch.setattr(providers, "QUICK_TO_OPEN", {NAME, providers.CPU})
    return device


async def fails(here: Here) -> None:
    assert (await here.app.generate(routing=LOCAL)).code == "INTERNAL"


async def test_the_next_best_provider_makes_the_images_after_one_was_lost(
    routed_bundle: Path, tmp_path: Path, device: Device
) -> None:
    async with daemon_here(routed_bundle, tmp_path / "state") as here:
        before = await here.app.generate(routing=LOCAL, seed=5)
        assert (await here.app.status()).providers[0].name == NAME
        device.lost = True
        await fails(here)

        async def on_cpu() -> bool:
            return bool((await here.app.status()).providers[0].name == "cpu")

        await until(on_cpu)
        after = await here.app.generate(routing=LOCAL, seed=5)
        difference = np.asarray(after.picture, int) - np.asarray(before.picture, int)
        assert np.abs(difference).max() <= 1  # the CPU's graph rounds otherwise
        (passed_over,) = (each for each in (await here.app.status()).providers if each.name == NAME)
        assert passed_over.reason == SAID


FAILING = f"""
import onnxruntime
from pathlib import Path
from edge_agent.diffusion import providers

providers.QUICK_TO_OPEN = {{"{NAME}", "cpu"}}
run = onnxruntime.InferenceSession.run

def runs(session, *how):
    if Path("lost").exists() and "AzureExecutionProvider" in session.get_providers():
        raise RuntimeError("{SAID}")
    return run(session, *how)

onnxruntime.InferenceSession.run = runs
"""


def test_a_daemon_that_may_use_nothing_else_ends_so_that_it_is_started_again(
    routed_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAILING)
    path = os.pathsep.join(map(str, (tmp_path / "site", ROOT, ROOT / "protos")))
    daemon = Process(
        "edge_agent", tmp_path, "--bundle", routed_bundle, "--providers", f"{NAME},cpu", PYTHONPATH=path
    )
    try:
        daemon.wait_for("serving")
        (tmp_path / "lost").touch()
        command = [sys.executable, "-m", "edge_agent", "generate", "a cat", "--local", "-o", "a.png"]
        subprocess.run(command, cwd=tmp_path, env=process_environment(tmp_path), check=False)
        assert daemon.popen.wait(60) == UNREACHABLE
        assert f"{NAME} no longer works in this process: {SAID}; start edge-agent again" in daemon.text
        assert not (tmp_path / "a.png").exists()
        assert "names azure" in daemon.wait_for("model refused")["error"]
    finally:
        daemon.end()


async def test_an_image_that_fails_where_the_device_works_changes_nothing(
    routed_bundle: Path, tmp_path: Path, device: Device
) -> None:
    async with daemon_here(routed_bundle, tmp_path / "state") as here:
        assert here.daemon.agent is not None
        models = here.daemon.agent.models
        device.falters = True
        await fails(here)
        assert (await here.app.generate(routing=LOCAL)).result is not None
        assert here.daemon._doubts is not None
        await here.daemon._doubts
        assert here.daemon.agent.models is models and not device.falters
        here.daemon._doubt()
        looking = here.daemon._doubts
        here.daemon._doubt()  # as where several calls fail at once
        assert here.daemon._doubts is looking
        await looking


async def test_a_device_that_has_no_memory_just_now_is_not_lost(
    routed_bundle: Path, tmp_path: Path, device: Device
) -> None:
    device.said = "CUDA failure 2: out of memory ; GPU=0"
    async with daemon_here(routed_bundle, tmp_path / "state", providers=f"{NAME},cpu") as here:
        device.lost = True
        here.daemon._doubt()
        assert here.daemon._doubts is not None
        await here.daemon._doubts
        assert here.daemon.lost is None
        device.lost = False


async def test_the_models_that_serve_stay_and_are_taken_up_once(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    """Another may have been chosen, or be on its way, when the device is lost."""
    models = tmp_path / "models"
    shutil.copytree(routed_bundle, models / "served")
    async with daemon_here("", tmp_path / "state", models=models) as here:
        await here.daemon.reload("served")
        device.lost = True
        await fails(here)
        assert here.daemon._doubts is not None
        await here.daemon._doubts
        assert here.daemon.agent is not None and here.daemon.agent.reader.bundle.folder.name == "served"
        assert here.daemon.agent.models.providers[0].name == "cpu"

    device.lost, loaded, load, failed = False, list[str](), loader.load, threading.Event()

    def slowly(settings: Settings, taken: Collection[str] = (), model: str = "") -> Resident:
        loaded.append(model)
        assert failed.wait(60)
        return load(settings, taken, model)

    async with daemon_here(routed_bundle, tmp_path / "other") as here:
        monkeypatch.setattr(loader, "load", slowly)
        device.lost = True
        reload = asyncio.create_task(here.daemon.reload())
        await until(lambda: loaded)
        await fails(here)
        failed.set()
        await reload
        assert here.daemon._doubts is not None
        await here.daemon._doubts
        assert len(loaded) == 1


async def test_a_loss_while_the_daemon_drains_cuts_nothing_short(
    routed_bundle: Path, tmp_path: Path, device: Device
) -> None:
    async with daemon_here(routed_bundle, tmp_path / "state", providers=f"{NAME},cpu") as here:
        here.daemon.stop()
        device.lost = True
        here.daemon._doubt()
        assert here.daemon._doubts is not None
        await here.daemon._doubts
        assert not here.daemon._hurry.is_set() and here.daemon.lost is None


async def test_a_shutdown_does_not_wait_for_a_device_that_does_not_answer(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def probe(_name: str) -> str:
        begun.set()
        assert go_on.wait(60)
        return ""

    async with daemon_here(routed_bundle, tmp_path / "state") as here:
        monkeypatch.setattr(providers, "probe", probe)
        here.daemon._doubt()
        assert await asyncio.to_thread(begun.wait, 60)
        here.daemon.stop()
        await asyncio.wait_for(here.daemon.shutdown(), 30)
        assert here.daemon.still_working, "the command leaves without the thread"
        go_on.set()
        await until(lambda: not here.daemon.still_working)


def test_a_gpu_that_was_passed_over_is_given_back_before_the_next_is_filled(
    routed_bundle: Path, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    opened, alive, session = list[Any](), list[int](), plugins.session

    def noted(model: Any, options: Any, on: Any, **more: Any) -> ort.InferenceSession:
        made = session(model, options, on, **more)
        if not isinstance(model, bytes):  # it is no probe
            alive.append(sum(each() is not None for each in opened))
            opened.append(weakref.ref(made))
        return made

    def run(session: ort.InferenceSession, outputs: Any, feeds: dict[str, Any], *how: Any) -> Any:
        if "AzureExecutionProvider" in session.get_providers() and "latent_sample" in feeds:
            raise RuntimeError("CUDA failure 2: out of memory")
        return ort.InferenceSession.run(session, outputs, feeds, *how)

    monkeypatch.setattr(plugins, "session", noted)
    monkeypatch.setattr(plugins._Session, "run", run)
    gc.collect()
    gc.disable()
    try:
        models = loader.load(resolve({"bundle": str(routed_bundle), "threads": "1"}, {}))
    finally:
        gc.enable()
    assert models.providers[0].name == "cpu"
    assert alive[:6] == [0, 1, 2, 0, 1, 2]  # text encoder, denoiser and decoder, twice
