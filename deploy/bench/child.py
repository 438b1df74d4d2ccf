"""A part of the benchmark in a process of its own, asked and answering in lines of JSON.

What the edge costs is measured in processes that never import torch, and what torch's pipelines cost in processes
that import nothing of the edge. They are alive together and take turns, so that each pair of measurements meets the
same weather.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import BenchError

HEAVY = ("torch", "diffusers", "transformers", "optimum")
"""What the edge must never import."""

CLOSE_S = 10.0
_LAST_WORDS = 2000  # characters of stderr shown when a child dies

Reply = dict[str, Any]


class Child:
    """`python SCRIPT ARGUMENTS...`, started now. `edge`: refuse its answers once it has imported torch or its kin."""

    def __init__(self, script: str, *arguments: str, threads: int, edge: bool) -> None:
        self._edge = edge
        self._name = " ".join((script, *arguments[:1]))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the child
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"},
        )

    def ask(self, **request: Any) -> Reply:
        """Its answer, with `peak_bytes`, the most memory that process has held so far, and `held_bytes`, what it holds.

        Raises BenchError.
        """
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101  # pipes
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            words = self._errors.read().decode(errors="replace").strip()[-_LAST_WORDS:]
            raise BenchError(f"{self._name} ended without an answer:\n{words}")
        reply: Reply = json.loads(line)
        if self._edge and reply["heavy"]:
            raise BenchError(f"{self._name} imported {', '.join(reply['heavy'])}, which the edge must not")
        return reply

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=CLOSE_S)  # the end of its input ends its loop
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def asked(threads: int, script: str, *arguments: object) -> Reply:
    """The one answer of a process of the edge's. Raises BenchError."""
    with Child(script, *map(str, arguments), threads=threads, edge=True) as child:
        return child.ask()


def answer(load: Callable[[], Callable[..., Reply]]) -> None:
    """In the child: answer each line of standard input with what the function that `load` returns makes of it.

    Standard output carries answers alone; what libraries print goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    reply = load()
    for line in sys.stdin:
        found = reply(**json.loads(line))
        own = {
            "peak_bytes": peak_bytes(),
            "held_bytes": held_bytes(),
            "heavy": [name for name in HEAVY if name in sys.modules],
        }
        print(json.dumps(found | own), file=answers, flush=True)


def peak_bytes() -> int:
    """The most memory this process has held: VmHWM, because getrusage also counts what the parent held at the fork."""
    try:
        return _status("VmHWM")
    except OSError:  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def held_bytes() -> int:
    """The memory this process holds now; its peak where the system does not tell."""
    try:
        return _status("VmRSS")
    except OSError:
        return peak_bytes()


def held_bytes_of(process: int) -> int:
    """The memory that another process holds now. Raises OSError where the system does not tell."""
    return _status("VmRSS", str(process))


def _status(name: str, process: str = "self") -> int:
    return int(Path(f"/proc/{process}/status").read_text().split(f"{name}:")[1].split()[0]) * 1024
