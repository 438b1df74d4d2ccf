"""A compiled schedule survives its file, and a file that is not one is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.diffusion.noise import TorchNoise
from edge_agent.diffusion.schedule import Schedule
from edge_agent.errors import BundleError, NewerBundle

SCHEDULE = Schedule(
    scheduler="Made",
    steps=2,
    timesteps=(900.5, 100.0),
    signal=((2.0,), (0.5, 0.25), (0.1, 0.2, 0.3)),
    noise=((), (0.75,), (0.125, 0.0625)),
    clean=((1.0, -1.0), (1.0, -0.5)),
)


def test_runs_the_sums_that_its_rows_say() -> None:
    """Initial noise is drawn first, each fresh noise when a row first uses it, all from one stream."""
    shape = (1, 4, 3, 5)
    stream = TorchNoise(3)
    z, fresh, later = stream.draw(shape), stream.draw(shape), stream.draw(shape)
    first, second = np.full(shape, 3.0, np.float32), np.full(shape, -5.0, np.float32)

    sums = SCHEDULE.run(shape, TorchNoise(3))
    np.testing.assert_allclose(next(sums), 2 * z, rtol=1e-6)
    np.testing.assert_allclose(sums.send(first), 0.5 * z + 0.25 * first + 0.75 * fresh, rtol=1e-5)
    with pytest.raises(StopIteration) as final:
        sums.send(second)
    expected = 0.1 * z + 0.2 * first + 0.3 * second + 0.125 * fresh + 0.0625 * later
    np.testing.assert_allclose(final.value.value, expected, rtol=1e-5)
    assert final.value.value.dtype == np.float32


def test_comes_back_from_its_file_to_the_last_bit(tmp_path: Path) -> None:
    odd = replace(SCHEDULE, timesteps=(1 / 3, np.nextafter(1.0, 2.0)))
    odd.save(tmp_path / "2.json")
    assert Schedule.load(tmp_path / "2.json") == odd


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"signal": [[1.0], [1.0], [1.0, 1.0, 1.0]]}, "lower-triangular"),
        ({"noise": [[1.0], [], []]}, "lower-triangular"),
        ({"noise": [[], []]}, "lower-triangular"),
        ({"clean": []}, "lower-triangular"),
        ({"noise": [[], [], [0.0] * 9]}, "draws 9 noises for 2 calls; at most 4 each"),
        ({"timesteps": []}, "lower-triangular"),
        ({"signal": [[1.0], [1.0, float("nan")], [1.0, 1.0, 1.0]]}, "finite"),
        ({"timesteps": [float("nan"), 100.0]}, "finite"),
        ({"clean": [[1.0, -1.0], [float("-inf"), 0.0]]}, "finite"),
        ({"timesteps": [10**400, 100]}, "not a compiled schedule"),
        ({"steps": float("inf")}, "not a compiled schedule"),
        ({"clean": [[1.0]] * 2}, "not a compiled schedule"),
        ({"signal": "none"}, "not a compiled schedule"),
        ({"format": 2}, "format 2 .*update edge-agent"),
        ({"format": "1"}, "format '1'; this version reads 1"),
    ],
)
def test_refuses_a_file_that_is_not_a_schedule(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = tmp_path / "2.json"
    SCHEDULE.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=rf"2\.json.*{why}"):
        Schedule.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00", "[" * 100_000 + "]" * 100_000])
def test_refuses_a_file_that_is_not_even_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "2.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=r"2\.json is not a compiled schedule"):
        Schedule.load(path)


def test_a_newer_format_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "2.json"
    SCHEDULE.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(NewerBundle):
        Schedule.load(path)


def test_a_missing_file_is_told_of_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"2\.json cannot be read: "):
        Schedule.load(tmp_path / "2.json")
