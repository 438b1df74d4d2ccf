"""What importing the edge agent brings along, seen in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
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
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def everything(home: Path) -> dict[str, Any]:
    bare = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env=bare,
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


def test_nothing_that_is_imported_leaves_a_device_id_behind_to_report_under(
    everything: dict[str, Any], home: Path
) -> None:
    assert "onnxruntime" in everything["loaded"]
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_the_edge_imports_neither_the_cloud_server_nor_the_export(everything: dict[str, Any]) -> None:
    assert {"cloud_server", "export"} & set(everything["loaded"]) == set()
