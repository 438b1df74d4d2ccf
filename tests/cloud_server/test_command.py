"""The command, as people and scripts run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from cloud_server.__main__ import main
from cloud_server.model import CARD_FILE, open_model
from tests.hub import NOBODY, asked_here, hub
from tests.running import process_environment


def digest(model_folder: Path, folder: Path, output: int) -> tuple[int, str]:
    finished = subprocess.run(
        [sys.executable, "-m", "cloud_server", "digest", "--model", str(model_folder)],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment(folder),
        check=False,
    )
    return finished.returncode, finished.stderr


@pytest.mark.linux
def test_a_digest_whose_reader_is_gone_or_whose_disk_is_full_ends_without_a_traceback(
    model_folder: Path, tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert digest(model_folder, tmp_path, writing)[0] == 0
    os.close(writing)
    with Path("/dev/full").open("w") as full:
        code, said = digest(model_folder, tmp_path, full.fileno())
    assert code == 2 and "cannot be written: No space left" in said and "Traceback" not in said
    with (tmp_path / "digest").open("w") as file:
        assert digest(model_folder, tmp_path, file.fileno())[0] == 0
    assert (tmp_path / "digest").read_text() == f"{open_model(str(model_folder)).digest}\n"


def test_the_digest_is_of_the_model_in_the_environment(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLOUD_SERVER_MODEL", str(model_folder))
    assert main(["digest"]) == 0
    assert capsys.readouterr().out == f"{open_model(str(model_folder)).digest}\n"


@pytest.mark.linux
def test_a_refusal_that_nobody_takes_keeps_its_exit_code_and_stays_out_of_the_digest(tmp_path: Path) -> None:
    command = f"{sys.executable} -m cloud_server digest --model /nowhere"
    for closed in ("2>&-", "2>/dev/full"):
        finished = subprocess.run(
            ["/bin/sh", "-c", f"{command} {closed}"],
            capture_output=True,
            text=True,
            env=process_environment(tmp_path),
            check=False,
        )
        assert (finished.returncode, finished.stdout) == (2, "")


@pytest.mark.parametrize("there", [True, False])
def test_a_hub_that_does_not_answer_is_told_from_one_without_the_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], there: bool
) -> None:
    """The unit starts the server again after the one and not after the other."""
    (tmp_path / "empty").mkdir()
    asked = hub(tmp_path / "empty") if there else nullcontext(NOBODY)
    with asked as address, asked_here(address, tmp_path / "cache"):
        code = main(["digest", "--model", "another/name"])
    told = "the hub did not give it" if there else "cannot be reached and has left no copy"
    assert (code, told in capfd.readouterr().err) == (2 if there else 3, True)


@pytest.mark.parametrize(("card", "half"), [(True, False), (False, False), (True, True)])
def test_a_model_of_the_hub_is_downloaded_with_its_card_and_in_half_precision_where_that_is_all_there_is(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], card: bool, half: bool
) -> None:
    """Left to itself diffusers brings the files it knows, and none of another variant than it is asked for."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    if not card:
        (folder / CARD_FILE).unlink()
    if half:
        for weights in folder.rglob("*.safetensors"):
            weights.rename(weights.with_suffix(".fp16.safetensors"))
    with hub(folder) as address, asked_here(address, tmp_path / "cache"):
        code = main(["digest", "--model", "owner/name"])
    said = capfd.readouterr()
    assert (code, said.out.strip()) == (0, open_model(str(folder)).digest), said.err
    assert "B/s" not in said.err and "it/s" not in said.err  # no bars outside of terminals
