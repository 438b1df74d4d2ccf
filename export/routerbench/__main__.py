"""Compare routers on measured outcomes: who sends the right prompts to the cloud, at every routing rate?

    edge-export routerbench [--labels LABELS] [--bundle BUNDLE] [--out routerbench-out] [--router module:Class]

Every router is fitted on the training prompts with each of its settings, the best setting on the validation prompts
is fitted with two more seeds, and the test prompts are scored once. Writes report.md, results.csv, summary.csv and
plots. The shipped matrix takes ten minutes on two quick cores, twice as long on slow ones.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import multiprocessing
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from export.arguments import at_least
from export.bootstrap import Estimate, estimate, resampled
from export.calibrate import scale_of
from export.errors import ExportError
from export.evaluate import FEWEST, Paired, routed, spearman
from export.mixture import Shape
from export.outcomes import SPLITS, Outcomes
from export.prompts import never_learnt, scenes_by_text, scenes_of
from export.routerbench import plots, report
from export.routerbench.ceiling import Ceiling, ceiling, oracle_by_images, sentences_share
from export.routerbench.decision import decisions
from export.routerbench.measure import RATES, RESAMPLES, Bench, Point, counted_metrics, difference, directions
from export.routerbench.router import Floats, Prompts, Router, Scorer
from export.routerbench.routers import (
    ABLATIONS,
    BASELINES,
    ROUTERS,
    ByGain,
    NumberOfObjects,
    Ours,
    Ranked,
    RouteT2I,
)
from export.starter.shipped import STARTER_BUNDLE, STARTER_LABELS
from export.starter.world import Scene
from export.states import of_prompts, of_shorter_prompts
from export.terminal import console, progress

SEEDS = 3
TIMED = 200  # decisions a router's time is measured on
OTHER_SPLITS = ("combinations", "wording", "free-form")


@dataclass(frozen=True)
class Data:
    """The splits of one matrix, as routers see them."""

    train: Prompts
    validation: Prompts
    others: Mapping[str, Prompts]
    """Of test, and of those of OTHER_SPLITS that the matrix has."""

    @classmethod
    def of(cls, outcomes: Outcomes, bundle: Bundle, scenes: NDArray[np.int64], cache: Path) -> Data:
        """``scenes`` [N] numbers what each prompt says. Token states are kept in the folder ``cache``."""
        scale = np.asarray(scale_of(outcomes.split("train"), 1.0), np.float64)

        def prompts(split: str) -> Prompts:
            said = scenes[outcomes.splits == split]
            part = outcomes.split(split)
            return Prompts.of(part, bundle, scale, said, cache, shorter=split == "train")

        learnt, validation, *others = _splits_read(outcomes)
        return cls(prompts(learnt), prompts(validation), {split: prompts(split) for split in others})


def _splits_read(outcomes: Outcomes) -> list[str]:
    """The splits of the matrix that routers see."""
    there = (split for split in OTHER_SPLITS if (outcomes.splits == split).sum() > 1)
    return ["train", "validation", "test", *there]


def keep_states(train: Outcomes, bundle: Bundle, cache: Path) -> None:
    """Put into the folder ``cache`` the token states that `Data.of` takes longest to make."""
    of_prompts(cache, bundle, train.prompts)
    of_shorter_prompts(cache, bundle, train.prompts)


def _check(outcomes: Outcomes) -> None:
    """Before minutes are spent: ExportError when the matrix lacks what routers are measured by."""
    for split in ("train", "validation", "test"):
        outcomes.split(split)
    test = outcomes.split("test")
    Paired.of(test)
    test.must_be_inspected_whole()


@dataclass(frozen=True)
class Fitted:
    """What came of one router."""

    name: str
    setting: Mapping[str, float]
    validation: float
    """Mean gain over random on the validation prompts, over all rates."""
    scores: Mapping[str, Sequence[Floats]]
    """Split -> one array [N] a seed."""
    decision_ms: Floats
    """[TIMED], of one prompt whose token states are there."""


def worth(scores: Floats, gain: Floats) -> float:
    """Mean over rates of what these scores win on prompts of known gain, less what random ones would."""
    rates = np.arange(0.1, 0.95, 0.1)
    return float(np.mean([routed(scores, rate) @ gain / len(gain) - rate * gain.mean() for rate in rates]))


def fit(router: Router, data: Data, again: ByGain | None = None) -> list[Fitted]:
    """Tune on validation, fit with every seed, score the rest, which has no outcomes there. With ``again`` the same
    networks a second time, as that router ranks what they predict.
    """
    torch.set_num_threads(1)
    unseen = {split: prompts.unseen for split, prompts in data.others.items()}
    validation = data.validation.unseen

    def learnt(seed: int, setting: Mapping[str, float]) -> Scorer:
        with blamed_on(router.name):
            return router.fit(data.train, data.validation, seed, **setting)

    def measured(name: str, setting: Mapping[str, float], raw: Sequence[Scorer]) -> Fitted:
        scorers = [checked(name, score) for score in raw]
        worths = worth(scorers[0](validation), data.validation.gain)
        scores = {split: [score(prompts) for score in scorers] for split, prompts in unseen.items()}
        return Fitted(name, dict(setting), worths, scores, _time(scorers[0], unseen["test"]))

    tried = [learnt(0, setting) for setting in router.settings]
    worths = [worth(checked(router.name, score)(validation), data.validation.gain) for score in tried]
    best = int(np.argmax(worths))
    setting = router.settings[best]
    scorers = [tried[best], *(learnt(seed, setting) for seed in range(1, SEEDS))]
    made = [measured(router.name, setting, scorers)]
    if again is not None:
        made.append(measured(again.name, setting, [again.again(cast("Ranked", score)) for score in scorers]))
    return made


def leave_interrupts() -> None:
    """In a process of a pool: Ctrl-C is for the one that has begun it, see `ending`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def ending(pool: ProcessPoolExecutor) -> Iterator[None]:
    """End all processes at once after an error or Ctrl-C: what they do takes minutes, and nobody waits for it."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


@contextmanager
def blamed_on(router: str) -> Iterator[None]:
    """A router of one's own fails in its own way: whichever, it becomes an ExportError that says where."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename), frames[-1])
        raise ExportError(
            f"router {router!r} failed: {type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
        ) from error


