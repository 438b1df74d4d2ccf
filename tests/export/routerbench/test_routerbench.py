from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.superiority import METRICS
from export.__main__ import main
from export.errors import ExportError
from export.outcomes import Outcomes
from export.prompts import scenes_by_text, scenes_of
from export.routerbench import routers
from export.routerbench.__main__ import Data, fit, worth
from export.routerbench.measure import RATES, Bench, apgr, counted_metrics, cpt
from export.routerbench.report import RESULTS, SUMMARY
from export.routerbench.router import Prompts, Scorer
from export.routerbench.routers import ROUTERS
from tests.export.routing_world import write_bundle, write_labels


class World:
    """A world in which some objects are hard for the edge, so that a router can learn."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bundle = folder, write_bundle(folder / "bundle")
        self.labels = write_labels(folder / "labels.parquet", 240)
        self.outcomes = Outcomes.read(self.labels)
        self.scenes = scenes_of(self.outcomes.prompts, scenes_by_text(self.outcomes.splits.tolist()))
        self.data = Data.of(self.outcomes, self.bundle, self.scenes, folder)
        self.test = self.outcomes.split("test")

    def said(self, split: str) -> np.ndarray:
        return self.scenes[self.outcomes.splits == split]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fraction of the steps: the prompts are few."""
    monkeypatch.setattr(routers, "STEPS", 90)
    monkeypatch.setattr(routers.RouteT2I, "steps", 180)
    monkeypatch.setattr(routers.Ours, "steps", 180)


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


@pytest.fixture
def bench(world: World) -> Bench:
    prompts, test = world.data.others["test"], world.test
    each = prompts.superiority(torch.from_numpy(test.edge_seeds), torch.from_numpy(test.cloud_seeds))
    counted = counted_metrics(world.outcomes.split("train"), world.said("train"))
    return Bench(test, each, counted, world.said("test"))


def test_random_wins_its_share_and_knowing_the_gain_wins_more_than_the_oracle(bench: Bench) -> None:
    gain = bench.gaps.mean(1)
    ties, hindsight = bench.points([np.zeros(len(gain))]), bench.points([-gain])
    for rate, chance, best in zip(RATES, ties, hindsight, strict=True):
        assert chance.headroom.value == pytest.approx(0, abs=1e-9)
        assert chance.pgr.value == pytest.approx(rate)
        assert best.headroom.value >= 1 - 1e-9
    assert apgr(ties) == pytest.approx(0.5)
    assert cpt(ties, 0.5) == pytest.approx(0.5)
    assert apgr(hindsight) > 0.5


def test_a_router_never_beats_itself(bench: Bench) -> None:
    scores = [np.random.default_rng(0).random(len(bench.gaps))]
    difference = bench.difference(scores, scores, RATES)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


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
    fitted, test = fit(ours(), world.data), world.data.others["test"]
    assert len(fitted.scores["test"]) == 3
    assert worth(fitted.scores["test"][0], test.gain) > 0.1 * test.gain.std()


def test_the_command_writes_its_tables_and_takes_a_router_of_one_s_own(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.routerbench import __main__ as command

    few = tuple(kind for kind in ROUTERS if kind.name in ("random", "kNN", "routet2i", "ours"))
    monkeypatch.setattr(command, "ROUTERS", few)
    monkeypatch.setattr(command, "BASELINES", few[:2])
    out = tmp_path / "out"
    labels, bundle = str(world.labels), str(world.bundle.folder)
    own = f"{__name__}:Longest"
    code = main(["routerbench", "--labels", labels, "--bundle", bundle, "--out", str(out), "--router", own])
    assert code == 0
    with (out / "results.csv").open() as file:
        results = list(csv.DictReader(file))
    assert tuple(results[0]) == RESULTS
    assert len(results) == 6 * len(RATES) + 1  # the oracle's curve and cloud-only beside the routers'
    with (out / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert tuple(summary[0]) == SUMMARY
    assert [row["router"] for row in summary] == [
        "random",
        "kNN",
        "routet2i",
        "ours",
        "most letters",
        "oracle",
    ]
    assert (out / "deferral.png").stat().st_size > 10_000
    assert "most letters" in (out / "report.md").read_text()


def test_a_router_is_found_in_the_folder_one_works_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.routerbench import __main__ as command

    (tmp_path / "my_own_router.py").write_text(
        "class Mine:\n    name, settings = 'mine', ({},)\n    def fit(self): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert command._named("my_own_router:Mine").name == "mine"


def test_a_router_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routerbench", "--router", "nowhere:Router"]) == 2
    assert "package.module:Class" in capsys.readouterr().err


class Copied(Longest):
    name = "random"


class Undecided(Longest):
    name = "undecided"

    def fit(self, train: Prompts, validation: Prompts, seed: int, **setting: float) -> Scorer:
        return lambda prompts: np.full(len(prompts), np.nan)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--router", f"{__name__}:Copied"], "two routers are called 'random'"),
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


def test_only_metrics_whose_gap_is_sure_make_dp(world: World) -> None:
    counted = counted_metrics(world.outcomes.split("train"), world.said("train"))
    assert counted.shape == (len(METRICS),)
    assert counted.any()
