from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from export.__main__ import INTERRUPTED, STAGES, main, run


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for stage in ("label", "train", "calibrate", "evaluate", "predictor", "diffusion", "starter"):
        assert stage in printed
        assert stage in STAGES


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("", ("STAGE", "--work")),
        ("all", ("STAGE", "--work")),
        ("judge", ("--steps", "--autoencoder")),
        ("label", ("--adherence",)),
    ],
)
def test_a_stage_of_the_starter_has_help_of_its_own(
    stage: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(SystemExit):  # argparse's way
        main(["starter", *stage.split(), "--help"])
    printed = capsys.readouterr().out
    assert all(option in printed for option in options)


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_an_unknown_stage_is_a_usage_error_that_names_those_there_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert "calibrate" in printed.err


def test_what_the_system_refuses_is_said_in_words_with_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(_argv: object) -> int:
        return len((tmp_path / "none").read_text())

    assert run(stage) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: No such file or directory\n"


@pytest.mark.posix
def test_help_that_nobody_reads_to_its_end_is_no_failure() -> None:
    """As in `edge-export --help | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "export", "--help"], stdout=writing, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_naming_the_stages_imports_none_of_them() -> None:
    code = "import sys; from export.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_stage_that_is_interrupted_while_it_is_imported_says_so_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch is imported for seconds."""
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(STAGES, "interrupted", ("interrupted", ""))
    assert main(["interrupted"]) == INTERRUPTED
