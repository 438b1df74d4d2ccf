"""Compare routers on measured outcomes: who sends the right prompts to the cloud, at every routing rate?

    edge-export routerbench [--labels LABELS] [--bundle BUNDLE] [--out routerbench-out] [--router module:Class]

Every router is fitted on the training prompts with each of its settings, the best setting on the validation prompts
is fitted with more seeds, three in all, and the test prompts are scored once. Writes report.md, results.csv,
summary.csv and plots. The shipped matrix takes ten minutes on two quick cores, twice as long on slow ones, and with
six seeds twice as long again.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from export.arguments import at_least
from export.bootstrap import Estimate, Floats, interval
from export.errors import ExportError
from export.evaluate import paired_gaps, routed, spearman, things_said
from export.mixture import Shape
from export.outcomes import SPLITS, Outcomes
from export.prompts import never_learnt, scenes_by_text, scenes_of
from export.routerbench import plots, report
from export.routerbench.bundled import Bundled, foreign
from export.routerbench.ceiling import Ceiling, ceiling, oracle_by_images, sentences_share
from export.routerbench.decision import decisions
from export.routerbench.fitting import SEEDS, Data, Fitted, ending, fit, keep_states, leave_interrupts
from export.routerbench.measure import RATES, RESAMPLES, Bench, Point, counted_metrics, difference, directions
from export.routerbench.router import Router
from export.routerbench.routers import (
    ABLATIONS,
    BASELINES,
    ROUTERS,
    ByGain,
    NumberOfObjects,
    Ours,
    RouteT2I,
)
from export.starter.shipped import STARTER_BUNDLE, STARTER_LABELS
from export.starter.world import Scene
from export.terminal import console, progress


@dataclass(frozen=True)
class Measured:
    """A router's points on all test prompts as they were drawn, and on the first that says each scene."""

    drawn: Sequence[Point]
    once: Sequence[Point]

    def above(self, other: Measured) -> report.Apart:
        """How much more of the headroom it captures."""
        return report.Apart(
            difference(self.drawn, other.drawn, (0.5,)),
            difference(self.drawn, other.drawn, RATES),
            difference(self.once, other.once, RATES),
        )


def _named(text: str) -> type[Router]:
    module, _, name = text.partition(":")
    # A command's path begins with its own folder, and a router of one's own lies where one works.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found: type[Router] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ExportError(f"--router {text}: no such class ({error}); say package.module:Class") from error
    settings = getattr(found, "settings", None)
    described = (
        isinstance(getattr(found, "name", None), str)
        and isinstance(settings, Sequence)
        and bool(settings)
        and all(isinstance(setting, Mapping) for setting in settings)
    )
    if not inspect.isclass(found) or not callable(getattr(found, "fit", None)) or not described:
        raise ExportError(
            f"--router {text}: not a class with a name, settings (at least one, which may be {{}}) and fit(); "
            "docs/routerbench.md shows one"
        )
    return found


def _longest_first(routers: Sequence[Router]) -> list[Router]:
    """As they are best started, so that no process waits long for another at the end: ours trains longest, then come
    those with most settings. Of others the first of ROUTERS, which take seconds, are last.
    """

    def length(router: Router) -> tuple[bool, int, int]:
        return router.name == Ours.name, len(router.settings), routers.index(router)

    return sorted(routers, key=length, reverse=True)


def _instances(kinds: Sequence[type[Router]]) -> list[Router]:
    names = Counter([*(kind.name for kind in kinds), *report.RESERVED])
    if twice := [name for name, count in names.items() if count > 1]:
        raise ExportError(
            f"a row of the report is called {twice[0]!r} already: give your router another name"
        )
    return [_made(kind) for kind in kinds]