def checked(name: str, score: Scorer) -> Scorer:
    """The same; ExportError where it fails, or does not score each prompt with a finite number."""

    def scored(prompts: Prompts) -> Floats:
        with blamed_on(name):
            scores = np.asarray(score(prompts), np.float64)
        if scores.shape != (len(prompts),) or not np.isfinite(scores).all():
            raise ExportError(
                f"router {name!r} scored {len(prompts)} prompts with an array {list(scores.shape)}, "
                f"{int(np.isfinite(scores).sum())} of it finite: it must give one finite number a prompt"
            )
        return scores

    return scored


def _time(score: Scorer, prompts: Prompts) -> Floats:
    times = []
    for index in range(TIMED):
        row = index % len(prompts)
        one = replace(
            prompts,
            texts=prompts.texts[row : row + 1],
            objects=prompts.objects[row : row + 1],
            examples=prompts.examples.rows(torch.tensor([row])),
            scenes=prompts.scenes[row : row + 1],
        )
        started = time.perf_counter()
        score(one)
        times.append(1000 * (time.perf_counter() - started))
    return np.array(times)


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
        "--processes", type=at_least(1), default=2, help="fitting at once (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    routers = _instances([*ROUTERS, *map(_named, options.router)])

    started = time.monotonic()
    outcomes, bundle = Outcomes.read(options.labels), Bundle.open(options.bundle)
    outcomes.must_be_of(bundle)
    _check(outcomes)
    cache = options.out / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1) as pool:
        naming = pool.submit(scenes_by_text, outcomes.ids, outcomes.splits)
        keep_states(outcomes.split("train"), bundle, cache)  # meanwhile
        known = naming.result()
    scenes = scenes_of(outcomes.prompts, known)
    new = never_learnt(outcomes.splits, scenes)
    outcomes, scenes = outcomes.where(new), scenes[new]
    test = outcomes.split("test")
    said = {
        split: scenes[outcomes.splits == split] for split in SPLITS if (outcomes.splits == split).sum() > 1
    }
    if (different := len(np.unique(said["test"]))) < FEWEST:
        raise ExportError(
            f"the labels' test prompts say {different} things that no training prompt says, too few to measure on: "
            f"label more prompts, so that {FEWEST} are of the split test at least; narrow intervals take hundreds"
        )
    data = Data.of(outcomes, bundle, scenes, cache)
    prompts = data.others["test"]
    superiority = prompts.superiority(prompts.examples.edge, prompts.examples.cloud)
    count = Paired.of(test).gaps.shape[1]
    both = (torch.from_numpy(seeds[:, :count]) for seeds in (test.edge_seeds, test.cloud_seeds))
    each = prompts.superiority(*both)
    counted = counted_metrics(outcomes.split("train"))
    bench = Bench(test, each, counted, said["test"])
    once = np.sort(np.unique(said["test"], return_index=True)[1])  # the first prompt of each scene
    first = test.where(np.isin(np.arange(len(test)), once))
    one_a_scene = Bench(first, each[once], counted, said["test"][once])

    fitted: dict[str, Fitted] = {}
    measured: dict[str, list[Point]] = {}
    measured_once: dict[str, list[Point]] = {}

    def measure(name: str, scores: Sequence[Floats]) -> None:
        measured[name] = bench.points(scores)
        measured_once[name] = one_a_scene.points([score[once] for score in scores])

    there = {split: numbers for split, numbers in said.items() if split != "validation"}
    with (
        ProcessPoolExecutor(options.processes, initializer=leave_interrupts) as pool,
        ending(pool),
        progress() as bar,
    ):
        again = next((router for router in routers if type(router) is ByGain), None)

        def submitted(some: Sequence[Router]) -> list[Future[Any]]:
            return [
                pool.submit(fit, router, data, again if router.name == RouteT2I.name else None)
                for router in _longest_first(some)
                if router is not again
            ]

        task = bar.add_task("routers", total=sum(router is not again for router in routers) + 2)
        fitting = submitted(routers[len(ROUTERS) :])
        # Those of one's own: nobody waits for all the others to hear of a mistake.
        for done in as_completed(fitting):
            done.result()
        limiting = pool.submit(_ceiling, outcomes.split("train"), test, known)
        deciding = pool.submit(decisions, bundle, outcomes, there, cache)
        fitting += submitted(routers[: len(ROUTERS)])
        parts: dict[Future[Any], str] = {limiting: "what can be foreseen", deciding: "the bundle's decisions"}
        for done in as_completed([*fitting, *parts]):
            if done in fitting:
                made = done.result()
                for one in made:
                    fitted[one.name] = one
                    measure(one.name, one.scores["test"])
            bar.update(task, advance=1, note=parts.get(done) or done.result()[0].name)
        limit, decided = limiting.result(), deciding.result()
    order = [fitted[router.name] for router in routers]
    if limit is not None:
        measure(report.REFERENCE, [limit.scores])
    shown = [*(one.name for one in order), *(() if limit is None else (report.REFERENCE,))]
    points = {name: measured[name] for name in shown}
    every = (test.cloud_seeds.astype(np.float64) - test.edge_seeds).mean(axis=2)
    with_most = ~np.isnan(every).any(axis=1)
    many = every[with_most]  # of the prompts with the most images
    scored = {one.name: one.scores["test"] for one in order}

    def apart(one: str, other: str) -> report.Apart:
        drawn, alone = ((by[one], by[other]) for by in (measured, measured_once))
        return report.Apart(difference(*drawn, (0.5,)), difference(*drawn, RATES), difference(*alone, RATES))

    best = max((fitted[kind.name] for kind in BASELINES), key=lambda one: one.validation)
    names = [kind.name for kind in (RouteT2I, ByGain, Ours) if kind.name in scored]
    facts = report.Facts(
        prompts=len(test),
        scenes=bench.scenes,
        seeds=count,
        training_prompts=len(data.train),
        training_scenes=len(np.unique(data.train.scenes)),
        counted=bench.counted,
        best_baseline=best.name,
        headroom_once={name: report.at(measured_once[name], 0.5).headroom for name in shown},
        differences={name: {kind.name: apart(name, kind.name) for kind in BASELINES} for name in names},
        ablations={
            (kind.name, whole.name): apart(whole.name, kind.name)
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
        directions=directions(outcomes.split("train").cloud - outcomes.split("train").edge),
        kept_whole=float((prompts.examples.mask.sum(1) <= Shape.kept).double().mean()),
        settings={one.name: one.setting for one in order},
        ceiling=limit,
        sentences=sentences_share(bench.paired.gaps.mean(axis=2), said["test"]),
        oracle=oracle_by_images(many, 0.5),
        oracle_prompts=len(many),
        foreseen={name: _won(scored[name], every.mean(axis=1), np.flatnonzero(with_most)) for name in names},
        cloud_better=float((bench.better < 0).mean()),
        seconds=time.monotonic() - started,
    )
    curves = report.Curves(points, bench.oracle_points(), bench.cloud_only(), bench.edge, bench.cloud)
    report.write(options.out, curves, {one.name: one.decision_ms for one in order}, facts, decided)
    plots.write(options.out, curves, facts, decided)
    console.print(
        f"{len(routers)} routers on {len(test)} test prompts in {facts.seconds:.0f} s -> {options.out}"
    )
    size = sum(file.stat().st_size for file in cache.iterdir()) / 1e6
    console.print(f"{cache} holds token states for a quicker next run, {size:.0f} MB; it may be deleted")
    return 0


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
    samples = resampled(scenes, RESAMPLES)
    return estimate(
        np.array([100 * _won(one.scores[split], gain, rows) / gain[rows].mean() for rows in samples])
    )


def _won(scores: Sequence[Floats], gain: Floats, rows: NDArray[np.int64]) -> float:
    """Mean gain over random at half of these prompts, a mean over seeds."""
    routes = np.mean([routed(score[rows], 0.5) for score in scores], axis=0)
    return float((routes - 0.5) @ gain[rows]) / len(rows)


if __name__ == "__main__":
    from export.__main__ import run

    raise SystemExit(run(main))
