"""`edge-agent bench`: what it measures, and what it says of providers that do not work."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_agent import bench
from edge_agent.bundle import Bundle
from tests.running import Finished, Run, commands, process_environment, until

FIELDS = (
    "provider", "error", "first_image_s", "images", "image_s", "step_s", "decode_s", "decision_s",
    "peak_memory_bytes", "largest_difference", "model_digest", "width", "height", "steps", "guidance_scale", "threads",
    "onnxruntime"
)  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.0123456, "12.3 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1 s"),
        (12.345, "12.3 s"),
        (999.6, "1000 s"),
        (1534.2, "1534 s"),  # a compiler's first image
    ],
)
def test_a_time_is_told_in_digits_and_no_power_of_ten(seconds: float, told: str) -> None:
    assert bench._time(seconds) == told


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return commands(tmp_path, monkeypatch, capfd)


@pytest.fixture
def benched(run: Run, miniature_bundle: Path) -> Callable[..., Finished]:
    """The command on the miniature, with one image beyond the first."""
    return lambda *more: run("bench", "--bundle", miniature_bundle, "--seconds", "0", *more)


def test_the_cpu_is_measured(benched: Callable[..., Finished], miniature_bundle: Path) -> None:
    bundle = Bundle.open(miniature_bundle)
    steps = max(bundle.manifest.steps)
    done = benched("--json", "--steps", str(steps), "--guidance-scale", "3", "--threads", "1")
    (found,) = done.objects
    assert (done.code, tuple(found)) == (0, FIELDS)
    assert (found["provider"], found["error"], found["images"]) == ("cpu", None, 1)
    assert (found["steps"], found["guidance_scale"], found["threads"]) == (steps, 3.0, 1)
    assert (found["width"], found["height"]) == bundle.manifest.sizes[0]
    assert found["model_digest"] == bundle.model_digest
    assert found["largest_difference"] is None
    assert (
        0
        < found["step_s"]
        <= found["image_s"] - found["decode_s"]
        < found["image_s"]
        < found["first_image_s"]
    )
    assert found["decision_s"] > 0
    if sys.platform == "linux":
        assert 50e6 < found["peak_memory_bytes"] < 500e6


def test_a_provider_that_fails_is_a_row_and_its_reason_and_the_others_are_measured(
    benched: Callable[..., Finished],
) -> None:
    """Azure's takes no operator, as a compiler may, and CUDA is not there. The CPU comes first, whatever the order."""
    done = benched("--providers", "cuda,azure,cpu")
    head, columns, *rows = done.out.splitlines()
    assert done.code == 2
    assert "64 x 64 pixels" in head
    assert columns.split() == [
        "provider",
        "image",
        "step",
        "decode",
        "decision",
        "first",
        "image",
        "memory",
        "differs",
    ]
    assert [row.split()[:2] for row in rows[1:3]] == [["cuda", "failed"], ["azure", "failed"]]
    assert rows[0].split()[0] == "cpu" and rows[0].split()[1] != "failed"
    assert rows[3] == "cuda: this onnxruntime is built without it"
    assert rows[4].startswith("azure: AzureExecutionProvider takes nothing of ")
    assert not done.err


def test_pictures_are_compared_with_the_first(miniature_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(miniature_bundle).manifest
    task = {
        "bundle": str(miniature_bundle), "cache": str(tmp_path), "prompt": "a cat", "seconds": 0, "threads": 1,
        "width": manifest.width, "height": manifest.height, "steps": min(manifest.steps), "guidance_scale": 1.0,
    }  # fmt: skip
    found = list(bench._measured(["cpu", "tensorrt", "cpu"], {"tensorrt": "not for eight bits"}, task))
    assert [one["largest_difference"] for one in found] == [None, None, 0]
    assert [one["error"] for one in found] == [None, "not for eight bits", None]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--steps", "7"), "7 steps are not compiled into this bundle"),
        (("--width", "8"), "this bundle makes no images 8 pixels wide"),
        (("--guidance-scale", "nan"), "guidance_scale must be between 0 and 50"),
        (("--prompt", " "), "the prompt is empty"),
        (("--seconds", "nan"), "--seconds must be"),
        (("--seconds", "-1"), "--seconds must be"),
        (("--providers", "CUDAExecutionProvider"), "is no provider's name"),
        (("--bundle", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    benched: Callable[..., Finished], arguments: tuple[str, ...], said: str
) -> None:
    done = benched(*arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_where_no_process_can_be_started_it_is_said(
    benched: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that the output cannot be written."""
    with monkeypatch.context() as patched:  # pytest itself goes on after that
        patched.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        done = benched()
    assert (done.code, done.err) == (2, "")
    assert done.out.endswith("cpu: no process can be started for it: No such file or directory\n")


@pytest.mark.posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
async def test_a_signal_ends_both_processes_and_leaves_no_file(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "edge_agent", "bench", "--seconds", "1000"]
    program: Any = psutil.Popen(command, env=process_environment(tmp_path, TMPDIR=str(temporary)))
    try:
        await until(program.children)
        (process,) = program.children()
        program.send_signal(number)
        assert program.wait(30) == code
        await until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
        assert not list(temporary.iterdir())
    finally:
        if program.is_running():
            program.kill()
            program.wait()