def _made(kind: type[Router]) -> Router:
    try:
        return kind()
    except TypeError as error:
        raise ExportError(f"router {kind.name!r} cannot be made without arguments: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; exit code 0."""
    parser = argparse.ArgumentParser("edge-export routerbench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--labels", type=Path, default=STARTER_LABELS, help="the outcome matrix (default: the starter's)"
    )
    parser.add_argument("--bundle", type=Path, default=STARTER_BUNDLE, help="whose text encoder routers read")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("routerbench-out"),
        help="default: %(default)s; token states are kept in its folder cache, which may be deleted",
    )
    parser.add_argument(
        "--router",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="one more router; may be repeated",
    )
    parser.add_argument(
        "--seeds",
        type=at_least(1),
        default=SEEDS,
        help="fits of each router, which differ by about as much as good routers do (default: %(default)s)",
    )
    parser.add_argument(
        "--processes", type=at_least(1), default=2, help="fitting at once (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    routers = _instances([*ROUTERS, *map(_named, options.router)])

    started = time.monotonic()
    outcomes, bundle = Outcomes.read(options.labels), Bundle.open(options.bundle)
    if (why := foreign(bundle, outcomes)) is None:
        routers.append(Bundled(bundle))
    else:
        console.print(f"without the bundle's predictor and its decisions: {why}")
    cache = options.out / "cache"
    outcomes, scenes, known = _new(outcomes, bundle, cache)
    test, data = outcomes.split("test"), Data.of(outcomes, bundle, scenes, cache)
    said = {
        split: scenes[outcomes.splits == split] for split in SPLITS if (outcomes.splits == split).sum() > 1
    }
    prompts, count = data.others["test"], paired_gaps(test).shape[1]
    both = (torch.from_numpy(seeds[:, :count]) for seeds in (test.edge_seeds, test.cloud_seeds))
    each = prompts.superiority(*both)
    counted = counted_metrics(outcomes.split("train"))
    bench = Bench(test, each, counted, said["test"])
    once = np.sort(np.unique(said["test"], return_index=True)[1])  # the first prompt of each scene
    first = test.where(np.isin(np.arange(len(test)), once))
    one_a_scene = Bench(first, each[once], counted, said["test"][once])

    fitted: dict[str, Fitted] = {}
    measured: dict[str, Measured] = {}

    def measure(name: str, scores: Sequence[Floats]) -> None:
        measured[name] = Measured(bench.points(scores), one_a_scene.points([score[once] for score in scores]))

    there = {split: numbers for split, numbers in said.items() if split != "validation"}
    with (
        ProcessPoolExecutor(options.processes, initializer=leave_interrupts) as pool,
        ending(pool),
        progress() as bar,
    ):
        again = next((router for router in routers if type(router) is ByGain), None)

        def submitted(some: Sequence[Router]) -> list[Future[Any]]:
            return [
                pool.submit(fit, router, data, again if router.name == RouteT2I.name else None, options.seeds)
                for router in _longest_first(some)
                if router is not again
            ]

        task = bar.add_task("routers", total=sum(router is not again for router in routers) + 2)
        fitting = submitted(routers[len(ROUTERS) :])
        # Those of one's own, with the bundle's: nobody waits for all the others to hear of a mistake.
        for done in as_completed(fitting):
            done.result()
        limiting = pool.submit(_ceiling, outcomes.split("train"), test, known)
        deciding = pool.submit(decisions, bundle, outcomes, there, cache)
        fitting += submitted(routers[: len(ROUTERS)])
        parts: dict[Future[Any], str] = {limiting: "what can be foreseen", deciding: "the bundle's decisions"}
        for done in as_completed([*fitting, *parts]):
            if done in fitting:
                for one in done.result():
                    fitted[one.name] = one
                    measure(one.name, one.scores["test"])
            bar.update(task, advance=1, note=parts.get(done) or done.result()[0].name)
        limit, decided = limiting.result(), deciding.result()
    order = [fitted[router.name] for router in routers]
    if limit is not None:
        measure(report.REFERENCE, [limit.scores])
    facts = _facts(order, measured, outcomes, data, bench, limit, started)
    shown = [*(one.name for one in order), *(() if limit is None else (report.REFERENCE,))]
    points = {name: measured[name].drawn for name in shown}
    curves = report.Curves(points, bench.oracle_points(), bench.cloud_only(), bench.edge, bench.cloud)
    report.write(options.out, curves, {one.name: one.decision_ms for one in order}, facts, decided)
    plots.write(options.out, curves, facts, decided)
    console.print(
        f"{len(routers)} routers on {len(test)} test prompts in {facts.seconds:.0f} s -> {options.out}"
    )
    size = sum(file.stat().st_size for file in cache.iterdir()) / 1e6
    console.print(f"{cache} holds token states for a quicker next run, {size:.0f} MB; it may be deleted")
    return 0


def _new(
    outcomes: Outcomes, bundle: Bundle, cache: Path
) -> tuple[Outcomes, NDArray[np.int64], Mapping[str, Scene | None]]:
    """The prompts without those that ask for what a training prompt asks for; which scene each of them says, [N]; and
    what `scenes_by_text` knows. The training prompts' token states are put into the folder ``cache`` meanwhile.

    Before minutes are spent: ExportError when the matrix lacks what routers are measured by.
    """
    outcomes.must_be_of(bundle)
    for split in ("train", "validation", "test"):
        outcomes.split(split)
    test = outcomes.split("test")
    paired_gaps(test)
    test.must_be_inspected_whole()
    cache.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, initializer=leave_interrupts) as pool, ending(pool):
        naming = pool.submit(scenes_by_text, outcomes.ids, outcomes.splits)
        keep_states(outcomes.split("train"), bundle, cache)  # meanwhile
        known = naming.result()
    scenes = scenes_of(outcomes.prompts, known)
    new = never_learnt(outcomes.splits, scenes)
    outcomes, scenes = outcomes.where(new), scenes[new]
    things_said(scenes[outcomes.splits == "test"])
    return outcomes, scenes, known


