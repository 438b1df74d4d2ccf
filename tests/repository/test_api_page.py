"""docs/api.md names every call, field and status of the wire, and its example makes an image."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edge_agent.errors import GRPC_CODES
from routet2i.edge.v1 import edge_pb2
from routet2i.image.v1 import image_pb2
from tests.running import Process, process_environment

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
SERVICE = edge_pb2.DESCRIPTOR.services_by_name["EdgeAgentService"]


@pytest.mark.parametrize(
    "name",
    [
        *(call.name for call in SERVICE.methods),
        *(field.name for field in image_pb2.ImageRequest.DESCRIPTOR.fields),
        *(event.name for event in edge_pb2.GenerateResponse.DESCRIPTOR.fields),
        *sorted({code.name for code in GRPC_CODES.values()}),
    ],
)
def test_the_page_names_it(name: str) -> None:
    assert f"`{name}`" in PAGE


def test_the_example_makes_an_image_as_it_stands(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    daemon = Process("edge_agent", tmp_path, "--listen", "127.0.0.1:0")  # with the starter
    try:
        daemon.wait_for("serving")
        address = daemon.wait_for("listening")["address"]

        def run(prompt: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, script, address, prompt, tmp_path / "cat.png"],
                capture_output=True,
                text=True,
                timeout=60,
                env=process_environment(tmp_path),
            )

        made = run("a cat")
        assert made.stdout == "made by ROUTE_EDGE with seed 7\n", made.stderr
        with Image.open(tmp_path / "cat.png") as image:
            assert image.text["reason"] == "local_only"
        refused = run(" ")
        assert refused.returncode == 1
        assert refused.stderr.startswith("INVALID_ARGUMENT: ")
    finally:
        daemon.kill()
