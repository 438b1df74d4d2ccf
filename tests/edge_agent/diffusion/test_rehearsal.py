"""What a provider's library does to its process, it does not do to the daemon."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from edge_agent.bundle import Bundle
from edge_agent.diffusion.decoder import Decoder
from edge_agent.diffusion.rehearsal import rehearse
from edge_agent.diffusion.sessions import Runtime, Session
from edge_agent.errors import GenerationFailed
from tests.running import process_environment, until

HERE = Runtime(threads=1, sizes={"batch_size": 1, "latent_height": 8, "latent_width": 8})


@pytest.fixture
def session(miniature_bundle: Path) -> Session:
    (session,) = Decoder(Bundle.open(miniature_bundle), Runtime(threads=1)).sessions
    return session


def test_a_graph_that_runs_is_no_trouble(session: Session) -> None:
    rehearse(session, HERE)


def test_what_the_runtime_refuses_is_said_in_its_words(session: Session) -> None:
    with pytest.raises(GenerationFailed, match=r"vae_decoder/model\.onnx.*NoExecutionProvider"):
        rehearse(session, Runtime(providers=("NoExecutionProvider",), sizes=HERE.sizes))


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGKILL, "SIGKILL, perhaps for want of memory")],
)
def test_a_process_that_ends_is_not_ours(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\nkill -{int(number)} $$\n")
    stand_in.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    with pytest.raises(GenerationFailed) as failed:
        rehearse(session, HERE)
    assert failed.value.message == f"the process that tried {session.path} ended by {said}"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system cannot be told")
async def test_a_rehearsal_does_not_outlive_the_daemon_and_goes_first_when_memory_runs_out(
    tmp_path: Path,
) -> None:
    """A pipe in the place of the graph has it wait for ever."""
    os.mkfifo(tmp_path / "graph")
    code = (
        "import sys, pathlib; from types import SimpleNamespace as Session; "
        "from edge_agent.diffusion.rehearsal import rehearse; from edge_agent.diffusion.sessions import Runtime; "
        "rehearse(Session(path=pathlib.Path(sys.argv[1]), inputs=(), outputs=()), Runtime())"
    )
    daemon = psutil.Popen(
        [sys.executable, "-c", code, str(tmp_path / "graph")], env=process_environment(tmp_path)
    )
    try:
        await until(daemon.children)
        (rehearsal,) = daemon.children()
        priority = Path(f"/proc/{rehearsal.pid}/oom_score_adj")
        await until(lambda: priority.read_text() == "1000\n")
    finally:
        daemon.kill()
        daemon.wait()
    await until(lambda: not rehearsal.is_running() or rehearsal.status() == psutil.STATUS_ZOMBIE)
