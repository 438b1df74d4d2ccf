"""A graph is opened on a provider and run once in a process of its own, before the daemon does so itself.

Compilers of graphs are large native libraries, and one that writes where it must not ends its process: onnxruntime's
OpenVINO provider did so on a graph in eight bits. Here that process is not the daemon, and its callers lose nothing.
Nor does the daemon when memory runs out meanwhile: the system is told to end this process first. What the provider
compiles is in its cache afterwards, so that the daemon finds it there.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.diffusion.sessions import Runtime, Session
from edge_agent.errors import GenerationFailed, RouteT2IError

_ROOT = Path(__file__).parents[2]  # where this package lies, and `python -m` looks for it

_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def rehearse(session: Session, runtime: Runtime) -> None:
    """Open the session's graph on another runtime and run it once on noise; minutes where it has to be compiled.

    The runtime must leave no size of the inputs open, and its options no relative path.

    Raises GenerationFailed, with what the process said or how it ended.
    """
    task = {
        "path": str(session.path.absolute()),
        "inputs": session.inputs,
        "outputs": session.outputs,
        "runtime": asdict(runtime),
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        cwd=_ROOT,
        start_new_session=True,  # a Ctrl-C is the daemon's
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        raise GenerationFailed(f"the process that tried {session.path} ended by {name}{hint}")
    if done.returncode:
        said = (done.stdout.splitlines() or done.stderr.splitlines() or ["it failed and said nothing"])[-1]
        raise GenerationFailed(said)


def main() -> int:
    """The process: the task on standard input, what went wrong as the last line of standard output."""
    _go_first()
    task = json.load(sys.stdin)
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in task["runtime"].items()
    }
    try:
        session = Session(Path(task["path"]), task["inputs"], task["outputs"], Runtime(**given))
        noise = np.random.default_rng(0)
        session.run({name: noise.standard_normal(session.shapes[name]) for name in task["inputs"]})
    except RouteT2IError as error:
        sys.stdout.write(f"{error.message}\n")
        return 1
    return 0


def _go_first() -> None:
    """End with the daemon, whatever ends that, and before it when memory runs out. As far as the system knows how."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    sys.exit(main())
