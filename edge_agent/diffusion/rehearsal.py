"""A graph is opened on a provider and run once in a process of its own, before the daemon does so itself.

Compilers of graphs are large native libraries, and one that writes where it must not ends its process: onnxruntime's
OpenVINO provider did so on a graph in eight bits. Here that process is not the daemon, and its callers lose nothing.
What TensorRT and OpenVINO compile is in their cache afterwards, so that the daemon finds it there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent import child
from edge_agent.diffusion import providers
from edge_agent.diffusion.sessions import Runtime, Session


def rehearse(graph: Path, inputs: Sequence[str], outputs: Sequence[str], runtime: Runtime) -> frozenset[str]:
    """Open the graph as a session on that runtime and run it once on noise; minutes where it has to be compiled.

    The runtime must leave no size of the inputs open, and its options no relative path.

    Returns the providers that ran some of it, by onnxruntime's names.

    Raises:
        ProcessEnded: the process was told to stop, or killed, as for want of memory, or ran out of it.
        GenerationFailed: the graph cannot be opened or run there, or crashed the process; with what it said last.
        OSError: there is no folder for temporary files.
    """
    ran_on: list[str] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        task = {
            "path": str(graph),
            "inputs": inputs,
            "outputs": outputs,
            "runtime": asdict(replace(runtime, profile=str(Path(folder) / "run"))),
        }
        for answer in child.answers(__name__, task, str(graph), background=True):  # images are made meanwhile
            ran_on = answer.get("ran_on", ran_on)
    return frozenset(ran_on)


def main() -> int:
    """The process."""
    return child.work(_run)


def _run(task: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in task["runtime"].items()
    }
    providers.load_packaged_libraries(given["providers"])
    session = Session(Path(task["path"]), task["inputs"], task["outputs"], Runtime(**given))
    noise = np.random.default_rng(0)
    session.run({name: noise.standard_normal(session.shapes[name]) for name in task["inputs"]})
    yield {"ran_on": sorted(session.ran_on())}
