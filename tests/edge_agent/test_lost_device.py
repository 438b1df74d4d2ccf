"""A device that is lost to the process, as a GPU that fell off the bus, costs the images under way and no later ones.

Here it is onnxruntime's second provider in its CPU build, whose sessions fail from some moment on as CUDA's do.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from edge_agent.client import UNREACHABLE
from edge_agent.diffusion import plugins, providers
from tests.running import LOCAL, ROOT, Here, Process, daemon_here, process_environment, until

NAME = "azure"
SAID = "CUDA failure 700: an illegal memory access was encountered ; GPU=0"


class Device:
    """What becomes of it."""

    lost = False
    falters = False  # once


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device, run = Device(), ort.InferenceSession.run

    def runs(session: ort.InferenceSession, *how: Any) -> Any:
        if "AzureExecutionProvider" in session.get_providers() and (device.lost or device.falters):
            device.falters = False
            raise RuntimeError(SAID)
        return run(session, *how)

    monkeypatch.setattr(plugins._Session, "run", runs)
    monkeypatch.setattr(providers, "PREFERENCE", (NAME, providers.CPU))
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
        assert after.picture.tobytes() == before.picture.tobytes()
        (passed_over,) = (each for each in (await here.app.status()).providers if each.name == NAME)
        assert passed_over.reason == SAID


FAILING = f"""
import onnxruntime
from pathlib import Path

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
        await asyncio.sleep(0.2)  # by then it would have been looked at and taken for lost
        assert here.daemon.agent.models is models and not device.falters
