"""Measure the routing on held-out prompts: does predicted PRS follow the realised one, and what is it worth.

    edge-export evaluate LABELS BUNDLE [--rate 0.5] [--out evaluation.json]

For each way of choosing the prompts that go to the cloud, on the test split:

- Spearman's rank correlation of its score with realised PRS, that of the measured mean qualities;
- captured headroom = (gain - gain of random) / (gain of the oracle - gain of random) when the share `rate` of the
  prompts goes to the cloud, the gain being the quality won over edge only, a mean over metrics and prompts; left empty
  where few prompts or images leave open whether the oracle wins more than random at all;
- pooled dP = sum of gains / sum of |gaps| over the metrics, in percent; cloud-only makes at most 100.

The oracle knows what to expect of each prompt, not the luck of an image: it chooses by all seeds but one, is paid by
that one, and takes its turn over the seeds. With few seeds it chooses less well than it might, and headroom flatters
the router. Intervals are 95 % bootstraps over *scenes*: sentences that say the same scene share its outcome.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

from edge_agent.bundle import Bundle
from edge_agent.calibration import Calibration
from edge_agent.superiority import relative_superiority
from export.bootstrap import Estimate, Floats, estimate, resampled
from export.calibrate import predicted
from export.errors import ExportError
from export.outcomes import CLOUD_DIGEST, JUDGE_DIGEST, WHOSE, Outcomes, unlike
from export.output import check_output, default_output, write_output
from export.prompts import never_learnt
from export.terminal import console

PREDICTOR = "predictor"  # the bundle's, in the table
OUT, BEGINS = "evaluation.json", '{\n "rate":'
RESAMPLES = 1000
FEWEST = 10  # scenes; with fewer many a resample draws but one of them, and no interval says anything
TABLE_WIDTH = 110  # characters, where no terminal says how many there are


@dataclass(frozen=True)
class Row:
    """One router of the table; None where a measure says nothing about it."""

    router: str
    rank_correlation: Estimate | None
    headroom: Estimate | None
    over_random: Estimate
    """Quality won over random routing: what tells a router from it."""
    pooled_dp: Estimate


def routed(scores: Floats, rate: float) -> Floats:
    """How much of each prompt [N] goes to the cloud when the share `rate` with the lowest scores does.

    Equal scores at the border share what is left, so that ties (numbers of objects) are neither luck nor order.
    """
    wanted = rate * len(scores)
    border = np.sort(scores)[max(0, int(np.ceil(wanted)) - 1)]
    below, at = scores < border, scores == border
    return below + at * ((wanted - below.sum()) / at.sum())


def spearman(one: Floats, other: Floats) -> float:
    """Rank correlation with ties; 0 where one side does not vary."""
    a, b = (ranks - ranks.mean() for ranks in (rankdata(one), rankdata(other)))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else 0.0


def paired_gaps(outcomes: Outcomes) -> Floats:
    """What each prompt would gain in the cloud: [N, S, M], cloud minus edge, seeds paired by their order.

    S are those that every prompt has on both models. ExportError unless there are two: there is no oracle of one.
    """
    count = outcomes.common_seeds()
    if count < 2:
        raise ExportError("the oracle needs two seeds of every test prompt on both models; label more seeds")
    return outcomes.cloud_seeds[:, :count].astype(np.float64) - outcomes.edge_seeds[:, :count]


def oracle_gain(quality: Floats, rate: float) -> float:
    """Quality won over edge only by the oracle, cross-fitted over the seeds; `quality` [N, S] is what each pair of
    images gains, a mean over the metrics.
    """
    count = quality.shape[1]
    others = (quality.sum(1, keepdims=True) - quality) / (count - 1)
    turns = [routed(-others[:, turn], rate) @ quality[:, turn] for turn in range(count)]
    return float(np.mean(turns)) / len(quality)


def tells_headroom(above_random: Floats, least: float) -> bool:
    """Whether what the oracle wins ``above_random`` [R], of all prompts and of each resample, is always more than
    ``least``. A share of what may be nothing, or less, has no interval: it grows beyond bounds and changes its sign.
    """
    return bool((above_random > least).all())


def things_said(scenes: NDArray[np.int64]) -> int:
    """How many different ones test prompts say; ExportError where they are too few. ``scenes`` [N] numbers them."""
    if (said := len(np.unique(scenes))) < FEWEST:
        raise ExportError(
            f"the labels' test prompts say {said} things that no training prompt says, too few to measure on: label "
            f"more prompts, so that {FEWEST} are of the split test at least; narrow intervals take hundreds"
        )
    return said


def held_out(labels: Path, bundle: Bundle) -> tuple[Outcomes, NDArray[np.int64], Calibration]:
    """The labels' test prompts that say what no training prompt says, numbers [N] of what each says, and the bundle's
    calibration, which is for their models and judge. Raises ExportError where it is not, or there is none.
    """
    calibration = bundle.calibration
    if calibration is None:
        raise ExportError(f"{bundle.folder} has no calibration; make it with `edge-export calibrate`")
    outcomes = Outcomes.read(labels)
    outcomes.must_be_of(bundle)
    scenes = outcomes.scenes()
    measured = (outcomes.splits == "test") & never_learnt(outcomes.splits, scenes)
    test = outcomes.where(measured).split("test")
    known = {CLOUD_DIGEST: calibration.cloud_digest, JUDGE_DIGEST: calibration.recipe.get(JUDGE_DIGEST)}
    if name := unlike(known, test.facts):
        raise ExportError(
            f"the labels are {WHOSE[name]} {test.facts[name][:16]}, and {bundle.folder} is calibrated for "
            f"{known[name][:16]}: run `edge-export train`, `edge-export predictor` and `edge-export calibrate` with "
            "these labels first"
        )
    return test, scenes[measured], calibration


def evaluate(
    scores: Mapping[str, Floats],
    realised: Floats,
    gaps: Floats,
    rate: float,
    scenes: NDArray[np.int64],
) -> list[Row]:
    """Rows of the table, one a router (router -> scores [N], low goes to the cloud) and those of random and oracle.

    `realised` is the PRS of the measured mean qualities, [N], `gaps` [N, S, M] see `paired_gaps`, `scenes` [N] numbers
    what each prompt says. Raises ExportError when there is nothing to choose between.
    """
    resamples = list(resampled(scenes, RESAMPLES))
    # [N, S], [N, M]; a resample's rows take little.
    quality, metrics = gaps.mean(2), gaps.mean(1)
    gain = quality.mean(1)
    random = np.array([rate * gain[rows].mean() for rows in resamples])
    oracle = np.array([oracle_gain(quality[rows], rate) for rows in resamples])
    # What is won over edge only, as a share of what lies between the models on every metric.
    between = np.abs([metrics[rows].mean(0) for rows in resamples])
    full = between.mean(1)
    least = 1e-4 * between.max()  # more than rounding makes of nothing
    if (np.abs(oracle - random) <= least).all() or not full.all():
        apart = ""
        if (gain > 0).all() or (gain < 0).all():
            better = "cloud" if gain[0] > 0 else "edge"
            apart = f"; for each of the {len(gain)} the {better}'s images are better, so that there is little to choose"
        raise ExportError(
            "on these test prompts the oracle wins what random wins: label more prompts" + apart
        )
    told = tells_headroom(oracle - random, least)

    def row(router: str, gains: Floats, correlations: Floats | None) -> Row:
        return Row(
            router,
            None if correlations is None else estimate(correlations),
            estimate((gains - random) / (oracle - random)) if told else None,
            estimate(gains - random),
            estimate(100 * gains / full),
        )

    rows = [row("random", random, None)]
    for router, score in scores.items():
        gains = [routed(score[rows], rate) @ gain[rows] / len(rows) for rows in resamples]
        correlations = [spearman(score[chosen], realised[chosen]) for chosen in resamples]
        rows.append(row(router, np.array(gains), np.array(correlations)))
    return [*rows, row("oracle", oracle, None)]


def table(rows: Sequence[Row], rate: float) -> Table:
    """For a terminal or a pipe."""
    made = Table(box=SIMPLE)
    for name in ("router", "Spearman with realised PRS", f"captured headroom at {rate:.0%}", "pooled dP, %"):
        made.add_column(name, no_wrap=True)
    for row in rows:
        correlation = f"{row.rank_correlation:.3f}" if row.rank_correlation else ""
        headroom = f"{row.headroom:.3f}" if row.headroom else ""
        made.add_row(row.router, correlation, headroom, f"{row.pooled_dp:.1f}")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = argparse.ArgumentParser("edge-export evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("labels", type=Path, help="labels.parquet of `edge-export label`")
    parser.add_argument("bundle", type=Path, help="bundle with predictor and calibration")
    parser.add_argument(
        "--rate", type=float, default=0.5, help="share that goes to the cloud (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help=f"default: {OUT}")
    options = parser.parse_args(argv)
    if not 0 < options.rate < 1:
        parser.error("--rate must lie between 0 and 1")

    out = options.out or default_output(OUT, BEGINS)
    check_output(out, options.labels)
    bundle = Bundle.open(options.bundle)
    test, scenes, calibration = held_out(options.labels, bundle)
    gaps, said = paired_gaps(test), things_said(scenes)

    def prs(edge: NDArray[np.float32], cloud: NDArray[np.float32]) -> Floats:
        return relative_superiority(edge, cloud, calibration.scale, calibration.weights)

    scores = {
        "number of objects": -test.objects.astype(np.float64),
        PREDICTOR: prs(*predicted(bundle, test.prompts)),
    }
    rows = evaluate(scores, prs(test.edge, test.cloud), gaps, options.rate, scenes)
    record = {
        "rate": options.rate,
        "prompts": len(test),
        "scenes": said,
        "seeds": gaps.shape[1],
        "calibration_id": calibration.calibration_id,
        "edge_digest": calibration.edge_digest,
        "cloud_digest": calibration.cloud_digest,
        "bootstrap_resamples": RESAMPLES,
        "routers": [asdict(row) for row in rows],
    }
    write_output(out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table(rows, options.rate))
    console.print(f"{len(test)} test prompts, {gaps.shape[1]} seeds; written to {out}")
    largest = calibration.recipe.get("largest_rate", 1.0)
    if options.rate > largest:
        console.print(
            f"of the calibration prompts a daemon sends at most {largest:.0%}, since for the others the edge's image "
            f"is predicted to be as good: {options.rate:.0%} is what the ranking alone is worth"
        )
    if rows[0].headroom is None:
        console.print(
            "on these test prompts, or on a sample of them, the oracle wins no more than random, and nothing is said "
            "of headroom: label more prompts, or more images of each"
        )
    if not next(row for row in rows if row.router == PREDICTOR).over_random.low > 0:
        console.print(
            "these test prompts do not tell the predictor from random routing: label more prompts, or more images of "
            "each, and train again"
        )
    return 0
