from __future__ import annotations

import csv
import multiprocessing
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from edge_agent.superiority import METRICS
from export.__main__ import INTERRUPTED, main, run
from export.bootstrap import Estimate
from export.errors import ExportError
from export.outcomes import Outcomes
from export.routerbench import ceiling, routers
from export.routerbench.comparison import _longest_first
from export.routerbench.fitting import Data, ending, fit, leave_interrupts, worth
from export.routerbench.measure import (
    RATES,
    RESAMPLES,
    Bench,
    Point,
    Sampled,
    aiq,
    apgr,
    counted_metrics,
    cpt,
    difference,
    directions,
    saved_at_dp,
    share_at_dp,
)
from export.routerbench.report import RESULTS, SUMMARY, Apart, _ceiling, _untold, _verdict
from export.routerbench.router import Prompts, Scorer
from export.routerbench.routers import ROUTERS, ByGain, NearestNeighbours, Ours, Random, RouteT2I
from tests.export.routing_world import write_bundle, write_labels


class World:
    """A world in which some objects are hard for the edge, so that a router can learn."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bundle = folder, write_bundle(folder / "bundle")
        self.labels = write_labels(folder / "labels.parquet", 240)
        self.outcomes = Outcomes.read(self.labels)
        self.scenes = self.outcomes.scenes()
        self.data = Data.of(self.outcomes, self.bundle, self.scenes, folder)
        self.test = self.outcomes.split("test")

    def said(self, split: str) -> np.ndarray:
        return self.scenes[self.outcomes.splits == split]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fraction of the steps: the prompts are few."""
    monkeypatch.setattr(routers, "STEPS", 30)
    for kind in (routers.RouteT2I, routers.Ours):
        monkeypatch.setattr(kind, "recipe", replace(kind.recipe, steps=60))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("world"))


class Longest:
    """The example of docs/routerbench.md: a router is one class."""

    name = "most letters"
    settings = ({"power": 1.0},)

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        return lambda prompts: -np.array([len(text) ** setting["power"] for text in prompts.texts])


@pytest.fixture(scope="module")
def bench(world: World) -> Bench:
    """Only to be read."""
    prompts, test = world.data.others["test"], world.test
    each = prompts.superiority(torch.from_numpy(test.edge_seeds), torch.from_numpy(test.cloud_seeds))
    counted = counted_metrics(world.outcomes.split("train"))
    return Bench(test, each, counted, world.said("test"))


def test_random_wins_its_share_and_knowing_the_gain_wins_more_than_the_oracle(bench: Bench) -> None:
    gain = bench.gaps.mean(1)
    ties, hindsight = bench.points([np.zeros(len(gain))]), bench.points([-gain])
    for rate, chance, best in zip(RATES, ties, hindsight, strict=True):
        assert chance.headroom.value == pytest.approx(0, abs=1e-9)
        assert chance.pgr.value == pytest.approx(rate)
        assert best.headroom.value >= 1 - 1e-9
    for wanted, found in ((0.5, apgr(ties)), (0.5, cpt(ties, 0.5)), (0.8, cpt(ties, 0.8))):
        assert (found.value, found.low, found.high) == pytest.approx((wanted, wanted, wanted))
    assert apgr(hindsight).low > 0.5
    assert cpt(hindsight, 0.5).high < 0.5


def test_what_is_told_over_all_rates_is_told_of_each_resample_as_of_the_whole(bench: Bench) -> None:
    points = bench.points([np.random.default_rng(0).random(len(bench.gaps))])

    def told(some: Sequence[Point], edge: np.ndarray, cloud: np.ndarray) -> list[Estimate]:
        return [apgr(some), cpt(some, 0.8), aiq(some, edge, cloud), share_at_dp(some, 30)]

    whole, alone = told(points, bench.edge, bench.cloud), []
    assert bench.edge[0] < whole[2].low < whole[2].value < whole[2].high < bench.cloud[0]
    for resample in range(1, 1 + RESAMPLES):
        chosen = np.array([resample, resample])  # as the value, and as the only sample of its interval
        some = [
            replace(
                point,
                pgr=Sampled.of(point.pgr.samples[chosen]),
                delta_p=Sampled.of(point.delta_p.samples[chosen]),
            )
            for point in points
        ]
        alone.append([each.value for each in told(some, bench.edge[chosen], bench.cloud[chosen])])
    low, high = np.nanquantile(alone, (0.025, 0.975), axis=0)
    assert [each.low for each in whole] == pytest.approx(low.tolist())
    assert [each.high for each in whole] == pytest.approx(high.tolist())


