"""What a provider's library does to its process, it does not do to the daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from edge_agent.bundle import Bundle
from edge_agent.diffusion.decoder import Decoder
from edge_agent.diffusion.rehearsal import rehearse
from edge_agent.diffusion.sessions import Runtime, Session
from edge_agent.errors import GenerationFailed, ProcessEnded
from edge_agent.manifest import DECODER
from tests.running import as_shown, process_environment, until

HERE = Runtime(threads=1, sizes={"batch_size": 1, "latent_height": 8, "latent_width": 8})


@pytest.fixture
def session(miniature_bundle: Path) -> Session:
    return Decoder(Bundle.open(miniature_bundle), Runtime(threads=1)).session


def tried(session: Session, runtime: Runtime = HERE) -> frozenset[str]:
    return rehearse(session.path, session.inputs, session.outputs, runtime)


def test_a_graph_that_runs_tells_where(session: Session) -> None:
    """And not on a provider that leaves all of it to the next, which sessions list as theirs."""
    assert tried(session) == {"CPUExecutionProvider"}
    idle = Runtime(threads=1, providers=("AzureExecutionProvider", *HERE.providers), sizes=HERE.sizes)
    assert tried(session, idle) == {"CPUExecutionProvider"}


def test_what_the_runtime_refuses_is_said_in_its_words(session: Session) -> None:
    with pytest.raises(GenerationFailed, match=f"{as_shown(DECODER)}.*NoExecutionProvider"):
        tried(session, Runtime(providers=("NoExecutionProvider",), sizes=HERE.sizes))


def stand_in(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does what `script` says in place of the rehearsal."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))


def test_a_crash_is_told(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    crash = [sys.executable, "-c", "import faulthandler; faulthandler._read_null()"]
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: start(crash, **how))
    how = "0xC0000005" if os.name == "nt" else "signal 11"
    with pytest.raises(GenerationFailed, match=f"{as_shown(DECODER)} crashed with {how}"):
        tried(session)


@pytest.mark.posix
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -SEGV $$", "the process that tried {path} crashed with signal 11"),
        (
            "echo 'what(): no kernel' >&2; kill -ABRT $$",
            "the process that tried {path} crashed with signal 6: what(): no kernel",
        ),
        ("kill -40 $$", "the process that tried {path} crashed with signal 40"),  # it has no name
        ("echo chatter; echo 'MemoryError: no room' >&2; exit 1", "MemoryError: no room"),
        ("echo 7; echo '\033]0;title\007' >&2; echo >&2; exit 1", "?]0;title?"),
        (
            r"""printf '%s\n' '{"failed": "CUDA failure 2; \n\nfile=a.cc ; \n\n"}'; exit 1""",
            "CUDA failure 2; file=a.cc ;",
        ),
        # What libraries print may look like an answer, be no text, or be long.
        ("""echo '{"a": 1}'; echo '{"failed": "no kernel"}'; exit 1""", "no kernel"),
        (r"printf '\377 no kernel\n' >&2; exit 1", "\ufffd no kernel"),
        (f"echo 'first {'x' * 1000} last' >&2; exit 1", "x" * 295 + " last"),
        ("exit 1", "the process that tried {path} failed and said nothing"),
        ("echo '[]'; exit 0", "the process that tried {path} failed and said nothing"),
    ],
)
def test_a_process_that_fails_or_crashes_is_not_ours_and_what_it_said_last_is_the_reason(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    stand_in(tmp_path, script, monkeypatch)
    with pytest.raises(GenerationFailed) as failed:
        tried(session)
    assert failed.value.message == said.format(path=session.path)
    assert not isinstance(failed.value, ProcessEnded)


@pytest.mark.posix
@pytest.mark.parametrize("number", ["TERM", "KILL"])
def test_a_process_that_is_ended_from_outside_says_nothing_of_the_graph(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    stand_in(tmp_path, f"kill -{number} $$", monkeypatch)
    with pytest.raises(ProcessEnded, match="ended from outside, or for want of memory"):
        tried(session)


@pytest.mark.posix
def test_a_process_that_runs_out_of_memory_says_nothing_of_the_graph(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process itself, where nothing is left."""
    full = (
        "import sys; from edge_agent import memory; from edge_agent.diffusion import sessions; "
        "memory.available_bytes = lambda: 0; sessions.LARGE_BYTES = 0; exec(sys.argv[2])"
    )
    stand_in(tmp_path, f"exec {sys.executable} -c '{full}' \"$@\"", monkeypatch)
    with pytest.raises(ProcessEnded, match="0 MB can be had"):
        tried(session)


