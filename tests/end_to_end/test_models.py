"""A model from a web server to an image: pulled, chosen, served."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from edge_agent.bundle import Bundle
from edge_agent.settings import STARTER
from tests.running import Process, process_environment, short_folder
from tests.web import web_server


@pytest.fixture
def home() -> Iterator[Path]:
    made = short_folder()  # a socket must fit
    yield made
    shutil.rmtree(made)


def run(home: Path, *arguments: str) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-m", "edge_agent", *arguments, "--json"],
        cwd=home,
        env=process_environment(home),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    printed: dict[str, Any] = json.loads(finished.stdout)
    return printed


def test_a_model_is_pulled_over_http_chosen_and_makes_the_image_that_it_made_before(home: Path) -> None:
    prompt = ("generate", "a red apple on a beach", "--seed", "7")
    pictures = []
    with web_server(STARTER.parent) as web:
        web.misbehave("stop", at="unet/model.onnx", times=1)
        pulled = run(home, "models", "pull", f"{web.address}/starter", "--name", "mine")
    assert pulled["digest"] == Bundle.open(STARTER, verify=False).model_digest
    for name in ("starter", "mine"):
        used = run(home, "models", "use", name)
        daemon = Process("edge_agent", home, "--threads", "1")
        try:
            assert daemon.wait_for("serving")["bundle"] == used["folder"]
            made = run(home, *prompt, "-o", f"{name}.png")
            assert (made["served_by"], made["seed"]) == ("edge", 7)
        finally:
            daemon.stop()
        with PIL.Image.open(home / f"{name}.png") as picture:
            pictures.append(picture.tobytes())
    assert used["folder"] == pulled["folder"]
    assert pictures[0] == pictures[1]