def test_the_first_prompts_of_scenes_are_measured_by_as_many_images_as_all_of_them(world: World) -> None:
    """They may all be of those for the ceiling, which have more."""
    prompts, test = world.data.others["test"], world.test
    each = prompts.superiority(torch.from_numpy(test.edge_seeds), torch.from_numpy(test.cloud_seeds))
    twice = {name: np.tile(getattr(test, name), (1, 2, 1)) for name in ("edge_seeds", "cloud_seeds")}
    counted = counted_metrics(world.outcomes.split("train"))
    benches = [Bench(part, each, counted, world.said("test")) for part in (test, replace(test, **twice))]
    few, more = (each.oracle_points() for each in benches)
    assert [point.win_gain for point in more] == [point.win_gain for point in few]


def test_a_router_never_beats_itself(bench: Bench) -> None:
    points = bench.points([np.random.default_rng(0).random(len(bench.gaps))])
    apart = difference(points, points, RATES)
    assert (apart.value, apart.low, apart.high) == (0, 0, 0)


def test_a_difference_is_paired_and_of_the_rates_that_are_asked_for(bench: Bench) -> None:
    gain = bench.gaps.mean(1)
    hindsight, ties = bench.points([-gain]), bench.points([np.zeros(len(gain))])
    apart = difference(hindsight, ties, (0.5,))
    captured = hindsight[4].headroom
    assert (apart.value, apart.low, apart.high) == pytest.approx(
        (captured.value, captured.low, captured.high)
    )
    mean = np.mean([point.headroom.value for point in hindsight])
    assert difference(hindsight, ties, RATES).value == pytest.approx(mean)


@pytest.mark.timeout(60)
def test_an_error_or_an_interrupt_waits_for_nothing_that_a_process_is_at(tmp_path: Path) -> None:
    def interrupted(_argv: object) -> int:
        with ProcessPoolExecutor(1, initializer=leave_interrupts) as pool, ending(pool):
            pool.submit((tmp_path / "begun").touch)
            for _ in range(3):
                pool.submit(time.sleep, 600)
            while not (tmp_path / "begun").exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    assert run(interrupted) == INTERRUPTED
    while multiprocessing.active_children():
        time.sleep(0.01)


def test_ours_is_started_first_and_what_takes_seconds_last() -> None:
    started = [router.name for router in _longest_first([kind() for kind in ROUTERS])]
    assert started[0] == "ours"
    settings = {kind.name: len(kind.settings) for kind in ROUTERS}
    counts = [settings[name] for name in started[1:]]
    assert counts == sorted(counts, reverse=True)
    assert started[-3:] == ["number of objects", "prompt length", "random"]


def test_gaps_that_move_together_have_few_directions_whatever_their_units() -> None:
    draw = np.random.default_rng(0)
    two = draw.standard_normal((4000, 2)).astype(np.float32)
    together = np.stack([two[:, 0], 1000 * two[:, 1], two[:, 0] - two[:, 1], two.sum(1)], axis=1)
    assert directions(together) == 2
    assert directions(together[:, :1]) == 1
    still = np.full((4000, 1), 0.3, np.float32)
    assert directions(np.hstack([together, still])) == 2
    assert directions(still) == 0
    assert directions(draw.standard_normal((4000, 4)).astype(np.float32)) == 4


def test_a_verdict_says_which_measure_it_rests_on_and_what_the_others_say() -> None:
    costs, helps, neither = Estimate(0.1, 0.05, 0.2), Estimate(-0.1, -0.2, -0.05), Estimate(0.0, -0.1, 0.1)
    drawn, once = "mean over all rates, as drawn", "mean over all rates, each scene once"
    assert _verdict(Apart(costs, costs, costs)) == "yes, by all three"
    assert _verdict(Apart(neither, neither, neither)) == "not that could be told, by all three"
    assert _verdict(Apart(helps, neither, costs)) == (
        f"yes: {once}; no, better without: at 50 %; not that could be told: {drawn}"
    )
    assert _verdict(Apart(neither, neither, costs)) == (
        f"yes: {once}; not that could be told: at 50 % and {drawn}"
    )