@pytest.mark.posix
def test_the_process_finds_what_the_providers_need_and_answers_on_a_line_of_its_own(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever libraries print, and with or without an end of the line."""
    code = (
        "import sys; from edge_agent.diffusion import providers; "
        'say = lambda names: sys.stdout.write("for " + ",".join(names)) and sys.stderr.write(",".join(names)); '
        "providers.load_packaged_libraries = say; exec(sys.argv[2]); "
    )
    stand_in(tmp_path, f"exec {sys.executable} -c '{code}' \"$@\" 2>{tmp_path / 'said'}", monkeypatch)
    assert tried(session) == {"CPUExecutionProvider"}
    assert (tmp_path / "said").read_text() == "CPUExecutionProvider"


def test_nothing_is_imported_from_the_working_folder_nor_left_there(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be anybody's, and is where an interactive daemon would look first."""
    (tmp_path / "json.py").write_text("raise SystemExit('from the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert tried(session) == {"CPUExecutionProvider"}
    assert [file.name for file in tmp_path.iterdir()] == ["json.py"]


@pytest.mark.linux
def test_a_process_whose_daemon_has_gone_before_it_could_be_told_ends_too() -> None:
    """No process has the number 0."""
    code = "from edge_agent.child import _end_with; _end_with(0); print('it goes on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


async def test_a_process_that_is_to_end_with_another_does(tmp_path: Path) -> None:
    waits = "import os, time; from edge_agent.child import _end_with; _end_with(os.getppid()); "
    waits += "print(flush=True); time.sleep(120)"
    starts = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    daemon = psutil.Popen(
        [sys.executable, "-c", starts, waits], stdout=subprocess.PIPE, env=process_environment(tmp_path)
    )
    try:
        daemon.stdout.readline()
        (process,) = daemon.children()
        assert process.is_running()
    finally:
        daemon.kill()
        daemon.wait()
    with suppress(psutil.NoSuchProcess):
        await until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system cannot be told")
async def test_a_rehearsal_does_not_outlive_the_daemon_and_comes_after_it_for_memory_and_cores(
    tmp_path: Path,
) -> None:
    """A pipe in the place of the graph has it wait for ever."""
    os.mkfifo(tmp_path / "graph")
    code = (
        "import sys, pathlib; "
        "from edge_agent.diffusion.rehearsal import rehearse; from edge_agent.diffusion.sessions import Runtime; "
        "rehearse(pathlib.Path(sys.argv[1]), (), (), Runtime())"
    )
    daemon = psutil.Popen(
        [sys.executable, "-c", code, str(tmp_path / "graph")], env=process_environment(tmp_path)
    )
    try:
        await until(daemon.children)
        (rehearsal,) = daemon.children()
        priority = Path(f"/proc/{rehearsal.pid}/oom_score_adj")
        await until(lambda: priority.read_text() == "1000\n")
        assert os.getsid(rehearsal.pid) == rehearsal.pid  # a Ctrl-C is the daemon's
        await until(lambda: rehearsal.nice() == 10)  # images are made meanwhile
        group = Path(f"/proc/{rehearsal.pid}/autogroup")
        await until(lambda: not group.exists() or group.read_text().endswith(" nice 10\n"))
    finally:
        daemon.kill()
        daemon.wait()
    with suppress(psutil.NoSuchProcess):
        await until(lambda: rehearsal.status() == psutil.STATUS_ZOMBIE)