def _facts(
    order: Sequence[Fitted],
    measured: Mapping[str, Measured],
    outcomes: Outcomes,
    data: Data,
    bench: Bench,
    limit: Ceiling | None,
    started: float,
) -> report.Facts:
    """What the report says beside its tables of points; ``order`` is that of its rows."""
    fitted = {one.name: one for one in order}
    scored = {one.name: one.scores["test"] for one in order}
    train, test, prompts = outcomes.split("train"), outcomes.split("test"), data.others["test"]
    superiority = prompts.superiority(prompts.examples.edge, prompts.examples.cloud)
    most = (~np.isnan(test.edge_seeds[..., 0])).sum(axis=1).max()  # training prompts may have more images
    every = (test.cloud_seeds[:, :most].astype(np.float64) - test.edge_seeds[:, :most]).mean(axis=2)
    with_most = ~np.isnan(every).any(axis=1)
    many = every[with_most]  # of the prompts with the most images
    best = max((fitted[kind.name] for kind in BASELINES), key=lambda one: one.validation)
    names = [name for name in (RouteT2I.name, ByGain.name, Ours.name, report.BUNDLED) if name in scored]
    return report.Facts(
        prompts=len(test),
        scenes=bench.scenes,
        images=bench.paired.shape[1],
        seeds=len(order[0].scores["test"]),
        training_prompts=len(data.train),
        training_scenes=len(np.unique(data.train.scenes)),
        counted=bench.counted,
        best_baseline=best.name,
        headroom_once={name: report.at(found.once, 0.5).headroom for name, found in measured.items()},
        differences={
            name: {kind.name: measured[name].above(measured[kind.name]) for kind in BASELINES}
            for name in names
        },
        ablations={
            (kind.name, whole.name): measured[whole.name].above(measured[kind.name])
            for kind, whole in ABLATIONS.items()
            if {kind.name, whole.name} <= scored.keys()
        },
        inspected={
            name: {
                "random": bench.found_difference(scored[name], None, (0.5,)),
                **{
                    other: bench.found_difference(scored[name], scored[other], (0.5,))
                    for other in (NumberOfObjects.name, best.name)
                    if other in scored
                },
            }
            for name in names
        },
        correlations={
            one.name: float(np.mean([spearman(score, superiority) for score in one.scores["test"]]))
            for one in order
        },
        elsewhere={
            one.name: {split: _elsewhere(one, split, data) for split in data.others if split != "test"}
            for one in order
        },
        directions=directions(train.cloud - train.edge),
        kept_whole=float((prompts.examples.mask.sum(1) <= Shape.kept).double().mean()),
        settings={one.name: one.setting for one in order},
        ceiling=limit,
        sentences=sentences_share(bench.paired.mean(axis=2), prompts.scenes),
        oracle=oracle_by_images(many, 0.5),
        oracle_prompts=len(many),
        foreseen={name: _won(scored[name], every.mean(axis=1), np.flatnonzero(with_most)) for name in names},
        cloud_better=float((bench.better < 0).mean()),
        seconds=time.monotonic() - started,
    )


def _ceiling(train: Outcomes, test: Outcomes, known: Mapping[str, Scene | None]) -> Ceiling | None:
    """None where not every prompt says a scene of the starter's world."""
    learnt, asked = (
        [scene for text in part.prompts if (scene := known.get(text)) is not None] for part in (train, test)
    )
    if len(learnt) < len(train) or len(asked) < len(test):
        return None
    gain = (train.cloud.astype(np.float64) - train.edge).mean(axis=1)
    single = (train.cloud_seeds[:, 0].astype(np.float64) - train.edge_seeds[:, 0]).mean(axis=1)
    return ceiling(learnt, gain, single, asked)


def _elsewhere(one: Fitted, split: str, data: Data) -> Estimate:
    """Mean gain over random at half the prompts, in percent of what cloud-only wins, on another split."""
    gain, scenes = data.others[split].gain, data.others[split].scenes

    def won(rows: NDArray[np.int64]) -> float:
        return 100 * _won(one.scores[split], gain, rows) / float(gain[rows].mean())

    return interval(won, scenes, RESAMPLES)


def _won(scores: Sequence[Floats], gain: Floats, rows: NDArray[np.int64]) -> float:
    """Mean gain over random at half of these prompts, a mean over seeds."""
    routes = np.mean([routed(score[rows], 0.5) for score in scores], axis=0)
    return float((routes - 0.5) @ gain[rows]) / len(rows)
