"""A graph is opened on a provider and run once in a process of its own, before the daemon does so itself.

Compilers of graphs are large native libraries, and one that writes where it must not ends its process: onnxruntime's
OpenVINO provider did so on a graph in eight bits. Here that process is not the daemon, and its callers lose nothing.
Nor does the daemon when memory runs out meanwhile: the system is told to end this process first. What TensorRT and
OpenVINO compile is in their cache afterwards, so that the daemon finds it there.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.diffusion import providers
from edge_agent.diffusion.sessions import Runtime, Session
from edge_agent.errors import GenerationFailed, OutOfMemory, RehearsalEnded, RouteT2IError, printable

_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
_NICE = 10  # compilers take every core for minutes, and images are made meanwhile
_NO_MEMORY = 4  # the exit status; 3 is what Windows' abort() may leave
_FIRST_EXCEPTION = 0xC000_0000  # from here on the exit status on Windows is that of what crashed the process
_LONGEST_REASON = 300  # characters of what a library says

if sys.platform == "win32":  # as `_yield_to_images` and a new session do elsewhere
    import _winapi

    _CREATION_FLAGS = subprocess.BELOW_NORMAL_PRIORITY_CLASS | subprocess.CREATE_NO_WINDOW
else:
    _CREATION_FLAGS = 0


def rehearse(graph: Path, inputs: Sequence[str], outputs: Sequence[str], runtime: Runtime) -> frozenset[str]:
    """Open the graph as a session on that runtime and run it once on noise; minutes where it has to be compiled.

    The runtime must leave no size of the inputs open, and its options no relative path.

    Returns the providers that ran some of it, by onnxruntime's names.

    Raises:
        RehearsalEnded: the process was told to stop, or killed, as for want of memory, or ran out of it.
        GenerationFailed: the graph cannot be opened or run there, or crashed the process; with what it said last.
        OSError: there is no folder for temporary files.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        task = {
            "path": str(graph),
            "inputs": inputs,
            "outputs": outputs,
            "runtime": asdict(replace(runtime, profile=str(Path(folder) / "run"))),
            "daemon": os.getpid(),
        }
        # What it imports comes from where the daemon has it, and never from the working folder.
        path = [entry for entry in sys.path if entry]
        code = f"import sys; sys.path[:] = {path!r}; from {__name__} import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            start_new_session=True,  # a Ctrl-C is the daemon's
            creationflags=_CREATION_FLAGS,
        )
    answer = _answer(done.stdout)
    if done.returncode == 0 and "ran_on" in answer:
        return frozenset(answer["ran_on"])
    said = answer.get("failed") or _last_line(done.stderr)
    if sys.platform != "win32" and -done.returncode in (signal.SIGTERM, signal.SIGKILL):
        raise RehearsalEnded(f"the process that tried {graph} was ended from outside, or for want of memory")
    if done.returncode < 0 or done.returncode >= _FIRST_EXCEPTION:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"0x{done.returncode:X}"
        crash = f"the process that tried {graph} crashed with {how}"
        raise GenerationFailed(f"{crash}: {_fit(said)}" if said else crash)
    if done.returncode == _NO_MEMORY:
        raise RehearsalEnded(_fit(said))
    raise GenerationFailed(_fit(said) or f"the process that tried {graph} failed and said nothing")


def main() -> int:
    """The process: the task on standard input, the answer as JSON in a line of standard output. That is what the graph
    `ran_on`, or why it `failed`.
    """
    task = json.load(sys.stdin)
    _end_with(task["daemon"])
    _yield_to_images()
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in task["runtime"].items()
    }
    providers.load_packaged_libraries(given["providers"])
    answer: dict[str, Any]
    try:
        session = Session(Path(task["path"]), task["inputs"], task["outputs"], Runtime(**given))
        noise = np.random.default_rng(0)
        session.run({name: noise.standard_normal(session.shapes[name]) for name in task["inputs"]})
        answer, status = {"ran_on": sorted(session.ran_on())}, 0
    except RouteT2IError as error:
        answer, status = {"failed": error.message}, _NO_MEMORY if isinstance(error, OutOfMemory) else 1
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    return status


def _end_with(daemon: int) -> None:
    """Be ended when the daemon's process is. Linux is told so, and to end this one first when memory runs out."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != daemon:  # it went before that
            os._exit(1)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    else:
        threading.Thread(target=_watch, args=(daemon,), daemon=True).start()


def _watch(daemon: int) -> None:
    """End this process, whatever a compiler does in it, once the daemon has gone."""
    if sys.platform == "win32":  # where no other becomes its parent
        with suppress(OSError):  # it went before that
            handle = _winapi.OpenProcess(_winapi.SYNCHRONIZE, False, daemon)
            _winapi.WaitForSingleObject(handle, _winapi.INFINITE)
    else:
        while os.getppid() == daemon:
            time.sleep(1.0)
    os._exit(1)


def _yield_to_images() -> None:
    """Leave the cores to the daemon when it makes an image."""
    if hasattr(os, "nice"):
        os.nice(_NICE)
    with suppress(OSError):
        # On Linux a session of its own, as this is, shares the cores with others by this alone.
        Path("/proc/self/autogroup").write_text(str(_NICE))


def _answer(output: str) -> dict[str, Any]:
    """The process's, among what libraries print."""
    for line in reversed(output.splitlines()):
        with suppress(ValueError):
            if isinstance(answer := json.loads(line), dict):
                return answer
    return {}


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _fit(said: str) -> str:
    """Fit for a terminal, and at a length people read."""
    return printable(said)[-_LONGEST_REASON:]
