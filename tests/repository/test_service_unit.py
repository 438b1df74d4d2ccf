"""The systemd unit names settings that exist, with values that are taken."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from edge_agent.client import BAD_INPUT
from edge_agent.settings import ADDRESS_VARIABLE, ENVIRONMENT_PREFIX, resolve

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy" / "systemd" / "edge-agent.service"


def test_the_units_environment_is_one_of_settings() -> None:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    given = dict(line.split("=", 2)[1:] for line in lines if line.startswith("Environment="))
    ours = {name: value for name, value in given.items() if name.startswith(ENVIRONMENT_PREFIX)}
    settings = resolve({}, ours)
    for name, value in ours.items():
        assert str(getattr(settings, name.removeprefix(ENVIRONMENT_PREFIX).lower())) == value
    longer = next(float(line.split("=")[1]) for line in lines if line.startswith("TimeoutStopSec="))
    assert longer > settings.grace_s
    assert f"{ADDRESS_VARIABLE}={settings.listen}" in UNIT.read_text(encoding="utf-8")


@pytest.mark.posix
def test_the_install_command_names_the_wheel_with_its_extra(tmp_path: Path) -> None:
    (tmp_path / "routet2i-0.1-py3-none-any.whl").touch()
    for page in (UNIT, ROOT / "docs" / "jetson.md"):
        commands = re.findall(r"pip (install .*\[cpu\]['\"]?)", page.read_text(encoding="utf-8"))
        assert commands
        for arguments in commands:
            told = subprocess.run(
                ["sh", "-c", f"printf '%s|' {arguments}"], cwd=tmp_path, check=True, stdout=subprocess.PIPE
            )
            assert told.stdout == b"install|routet2i-0.1-py3-none-any.whl[cpu]|"


def test_no_line_shuts_the_gpu_out() -> None:
    """What allows one device denies all others."""
    unit = UNIT.read_text(encoding="utf-8")
    assert not re.findall(r"^(PrivateDevices|ProtectClock|DevicePolicy|DeviceAllow)=", unit, re.MULTILINE)


def test_a_daemon_that_refused_to_start_is_not_started_again() -> None:
    assert f"\nRestartPreventExitStatus={BAD_INPUT}\n" in UNIT.read_text(encoding="utf-8")
