"""Units and image name settings that exist, with values that are taken."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cloud_server.settings import ENVIRONMENT_PREFIX as CLOUD_PREFIX
from cloud_server.settings import resolve as resolve_cloud
from edge_agent.client import BAD_INPUT
from edge_agent.settings import ADDRESS_VARIABLE, ENVIRONMENT_PREFIX, resolve

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy" / "systemd" / "edge-agent.service"
CLOUD_UNIT = UNIT.with_name("cloud-server.service")
IMAGE = ROOT / "deploy" / "container" / "Containerfile"

UNITS = {UNIT: (ENVIRONMENT_PREFIX, resolve), CLOUD_UNIT: (CLOUD_PREFIX, resolve_cloud)}


def settings_of(unit: Path) -> Any:
    """Those that its environment makes, each as it stands there."""
    prefix, resolved = UNITS[unit]
    lines = unit.read_text(encoding="utf-8").splitlines()
    given = dict(line.split("=", 2)[1:] for line in lines if line.startswith("Environment="))
    ours = {name: value for name, value in given.items() if name.startswith(prefix)}
    settings = resolved({}, ours)
    for name, value in ours.items():
        assert str(getattr(settings, name.removeprefix(prefix).lower())) == value
    return settings


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_environment_is_one_of_settings(unit: Path) -> None:
    lines = unit.read_text(encoding="utf-8").splitlines()
    longer = next(float(line.split("=")[1]) for line in lines if line.startswith("TimeoutStopSec="))
    assert longer > settings_of(unit).grace_s


def test_the_unit_says_where_the_daemon_listens() -> None:
    assert f"{ADDRESS_VARIABLE}={settings_of(UNIT).listen}" in UNIT.read_text(encoding="utf-8")


def test_the_images_environment_is_one_of_settings() -> None:
    text = IMAGE.read_text(encoding="utf-8")
    ours = dict(re.findall(rf"({CLOUD_PREFIX}\w+)=(\S+)", text.partition("\nENV ")[2]))
    settings = resolve_cloud({}, ours)
    assert settings.listen.endswith(":" + re.findall(r"^EXPOSE (\d+)$", text, re.MULTILINE)[0])
    assert re.findall(r"^VOLUME (\S+)$", text, re.MULTILINE) == [settings.state]
    assert settings.tls and settings.tokens
    assert int(re.findall(r"--stop-timeout (\d+)", text)[0]) > settings.grace_s


@pytest.mark.posix
def test_the_install_command_names_the_wheel_with_its_extra(tmp_path: Path) -> None:
    (tmp_path / "routet2i-0.1-py3-none-any.whl").touch()
    for page, extra in ((UNIT, "cpu"), (ROOT / "docs" / "jetson.md", "cpu"), (CLOUD_UNIT, "cloud")):
        commands = re.findall(rf"pip (install .*\[{extra}\]['\"]?)", page.read_text(encoding="utf-8"))
        assert commands
        for arguments in commands:
            told = subprocess.run(
                ["sh", "-c", f"printf '%s|' {arguments}"], cwd=tmp_path, check=True, stdout=subprocess.PIPE
            )
            assert told.stdout == f"install|routet2i-0.1-py3-none-any.whl[{extra}]|".encode()


@pytest.mark.parametrize("unit", UNITS)
def test_no_line_shuts_the_gpu_out(unit: Path) -> None:
    """What allows one device denies all others."""
    text = unit.read_text(encoding="utf-8")
    assert not re.findall(r"^(PrivateDevices|ProtectClock|DevicePolicy|DeviceAllow)=", text, re.MULTILINE)


@pytest.mark.parametrize("unit", UNITS)
def test_nvidias_setuid_helper_runs_before_the_sandbox_that_makes_it_powerless(unit: Path) -> None:
    text = unit.read_text(encoding="utf-8")
    assert "\nNoNewPrivileges=yes\n" in text
    assert re.findall(r"^ExecStartPre=(\S+)", text, re.MULTILINE) == ["-+/usr/bin/nvidia-modprobe"]


@pytest.mark.parametrize("unit", UNITS)
def test_what_refused_to_start_is_not_started_again(unit: Path) -> None:
    assert f"\nRestartPreventExitStatus={BAD_INPUT}\n" in unit.read_text(encoding="utf-8")
