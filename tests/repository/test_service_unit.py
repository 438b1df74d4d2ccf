"""The systemd unit names settings that exist, with values that are taken."""

from __future__ import annotations

from pathlib import Path

from edge_agent.settings import ENVIRONMENT_PREFIX, resolve

UNIT = Path(__file__).resolve().parents[2] / "deploy" / "systemd" / "edge-agent.service"


def test_the_units_environment_is_one_of_settings() -> None:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    given = dict(line.split("=", 2)[1:] for line in lines if line.startswith("Environment="))
    ours = {name: value for name, value in given.items() if name.startswith(ENVIRONMENT_PREFIX)}
    settings = resolve({}, ours)
    for name, value in ours.items():
        assert str(getattr(settings, name.removeprefix(ENVIRONMENT_PREFIX).lower())) == value
    longer = next(float(line.split("=")[1]) for line in lines if line.startswith("TimeoutStopSec="))
    assert longer > settings.grace_s
