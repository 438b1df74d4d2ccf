"""The benchmark's machinery, on the miniature models. What it measures is nobody's test."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edge_agent.bundle import Bundle
from edge_agent.diffusion.generator import Generator, Image
from edge_agent.image import encode_png

ROOT = Path(__file__).resolve().parents[2]

Part = Callable[[str], Any]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Part:
    """A module of the benchmark by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "deploy" / "bench"))
    return importlib.import_module


def planned(part: Part, bundle: Path) -> Any:
    nowhere = Path("none")
    return part("plan").Plan(bundle, nowhere, nowhere, nowhere, threads=1).quick


def turns() -> Callable[[list[float]], Any]:
    """What stands in the place of `clock.timed`: it appends in which place each series had its turn, not how long."""
    count = itertools.count()

    @contextmanager
    def timed(series: list[float]) -> Iterator[None]:
        series.append(next(count))
        yield

    return timed


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


def test_an_interval_is_that_of_the_quantile_itself(part: Part) -> None:
    """95 % of it, by theory 1.96 standard deviations of 9.5 to either side."""
    found = part("estimate").quantile(range(1001), 0.9)
    assert (found.value, found.n) == (900, 1001)
    assert found.low == pytest.approx(900 - 18.6, abs=3) and found.high == pytest.approx(900 + 18.6, abs=3)
    assert part("estimate").quantile([1.0, 2.0, 9.0]).value == 2


def test_ratios_are_of_pairs_and_of_calm_moments_ours_over_theirs(part: Part) -> None:
    estimate = part("estimate")
    ours, theirs = [1.0, 4.0, 30.0], [2.0, 1.0, 10.0]
    assert estimate.ratio(ours, theirs).value == 3
    assert estimate.ratio_both_ways(ours, theirs) == estimate.Estimate.exact(5 / 3)
    assert estimate.calm(range(101)) == 10
    assert estimate.calm_ratio(range(101), range(0, 202, 2)) == 0.5


