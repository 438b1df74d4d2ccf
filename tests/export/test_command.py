from __future__ import annotations

import subprocess
import sys

import pytest

from export.__main__ import STAGES, main


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for stage in ("label", "train", "calibrate", "evaluate", "predictor", "diffusion", "starter"):
        assert stage in printed
        assert stage in STAGES


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_an_unknown_stage_is_a_usage_error_that_names_those_there_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert "calibrate" in printed.err


def test_naming_the_stages_imports_none_of_them() -> None:
    code = "import sys; from export.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
