"""The command, as people and scripts run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cloud_server.model import open_model
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