@pytest.mark.parametrize("kind", ROUTERS, ids=lambda kind: kind.name)
def test_every_router_can_be_fitted_again_and_scores_without_outcomes(kind: type, world: World) -> None:
    router, test = kind(), world.data.others["test"]
    unknown = torch.full_like(test.examples.edge, torch.nan)
    blind = replace(test, examples=replace(test.examples, edge=unknown, cloud=unknown))
    setting = router.settings[0]
    scores = [router.fit(world.data.train, world.data.validation, 0, **setting)(blind) for _ in range(2)]
    assert scores[0].shape == (len(test),)
    assert np.isfinite(scores[0]).all()
    np.testing.assert_array_equal(*scores)


def test_a_router_that_learns_wins_more_than_chance(world: World) -> None:
    (ours,) = [kind for kind in ROUTERS if kind.name == "ours"]
    (fitted,), test = fit(ours(), world.data), world.data.others["test"]
    assert len(fitted.scores["test"]) == 3
    assert worth(fitted.scores["test"][0], test.gain) > 0.26 * test.gain.std()  # 0.23 after one step


def test_the_command_writes_its_tables_and_takes_a_router_of_one_s_own(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.routerbench import comparison

    few = tuple(kind for kind in ROUTERS if kind in (Random, NearestNeighbours, RouteT2I, ByGain, Ours))
    monkeypatch.setattr(comparison, "ROUTERS", few)
    monkeypatch.setattr(comparison, "BASELINES", few[:2])
    out = tmp_path / "out"
    labels, bundle = str(world.labels), str(world.bundle.folder)
    own = f"{__name__}:Longest"
    command = ["routerbench", "--labels", labels, "--bundle", bundle, "--out", str(out), "--seeds", "2"]
    assert main([*command, "--router", own]) == 0
    with (out / "results.csv").open() as file:
        results = list(csv.DictReader(file))
    assert tuple(results[0]) == RESULTS
    assert len(results) == 7 * len(RATES) + 1  # the oracle's curve and cloud-only beside the routers'
    with (out / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert tuple(summary[0]) == SUMMARY
    assert [row["router"] for row in summary] == [
        "random",
        "kNN",
        "routet2i",
        "routet2i, by expected gain",
        "ours",
        "most letters",
        "oracle",
    ]
    assert (out / "deferral.png").stat().st_size > 10_000
    assert list((out / "cache").glob("states-*.npz")) and not list(out.glob("*.npz"))
    assert f"{out / 'cache'} holds token states" in " ".join(capsys.readouterr().err.split())
    report = (out / "report.md").read_text()
    assert "most letters" in report
    assert re.search(
        r" \d directions have .* which is all of \d+% of the test prompts", " ".join(report.split())
    )
    best = re.search(r"The best baseline on validation is (.*?)\. ", report)
    assert best is not None
    for baseline in ("random", "kNN"):
        shown = f"**{baseline}**" if baseline == best[1] else baseline
        for router in ("ours", "routet2i"):
            assert len(re.findall(rf"^\| {router} \| {re.escape(shown)} \|.*\[.*\[.*\[", report, re.M)) == 1
    overall = report.partition("## Over all rates")[2].partition("CPT 50 and CPT 80 are")[0]
    for row in ("random", "ours", "oracle"):  # five measures, each with its interval
        assert len(re.findall(rf"^\| {row} \|( [^|]+ \[[^|]+\] \|){{5}}", overall, re.M)) == 1


@pytest.mark.parametrize("models", [["edge"], ["edge", "cloud"]])
def test_training_prompts_may_have_more_images_than_those_that_routers_are_measured_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: list[str]
) -> None:
    from export.routerbench import comparison

    monkeypatch.setattr(comparison, "ROUTERS", few := (Random, NearestNeighbours))
    monkeypatch.setattr(comparison, "BASELINES", few)
    table = pq.read_table(world.labels)
    learnt = pc.and_(pc.equal(table["split"], "train"), pc.is_in(table["model"], pa.array(models)))
    more = table.filter(learnt)
    more = more.set_column(table.column_names.index("seed"), "seed", pc.add(more["seed"], 2))
    pq.write_table(pa.concat_tables([table, more]), labels := tmp_path / "labels.parquet")
    command = ["routerbench", "--labels", str(labels), "--bundle", str(world.bundle.folder), "--seeds", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0


def test_a_router_is_found_in_the_folder_one_works_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.routerbench import comparison

    (tmp_path / "my_own_router.py").write_text(
        "class Mine:\n    name, settings = 'mine', ({},)\n    def fit(self): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert comparison._named("my_own_router:Mine").name == "mine"


def test_a_router_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routerbench", "--router", "nowhere:Router"]) == 2
    assert "package.module:Class" in capsys.readouterr().err


class Copied(Longest):
    name = "random"


class Oracle(Longest):
    name = "oracle"


class Peeking(Longest):
    name = "peeking"

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        return lambda prompts: -prompts.gain


class Undecided(Longest):
    name = "undecided"

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        return lambda prompts: np.full(len(prompts), np.nan)


class Mistaken(Longest):
    name = "mistaken"

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        return lambda prompts: prompts.lengths  # type: ignore[attr-defined]


class Commaless(Longest):
    name, settings = "commaless", ({"power": 1.0})  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--router", f"{__name__}:Commaless"], "not a class with a name, settings (at least one"),
        (["--router", f"{__name__}:Copied"], "called 'random' already: give your router another name"),
        (["--router", f"{__name__}:Oracle"], "called 'oracle' already: give your router another name"),
        (["--router", "export.prompts:Prompt"], "not a class with a name"),
        (["--router", "os:getcwd"], "not a class with a name"),
    ],
)
def test_what_is_no_router_of_its_own_is_refused_before_anything_is_read(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["routerbench", "--labels", "nowhere", *options]) == 2
    assert words in capsys.readouterr().err


def test_no_processes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["routerbench", "--processes", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_a_router_without_a_number_for_every_prompt_is_named(world: World) -> None:
    with pytest.raises(ExportError, match=r"'undecided' scored .* 0 of it finite"):
        fit(Undecided(), world.data)


def test_a_router_that_fails_is_named_with_the_line(world: World) -> None:
    with pytest.raises(
        ExportError, match=r"'mistaken' failed: AttributeError: .*test_routerbench\.py, line \d+"
    ):
        fit(Mistaken(), world.data)


def test_a_router_is_asked_before_anything_came_of_a_prompt(world: World) -> None:
    with pytest.raises(ExportError, match=r"'peeking' scored .* 0 of it finite"):
        fit(Peeking(), world.data)


def test_what_ranks_the_same_networks_otherwise_need_not_train_them_again(world: World) -> None:
    by_prs, by_gain = fit(RouteT2I(), world.data, ByGain())
    (trained_again,) = fit(ByGain(), world.data)
    assert (by_prs.name, by_gain.name) == (RouteT2I.name, ByGain.name)
    for ours, theirs in zip(by_gain.scores["test"], trained_again.scores["test"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(
        (one != other).any() for one, other in zip(by_prs.scores["test"], by_gain.scores["test"], strict=True)
    )


def test_only_metrics_on_which_the_models_differ_make_dp(world: World) -> None:
    train = world.outcomes.split("train")
    counted = counted_metrics(train)
    assert counted.shape == (len(METRICS),)
    assert counted.any()
    blurred = train.cloud_seeds.copy()
    alike = int(np.argmax(counted))
    blurred[..., alike] = train.edge_seeds[..., alike]
    blurred[::2, :, alike] += 0.01  # within noise
    blurred[1::2, :, alike] -= 0.01
    assert not counted_metrics(replace(train, cloud_seeds=blurred))[alike]


def test_the_inspector_finds_no_more_with_a_router_than_with_itself(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, seeds = np.random.default_rng(0), bench.paired.shape[:2]
    scores = [draw.random(len(bench.gaps))]
    monkeypatch.setattr(bench, "verdicts", (draw.integers(0, 2, seeds).astype(float), np.ones(seeds)))
    same = bench.found_difference(scores, scores, RATES)
    assert same is not None and (same.value, same.low, same.high) == (0, 0, 0)
    by_wish = bench.found_difference([bench.verdicts[0].mean(axis=1)], None, (0.5,))
    assert by_wish is not None and by_wish.low > 0


@pytest.mark.parametrize("better", [0.0, 0.03])
def test_models_whose_gap_is_the_same_everywhere_leave_nothing_to_route(
    world: World, bench: Bench, better: float
) -> None:
    edge = 0.9 * world.test.edge_seeds
    even = replace(world.test, edge_seeds=edge, cloud_seeds=edge + np.float32(better))
    assert counted_metrics(even).any() == (better > 0)
    with pytest.raises(ExportError, match="the oracle wins what random wins"):
        Bench(even, bench.better, bench.counted, world.said("test"))


def test_where_the_oracle_may_win_no_more_than_random_there_is_no_headroom() -> None:
    draw, (prompts, seeds, metrics) = np.random.default_rng(0), (300, 4, len(METRICS))
    truth = draw.normal(0.02, 0.015, prompts)
    edge = 0.6 + draw.normal(0, 0.03, (prompts, seeds, 1)) + np.zeros(metrics)
    cloud = 0.6 + truth[:, None, None] + draw.normal(0, 0.03, (prompts, seeds, 1)) + np.zeros(metrics)
    ids, splits = np.arange(prompts), np.full(prompts, "test")
    noisy = Outcomes(ids, tuple(map(str, ids)), splits, ids, edge, cloud, None, None, {})
    found = Bench(noisy, draw.random((prompts, seeds)), np.full(metrics, True), ids)
    points, ties = found.points([-truth]), found.points([np.zeros(prompts)])
    above = {rate: found.oracle_gains[rate].mean(axis=1) - found._random(rate) for rate in RATES}
    assert found.told == {rate for rate, won in above.items() if won.min() > 1e-5}
    assert 0 < len(found.told) < len(RATES)
    for point in points:
        assert np.isnan(point.headroom.value) == (point.rate not in found.told)
    assert not np.isnan(difference(points, ties, tuple(found.told)).value)
    assert np.isnan(difference(points, ties, RATES).value)


def test_the_report_says_why_headroom_is_left_empty() -> None:
    known, unknown = Estimate(0.1, 0.05, 0.2), Estimate(np.nan, np.nan, np.nan)
    assert not _untold({"ours": {"random": Apart(known, known, known)}})
    lines = _untold({"ours": {"random": Apart(known, known, known), "kNN": Apart(known, known, unknown)}})
    assert "the oracle wins no more than random" in " ".join(lines)


def test_of_what_an_oracle_does_not_win_the_report_tells_no_shares() -> None:
    """Nor a number of sentences of one scene, where no two test prompts are."""
    shares = dict.fromkeys(ceiling.KINDS, 0.25)
    found = SimpleNamespace(
        ceiling=ceiling.Ceiling(shares, [(30, 0.5)], np.zeros(2)),
        sentences=0.9,
        images=4,
        oracle=[(1, 0.001), (3, 0.002)],
        oracle_prompts=12,
        foreseen={"ours": 0.001},
    )
    whole = " ".join(" ".join(_ceiling(found)).split())
    assert (
        "share its gain: 90% of the expected gain's variance lies between them on the test prompts." in whole
    )
    assert "Of what the last of them wins there, at 50 %, ours wins 0.50." in whole
    found.sentences, found.oracle[-1] = np.nan, (3, -0.002)
    whole = " ".join(_ceiling(found))
    assert "nan" not in whole and "ours wins" not in whole
    assert "No two of the test prompts say one scene." in whole and "wins no more than random there" in whole


def test_calls_saved_have_an_interval_and_none_where_it_is_never_reached(bench: Bench) -> None:
    hindsight, all_of_it = bench.points([-bench.gaps.mean(1)]), bench.cloud_only()
    saved = saved_at_dp(hindsight, all_of_it, 0.5 * all_of_it.delta_p.value)
    assert 0 < saved.low <= saved.value <= saved.high < 1
    assert np.isnan(saved_at_dp(hindsight, all_of_it, 1000.0).value)


def test_a_matrix_that_lacks_what_routers_are_measured_by_is_refused_before_minutes_are_spent(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(world.labels)
    lacking = tmp_path / "lacking.parquet"
    pq.write_table(table.filter(pc.not_equal(table["split"], "validation")), lacking)
    assert main(["routerbench", "--labels", str(lacking), "--bundle", str(world.bundle.folder)]) == 2
    assert "'validation'" in capsys.readouterr().err
    ids, seeds, splits = (
        table[name].to_numpy(zero_copy_only=False) for name in ("prompt_id", "seed", "split")
    )
    verdicts = pa.array(np.where((splits == "test") & (seeds == 1), np.nan, 1.0))
    pq.write_table(table.append_column("inspected", verdicts), lacking)
    assert main(["routerbench", "--labels", str(lacking), "--bundle", str(world.bundle.folder)]) == 2
    assert f"prompt {ids[splits == 'test'].min()} has a verdict on 2 of its 4" in capsys.readouterr().err
