"""What importing the edge agent brings along, seen in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

HEAVY = ("torch", "diffusers", "transformers", "optimum", "onnx", "scipy", "pyarrow")

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys

import edge_agent

names = [module.name for module in pkgutil.walk_packages(edge_agent.__path__, "edge_agent.")]
sys.argv = ["edge-agent", "--no-such-flag"]
for name in names:
    importlib.import_module(name)
print(json.dumps({"imported": names, "loaded": sorted({name.split(".")[0] for name in sys.modules})}))
"""


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], check=True, capture_output=True, text=True, timeout=60
    )
    assert finished.stderr == ""
    found: dict[str, Any] = json.loads(finished.stdout)  # which fails where an import printed something
    assert {"edge_agent.__main__", "edge_agent.agent", "edge_agent.diffusion.generator"} <= set(
        found["imported"]
    )
    return found


def test_importing_every_module_of_the_edge_leaves_the_heavy_libraries_out(
    everything: dict[str, Any],
) -> None:
    assert set(HEAVY) & set(everything["loaded"]) == set()


def test_the_edge_imports_neither_the_cloud_server_nor_the_export(everything: dict[str, Any]) -> None:
    assert {"cloud_server", "export"} & set(everything["loaded"]) == set()
