"""Work in a process of its own, whose crash is not ours: of native libraries that compile and run graphs.

The process gets a task as JSON and answers with lines of JSON, among whatever libraries print. It ends with the one
that began it, and is the first that the system ends when memory runs out.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_agent.errors import GenerationFailed, OutOfMemory, ProcessEnded, RouteT2IError, printable

_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
_NICE = 10
_NO_MEMORY = 4  # the exit status; 3 is what Windows' abort() may leave
_FIRST_EXCEPTION = 0xC000_0000  # from here on the exit status on Windows is that of what crashed the process
_LONGEST_REASON = 300  # characters of what a library says
_LAST_WORDS = 64 * 1024  # bytes of standard error that are looked through for its last line

if sys.platform == "win32":  # as `_yield_cores` and a new session do elsewhere
    import _winapi

    _ALWAYS, _BACKGROUND = subprocess.CREATE_NO_WINDOW, subprocess.BELOW_NORMAL_PRIORITY_CLASS
else:
    _ALWAYS = _BACKGROUND = 0


def answers(
    module: str, task: Mapping[str, Any], trying: str, *, background: bool = False
) -> Iterator[dict[str, Any]]:
    """What `module`'s `main`, by `work`, answers on the task, as it comes. The process ends once nobody listens.

    Args:
        trying: what it tries, for errors.
        background: whether it is to leave the cores to others that want them.

    Raises:
        ProcessEnded: it was told to stop, or killed, as for want of memory, or ran out of it.
        GenerationFailed: it failed or crashed, with what it said last, or answered nothing.
        OSError: there is no folder for temporary files.
    """
    # What it imports comes from where we have it, and never from the working folder.
    path = [entry for entry in sys.path if entry]
    code = f"import sys; sys.path[:] = {path!r}; from {module} import main; sys.exit(main())"
    answered, failed = False, ""
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C is ours
            creationflags=_ALWAYS | (_BACKGROUND if background else 0),
        ) as process:
            assert process.stdin is not None and process.stdout is not None  # noqa: S101  # pipes
            try:
                # It may have crashed before it read: a broken pipe, which Windows calls an invalid argument.
                with suppress(OSError), process.stdin as given:
                    json.dump({"parent": os.getpid(), "background": background, "task": task}, given)
                for line in process.stdout:
                    answer = _object(line)
                    failed = str(answer.pop("failed", failed))
                    if answer:
                        answered = True
                        yield answer
            except BaseException:
                process.kill()
                raise
        said = failed or _last_line(errors)
    if process.returncode or not answered:
        raise _failure(process.returncode, said, trying)


def _failure(status: int, said: str, trying: str) -> GenerationFailed:
    """What a process comes to that ended with this exit status, and did not do what it was there for."""
    if sys.platform != "win32" and -status in (signal.SIGTERM, signal.SIGKILL):
        return ProcessEnded(f"the process that tried {trying} was ended from outside, or for want of memory")
    if status < 0 or status >= _FIRST_EXCEPTION:
        how = f"signal {-status}" if status < 0 else f"0x{status:X}"
        crash = f"the process that tried {trying} crashed with {how}"
        return GenerationFailed(f"{crash}: {_fit(said)}" if said else crash)
    if status == _NO_MEMORY:
        return ProcessEnded(_fit(said))
    return GenerationFailed(_fit(said) or f"the process that tried {trying} failed and said nothing")


def work(answering: Callable[[dict[str, Any]], Iterable[Mapping[str, Any]]]) -> int:
    """The process: answers the task on standard input, and returns its exit status."""
    given = json.load(sys.stdin)
    _end_with(given["parent"])
    if given["background"]:
        _yield_cores()
    try:
        for answer in answering(given["task"]):
            _tell(answer)
    except RouteT2IError as error:
        _tell({"failed": error.message})
        return _NO_MEMORY if isinstance(error, OutOfMemory) else 1
    return 0


def _tell(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(f"\n{json.dumps(answer)}\n")  # on a line of its own, where a library left one unfinished
    sys.stdout.flush()


def _end_with(parent: int) -> None:
    """Be ended when that process is. Linux is told so, and to end this one first when memory runs out."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it went before that
            os._exit(1)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    """End this process, whatever a library does in it, once the parent has gone."""
    if sys.platform == "win32":  # where no other becomes its parent
        with suppress(OSError):  # it went before that
            handle = _winapi.OpenProcess(_winapi.SYNCHRONIZE, False, parent)
            _winapi.WaitForSingleObject(handle, _winapi.INFINITE)
    else:
        while os.getppid() == parent:
            time.sleep(1.0)
    os._exit(1)


def _yield_cores() -> None:
    """Leave them to whoever else wants them."""
    if hasattr(os, "nice"):
        os.nice(_NICE)
    with suppress(OSError):
        # On Linux a session of its own, as this is, shares the cores with others by this alone.
        Path("/proc/self/autogroup").write_text(str(_NICE))


def _object(line: str) -> dict[str, Any]:
    """The JSON object in that line; empty where it is what a library prints."""
    with suppress(ValueError):
        if isinstance(found := json.loads(line), dict):
            return found
    return {}


def _last_line(errors: Any) -> str:
    end = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, end - _LAST_WORDS))
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _fit(said: str) -> str:
    """Fit for a terminal, and at a length people read."""
    return printable(said)[-_LONGEST_REASON:]
