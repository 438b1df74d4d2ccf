"""The table says of every form what it costs and what it loses, against float32 on the same seeds."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edge_agent.bundle import Bundle
from edge_agent.superiority import METRICS
from export import precision, precision_table
from export.errors import ExportError
from export.precision_table import Form, Measured, forms, measure, report, spread
from export.quality import Judge
from export.starter.shipped import STARTER_JUDGE

PROMPTS = ("a cat", "two dogs on a beach", "a red moon")
FP32, FP16 = Form("fp32", "fp32"), Form("fp16", "fp16")


@pytest.fixture(scope="module")
def measured(routed_bundle: Path) -> list[Measured]:
    return measure(routed_bundle, (FP32, FP16), PROMPTS, PROMPTS, Judge(), turns=2)


def test_float32_differs_from_itself_by_nothing_and_half_precision_by_little(
    measured: list[Measured],
) -> None:
    fp32, fp16 = measured
    assert fp32.loss.largest == 0.0
    assert 0 < fp16.loss.largest < 0.1
    assert fp16.cost.bytes < fp32.cost.bytes
    assert fp32.quality.shape == fp16.quality.shape == (len(PROMPTS), len(METRICS))
    assert np.abs(fp16.quality - fp32.quality).max() < 0.05


def test_costs_are_those_of_every_turn(measured: list[Measured]) -> None:
    for one in measured:
        assert len(one.cost.seconds) == 2 and min(one.cost.seconds) > 0
        assert one.cost.peak_bytes >= one.cost.idle_bytes > one.cost.bytes


def test_float32_is_timed_beside_each_other_form_and_no_third_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[str] = []
    takes = {"fp32": 2.0, "fp16": 3.0, "int8": 1.0}

    @contextmanager
    def painting(folder: Path) -> Iterator[Any]:
        def painted(_prompt: str, _seed: int) -> dict[str, float]:
            assert len(alive) <= 2 and folder.name in alive
            return {"seconds": takes[folder.name], "loaded": 0.0, "peak": 0.0, "idle": 0.0}

        alive.append(folder.name)
        yield painted
        alive.remove(folder.name)

    monkeypatch.setattr(precision_table, "_painting", painting)
    costs = precision_table._costs([tmp_path / name for name in takes], PROMPTS, turns=3)
    assert [cost.ratios.tolist() for cost in costs] == [[1.0] * 3, [1.5] * 3, [0.5] * 3]
    assert [len(cost.seconds) for cost in costs] == [6, 3, 3]


def test_the_float32_forms_calibration_judges_every_forms_decisions(
    measured: list[Measured], routed_bundle: Path
) -> None:
    """A smaller form has another digest, for which the calibration would not count."""
    fp32, fp16 = measured
    assert fp32.prs is not None and fp16.prs is not None
    assert 0 < np.abs(fp16.prs - fp32.prs).max() < 0.05


def test_the_report_names_every_form_and_metric(measured: list[Measured], routed_bundle: Path) -> None:
    text = report(routed_bundle, measured, "edge-export precision")
    assert text.startswith(precision_table.BEGINS)  # or it would not be taken for the command's own
    for name in ("fp32", "fp16", *METRICS):
        assert f"| {name} |" in text
    assert Bundle.open(routed_bundle).model_digest[:16] in text


def test_a_form_says_which_parts_half_precision_does_not_hold(
    routed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = precision._to_half

    def decoder_overflows(graph: Path, feeds: Any) -> None:
        if graph.parent.name == "vae_decoder":
            raise precision._BeyondHalf("it computes with values up to 1.5e+06")
        half(graph, feeds)

    monkeypatch.setattr(precision, "_to_half", decoder_overflows)
    (_, found) = measure(routed_bundle, (FP32, FP16), PROMPTS, PROMPTS, Judge(), turns=1)
    assert found.form.name == "fp16, vae_decoder in fp32"


def test_forms_are_all_parts_and_each_alone(routed_bundle: Path) -> None:
    found = forms(Bundle.open(routed_bundle))
    assert [form.name for form in found] == [
        "fp32", "fp16", "int8", "int8 text_encoder", "int8 unet", "int8 vae_decoder",
    ]  # fmt: skip
    assert found[4].keep == ("text_encoder", "vae_decoder")


@pytest.mark.posix
def test_a_form_that_finds_no_room_is_said_in_a_sentence(routed_bundle: Path) -> None:
    """A limit on the size of files stands for it."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(
            ExportError, match=r"^\S+ cannot be copied to .*; for room, name another folder in TMPDIR$"
        ):
            measure(routed_bundle, (FP32,), PROMPTS, PROMPTS, Judge(), turns=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.posix
def test_a_form_hears_no_ctrl_c_of_its_own_and_ends_with_the_command(
    routed_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        with precision_table._painting(routed_bundle) as painted:
            painted(PROMPTS[0], 1)
            (child,) = set(psutil.Process().children()) - others
            child.send_signal(signal.SIGINT)  # as a terminal does to all
            assert painted(PROMPTS[0], 2)["seconds"] > 0
            raise KeyboardInterrupt

    others = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(psutil.Process().children()) == others
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["--number", "0"], ["--out", "FILE/p.md"]])
def test_what_cannot_be_measured_or_written_is_refused_before_the_work(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "FILE").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(precision_table, "measure", None)
    with pytest.raises((ExportError, SystemExit), match=r"2|cannot be made"):
        precision_table.main(arguments)


@pytest.mark.parametrize("named", [[], ["--prompts", "mine.txt"], ["--judge", str(STARTER_JUDGE)]])
def test_a_bundle_of_ones_own_is_not_measured_by_the_starters_world(
    routed_bundle: Path, named: list[str]
) -> None:
    with pytest.raises(ExportError, match="name prompts with --prompts FILE, and a CLIP with --judge"):
        precision_table.main([str(routed_bundle), *named])


def test_a_bundle_of_ones_own_makes_images_of_ones_own_prompts(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("a boat\n\na cat\na dog\n")
    asked: list[list[str]] = []

    def measured(_bundle: Path, _forms: object, prompts: list[str], *_others: object) -> list[Measured]:
        asked.append(prompts)
        raise ExportError("enough")

    monkeypatch.setattr(precision_table, "measure", measured)
    named = ["--prompts", "mine.txt", "--judge", str(STARTER_JUDGE), "--number", "2"]
    with pytest.raises(ExportError, match="enough"):
        precision_table.main([str(routed_bundle), *named])
    assert asked == [["a boat", "a cat"]]


def test_an_interval_leaves_zero_out_only_where_the_difference_is_there() -> None:
    noise = np.random.default_rng(0).normal(0.0, 1.0, 400)
    found = spread(noise)
    assert found.low < 0 < found.high and found.low < found.value < found.high
    assert spread(noise + 0.5).low > 0
