"""A calibration survives its file, gives the threshold for a rate, and is refused when it is inconsistent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.calibration import Calibration
from edge_agent.errors import BundleError

CALIBRATION = Calibration(
    edge_digest="a" * 64,
    cloud_digest="b" * 64,
    metrics=(("definition", "high definition", "low definition"), ("color", "vivid 🎨", "washed out")),
    scale=(0.1, 0.2),
    weights=(0.25, 0.75),
    scores=(0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9),
    created="2026-01-02T03:04:05Z",
    familiar=(3, 7),
    recipe={"seed": 1},
)


def test_comes_back_from_its_file_with_an_id(tmp_path: Path) -> None:
    saved = CALIBRATION.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == saved
    assert len(saved.calibration_id) == 16
    assert saved == replace(CALIBRATION, calibration_id=saved.calibration_id)


def test_one_of_an_earlier_version_knows_no_familiar_tokens(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    CALIBRATION.save(path)
    document = json.loads(path.read_text())
    del document["familiar"]
    path.write_text(json.dumps(document))
    assert Calibration.load(path).familiar == ()


def test_the_id_depends_on_the_content(tmp_path: Path) -> None:
    saved = CALIBRATION.save(tmp_path / "one.json")
    other = replace(CALIBRATION, cloud_digest="c" * 64).save(tmp_path / "two.json")
    assert saved.calibration_id != other.calibration_id


@pytest.mark.parametrize(("rho", "alpha"), [(0.0, 0.1), (0.25, 0.3), (0.375, 0.4), (0.5, 0.5), (1.0, 0.5)])
def test_alpha_sends_at_most_the_rate_and_is_at_most_one_half(rho: float, alpha: float) -> None:
    assert CALIBRATION.alpha(rho) == alpha


def test_a_rate_above_one_half_is_kept_to_where_the_cloud_is_that_often_better() -> None:
    assert replace(CALIBRATION, scores=(0.1, 0.2, 0.3, 0.4)).alpha(0.75) == 0.4


def test_a_missing_file_is_told_of_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"calibration\.json cannot be read: "):
        Calibration.load(tmp_path / "calibration.json")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scale": [0.1]}, "same length"),
        ({"weights": []}, "same length"),
        ({"scale": [0.1], "weights": [1.0]}, "same length"),
        ({"metrics": [], "scale": [], "weights": []}, "same length"),
        ({"scale": [0.1, 0.0]}, "scale must be positive"),
        ({"scale": [0.1, float("nan")]}, "scale must be positive"),
        ({"scale": [0.1, float("inf")]}, "scale must be positive and finite"),
        ({"weights": [1.5, -0.5]}, "weight"),
        ({"weights": [0.5, 0.6]}, "weight"),
        ({"scores": []}, "at least one score"),
        ({"scores": [0.2, 0.1]}, "ascending"),
        ({"scores": [0.2, float("inf")]}, "finite"),
        ({"metrics": [["only a name"]] * 2}, "not a calibration"),
        ({"scale": None}, "not a calibration"),
        ({"familiar": ["word"]}, "not a calibration"),
        ({"scale": [10**400] * 2}, "not a calibration"),
        ({"edge_digest": "red\x1b[31m"}, "edge_digest must be printable"),
        ({"cloud_digest": "\ud800"}, "cloud_digest must be printable"),
    ],
)
def test_an_inconsistent_file_is_refused_by_name(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = tmp_path / "calibration.json"
    CALIBRATION.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=rf"calibration\.json.*{why}"):
        Calibration.load(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000 + b"]" * 100_000])
def test_a_file_that_is_no_calibration_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"calibration\.json is not a calibration"):
        Calibration.load(path)


def test_an_inconsistent_calibration_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="ascending"):
        replace(CALIBRATION, scores=(0.2, 0.1)).save(tmp_path / "calibration.json")
    assert not (tmp_path / "calibration.json").exists()