def test_a_decision_is_measured_beside_the_calls_before_and_behind_it_and_beside_an_image(
    routed_bundle: Path, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = part("decision")
    found: dict[str, Any] = {
        "decision_ms": [2.0, 3.0, 4.0, 5.0],
        "bare_ms": [1.0, 1.0, 2.0, 2.0],
        "image_ms": [50.0],
        "stages_ms": {"encode": [1.5] * 4, "predict": [0.2] * 4, "decide": [0.1] * 4},
    }
    monkeypatch.setattr(decision, "asked", lambda *_: found)
    ratio, predict, whole, share = decision.rows(planned(part, routed_bundle))
    assert ratio.measured.value == (5 / 2 + 9 / 4) / 2 and ratio.met is False
    assert "encode 1.50, predict 0.20, decide 0.10, quota and threads 1.70 ms" in ratio.note
    assert predict.measured.value == predict.calm == pytest.approx(0.3) and predict.met is True
    assert whole.measured.value == pytest.approx(np.quantile(found["decision_ms"], 0.95))
    assert share.measured.value == pytest.approx(7) and share.met is False


async def test_either_of_decision_and_bare_calls_comes_first_for_each_prompt(
    routed_bundle: Path, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = part("decision")
    asked: list[str] = []
    bare = {prompt: lambda prompt=prompt: asked.append(prompt) for prompt in decision.PROMPTS}
    monkeypatch.setattr(decision, "bare_calls", lambda _: bare)
    monkeypatch.setattr(decision, "draw", lambda *_, **__: None)
    monkeypatch.setattr(decision, "timed", turns())
    found = await decision.measure(routed_bundle, 8, 2)
    first = [ours < theirs for ours, theirs in zip(found["decision_ms"], found["bare_ms"], strict=True)]
    assert first == [True, False] * 4
    assert asked[len(decision.PROMPTS) :] == [prompt for prompt in decision.PROMPTS[:4] for _ in range(2)]
    assert len(found["image_ms"]) == 2
    assert {"predict", "decide"} <= set(found["stages_ms"]) and "total" not in found["stages_ms"]
    assert {len(values) for values in found["stages_ms"].values()} == {8}


@pytest.mark.parametrize(
    ("agent", "met"), [([103.0, 206.0], True), ([102.9, 204.0], True), ([104.0, 208.0], False)]
)
def test_what_the_agent_adds_is_little_in_percent_or_in_milliseconds(
    part: Part, monkeypatch: pytest.MonkeyPatch, agent: list[float], met: bool
) -> None:
    overhead = part("overhead")
    found = {"agent_ms": agent, "direct_ms": [100.0, 200.0], "status_ms": [0.5] * 2, "stream_ms": [1.0] * 2}
    monkeypatch.setattr(overhead, "asked", lambda *_: found)
    added, stream = overhead.rows(planned(part, Path("none")))
    assert added.measured.value == pytest.approx(agent[0] - 100, abs=0.5) and added.met is met
    assert (stream.measured.value, stream.met) == (1, None)


@pytest.mark.parametrize("another", [0, 1])
def test_the_agents_image_is_drawn_in_turns_with_the_same_calls_and_is_theirs(
    miniature_bundle: Path, part: Part, monkeypatch: pytest.MonkeyPatch, another: int
) -> None:
    overhead = part("overhead")
    bundle, generator = Bundle.open(miniature_bundle), Generator(Bundle.open(miniature_bundle))
    pauses: list[float] = []

    class Answer:
        """Of an agent that draws what it is asked for, or something else."""

        sizes = (1, 2, 3)

        def __init__(self, _: Any) -> None:
            """There is nobody to ask."""

        def image(self, prompt: str, seed: int) -> bytes:
            states, negative = generator.encode(prompt)[1], generator.encode_negative("")
            steps, guidance = bundle.manifest.default_steps, bundle.manifest.default_guidance
            *_, image = generator.generate(states, negative, seed + another, steps, guidance)
            assert isinstance(image, Image)
            return encode_png(image.pixels)

        def end(self) -> None:
            """At once."""

    def stream(_sizes: Sequence[int], pause_s: float) -> float:
        pauses.append(pause_s)
        return 0.002

    monkeypatch.setattr(overhead, "Answer", Answer)
    monkeypatch.setattr(overhead, "running_agent", lambda *_: nullcontext((None, 0)))
    monkeypatch.setattr(overhead, "running_stream", lambda: nullcontext(stream))
    monkeypatch.setattr(overhead, "timed", turns())
    if another:
        with pytest.raises(part("errors").BenchError, match="is not the one that the same calls make"):
            overhead.measure(miniature_bundle, 1, 6)
        return
    found = overhead.measure(miniature_bundle, 1, 6)
    assert {name: len(series) for name, series in found.items()} == dict.fromkeys(overhead.SERIES, 6)
    first = [agent < direct for agent, direct in zip(found["agent_ms"], found["direct_ms"], strict=True)]
    assert first == [True, False] * 3  # of three each daemon draws, the first warms it up
    assert all(done > made for made, done in zip(found["agent_ms"], found["status_ms"], strict=True))
    assert found["stream_ms"] == [2.0] * 6
    assert set(found["direct_ms"]) < {pause * 1e3 for pause in pauses}  # as long as the calls took


def test_memory_is_compared_between_a_quarter_and_the_end_of_the_cancellations(
    part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then allocators fill their caches."""
    cancellation = part("cancellation")
    idle_mb = [50.0, 60.0, 70.0, 80.0, 90.0, 99.0, 91.0, *[95.0] * 6, 94.0, 97.0, 98.0]
    found = {"free_ms": list(range(101)), "idle_mb": idle_mb}
    monkeypatch.setattr(cancellation, "asked", lambda *_: found)
    free, grown = cancellation.rows(planned(part, Path("none")))
    assert (free.measured.value, free.met) == (99, True)
    assert "p50 50.0 ms, longest 100 ms, of the 101 of 40" in free.note
    assert grown.measured.value == pytest.approx((97 + 98) / 2 - (90 + 99) / 2) and grown.met is True


@pytest.mark.posix
async def test_an_image_is_the_same_after_a_caller_has_left(miniature_bundle: Path, part: Part) -> None:
    """At random moments of eleven images, of which the first and the last find the models unloaded."""
    found = await part("cancellation").measure(miniature_bundle, 1, 11)
    assert len(found["idle_mb"]) == 2 and min(found["idle_mb"]) > 10
    assert len(found["free_ms"]) <= 11 and all(waited >= 0 for waited in found["free_ms"])


def test_a_table_shows_what_would_be_markup_elsewhere(part: Part, tmp_path: Path) -> None:
    row, estimate, report = part("row").Row, part("estimate").Estimate, part("report")
    rows = [
        row.at_most("a", "met", estimate(2.0, 1.5, 2.5, 9), "x", 2.0, note="[red] a|b\nc", calm=1.9),
        row.at_most("a", "missed", estimate.exact(2.1), "ms", 2.0),
        row.missing("b", "not there", "make it"),
    ]
    assert [(one.met, one.verdict) for one in rows] == [(True, "met"), (False, "missed"), (None, "-")]
    assert [one.shown for one in rows] == ["2.000 x [1.500, 2.500]", "2.10 ms", "not measured"]
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(report.table(rows))
    assert "[red] a|b" in console.export_text()
    machine = dict.fromkeys(("processor", "cores_used", "cores", "memory_gb", "system", "architecture"), 1)
    bundle = dict.fromkeys(("name", "width", "height", "steps", "guidance"), 1) | {"model_digest": "d1"}
    facts = {"machine": {**machine, "load_before": 0, "versions": {"numpy": "2"}}, "bundle": bundle}
    report.write(tmp_path, rows, facts)
    first, _, _ = (tmp_path / "bench.md").read_text().splitlines()[-3:]
    assert first == r"| met | 2.000 x [1.500, 2.500] | 1.900 x | <= 2 x | met | [red] a\|b c |"
    assert [one["met"] for one in json.loads((tmp_path / "bench.json").read_text())["rows"]] == [
        True,
        False,
        None,
    ]


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


def test_full_size_is_stable_diffusions_own(part: Part) -> None:
    """Counted without memory for them: the parameters that Stable Diffusion 1.5 is published with."""
    import torch

    full_size = part("full_size")
    with torch.device("meta"):
        pipeline = full_size.pipeline()
    counts = {
        name: sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
        for name in ("text_encoder", "unet", "vae")
    }
    assert counts == {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 512


def test_a_folder_that_holds_other_things_is_not_made_full_size(
    tmp_path: Path, part: Part, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run that was broken off left is made anew; what somebody else put there stays."""
    full_size = part("full_size")
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


def test_a_provider_that_cannot_be_used_is_said_before_anything_is_measured(
    miniature_bundle: Path, tmp_path: Path
) -> None:
    options = ("--providers", "abacus,cpu", "--bundle", str(miniature_bundle), "--only", "import")
    finished, record = bench(*options, out=tmp_path)
    assert finished.returncode == 2 and record == {}
    assert "names abacus, which this onnxruntime" in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.parametrize(("providers", "measured"), [("webgpu,cpu", 1), ("openvino,cpu", 0)])
def test_elsewhere_guidance_alone_is_measured_of_the_runtime_where_it_can_be_batched(
    part: Part, monkeypatch: pytest.MonkeyPatch, providers: str, measured: int
) -> None:
    runtime, asked = part("runtime"), []

    def found(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        return {"separate": [[2.0], [1.0]]}

    monkeypatch.setattr(runtime, "asked", found)
    guidance, *threads = runtime.rows(replace(planned(part, Path("none")), providers=providers))
    assert [arguments[-2:] for arguments in asked] == [(providers, "separate")] * measured
    assert (guidance.measured is not None) == bool(measured) and guidance.what == runtime.WHAT["separate"]
    assert [row.measured for row in threads] == [None] * 3


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
