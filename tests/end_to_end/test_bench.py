"""The benchmark's machinery, on the miniature models. What it measures is nobody's test."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_agent.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, out: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, str(ROOT / "deploy" / "bench"), "--quick", "--out", str(out), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    written = out / "bench.json"
    return finished, json.loads(written.read_text()) if written.exists() else {}


@pytest.mark.posix  # which tells what memory processes hold
@pytest.mark.parametrize(
    "group", ["decision", "agent", pytest.param("idle", marks=pytest.mark.linux), "import", "installed"]
)
def test_the_edges_rows_are_measured_and_written(group: str, routed_bundle: Path, tmp_path: Path) -> None:
    finished, record = bench("--only", group, "--bundle", str(routed_bundle), out=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert {row["group"] for row in record["rows"]} == {group}
    assert any(row["target"] for row in record["rows"])
    for row in record["rows"]:
        numbers = [row["measured"][name] for name in ("low", "value", "high")]
        assert all(map(math.isfinite, numbers)) and numbers == sorted(numbers)
        assert isinstance(row["met"], bool) == bool(row["target"])
        if row["unit"] == "MB":  # what a busy machine does not change
            assert row["met"] is not False, row
        assert row["what"] in (tmp_path / "bench.md").read_text()
    assert record["bundle"]["name"] == "miniature"
    assert record["machine"]["versions"]["onnxruntime"]


@pytest.mark.posix
def test_pixels_are_compared_with_those_of_the_same_weights(miniature_bundle: Path, tmp_path: Path) -> None:
    from tests.miniature import save_miniature

    model = save_miniature(tmp_path / "model")
    bundle = ("--bundle", str(miniature_bundle), "--model", str(model))
    finished, record = bench("--only", "diffusers", *bundle, out=tmp_path)
    assert finished.returncode == 0, finished.stderr
    pixels, *others = record["rows"]
    assert pixels["met"] and 0 < pixels["measured"]["value"] <= 1e-3
    assert [row["what"].split(" ÷ ")[0] for row in others] == [
        "time of an image",
        "time of a step",
        "cold start to first image",
        "peak memory to first image",
        "memory held after an image",
    ]
    for row in others:
        assert row["measured"]["value"] > 0 and row["met"] is None
        assert set(row["details"]) == {"edge", "diffusers"}
    image, step, _, peak, held = others
    for side in ("edge", "diffusers"):
        assert step["details"][side][0] < image["details"][side][0]
        # In MB. The kernel counts pages by the core, and a peak may be some pages behind.
        assert held["details"][side][0] <= peak["details"][side][0] + 1


def test_full_size_is_stable_diffusions_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without memory for them: the parameters that Stable Diffusion 1.5 is published with."""
    import torch

    monkeypatch.syspath_prepend(str(ROOT / "deploy" / "bench"))
    full_size = importlib.import_module("full_size")
    with torch.device("meta"):
        pipeline = full_size.pipeline()
    counts = {
        name: sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
        for name in ("text_encoder", "unet", "vae")
    }
    assert counts == {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 512


def test_a_folder_that_holds_other_things_is_not_made_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run that was broken off left is made anew; what somebody else put there stays."""
    monkeypatch.syspath_prepend(str(ROOT / "deploy" / "bench"))
    full_size = importlib.import_module("full_size")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").touch()
    assert full_size.main([str(tmp_path)]) == 2
    assert f"{tmp_path} holds other things" in capsys.readouterr().err
    assert (tmp_path / "model" / "thesis.tex").exists()


@pytest.mark.posix
def test_a_folder_of_full_size_may_be_a_link_to_a_disk_with_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what was broken off is made anew, in the same place."""
    monkeypatch.syspath_prepend(str(ROOT / "deploy" / "bench"))
    full_size = importlib.import_module("full_size")
    monkeypatch.setattr(
        full_size, "pipeline", lambda *_: SimpleNamespace(save_pretrained=lambda folder: folder.mkdir())
    )
    monkeypatch.setattr("export.diffusion_onnx.export_bundle", lambda _model, folder, **_: folder.mkdir())
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):
        assert full_size.main([str(tmp_path / "link")]) == 0
        assert sorted(file.name for file in (tmp_path / "disk").glob("[!.]*")) == ["bundle", "model"]
        (tmp_path / "disk" / "model" / "half").touch()
    assert full_size.main([str(tmp_path / "link")]) == 0
    assert not (tmp_path / "disk" / "model" / "half").exists()


@pytest.mark.posix
@pytest.mark.parametrize(
    ("row", "says"),
    [("headroom", "edge-export evaluate"), ("decision", "edge-export train"), ("diffusers", "--model")],
)
def test_a_row_that_cannot_be_measured_says_what_to_do(
    row: str, says: str, miniature_bundle: Path, tmp_path: Path
) -> None:
    missing = ("--model", str(tmp_path / "none"), "--evaluation", str(tmp_path / "none.json"))
    finished, record = bench("--only", row, "--bundle", str(miniature_bundle), *missing, out=tmp_path)
    assert finished.returncode == 1
    (only,) = record["rows"]
    assert only["measured"] is None and only["met"] is None
    assert says in only["note"]


@pytest.mark.posix
def test_an_evaluation_without_headroom_asks_for_more_labels(miniature_bundle: Path, tmp_path: Path) -> None:
    digest, untold = Bundle.open(miniature_bundle).model_digest, {"router": "predictor", "headroom": None}
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps({"edge_digest": digest, "routers": [untold]}))
    options = ("--bundle", str(miniature_bundle), "--evaluation", str(evaluation))
    finished, record = bench("--only", "headroom", *options, out=tmp_path)
    assert finished.returncode == 1, finished.stderr
    assert "too few" in record["rows"][0]["note"]


@pytest.mark.posix
@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"routers": [{}]}'])
def test_what_is_no_evaluation_is_called_that(text: str, miniature_bundle: Path, tmp_path: Path) -> None:
    (evaluation := tmp_path / "evaluation.json").write_text(text)
    options = ("--bundle", str(miniature_bundle), "--evaluation", str(evaluation))
    finished, record = bench("--only", "headroom", *options, out=tmp_path)
    assert finished.returncode == 1, finished.stderr
    assert "is no evaluation" in record["rows"][0]["note"]


def test_where_nothing_can_be_written_nothing_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finished, _ = bench(out=tmp_path / "file" / "out")
    assert finished.returncode == 2
    assert str(tmp_path / "file") in finished.stderr and "Traceback" not in finished.stderr


def test_without_a_bundle_nothing_starts(tmp_path: Path) -> None:
    finished, record = bench("--bundle", str(tmp_path / "none"), out=tmp_path)
    assert finished.returncode == 2
    assert "no bundle" in finished.stderr and "Traceback" not in finished.stderr
    assert record == {}
