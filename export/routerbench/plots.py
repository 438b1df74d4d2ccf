"""The benchmark's pictures: deferral curves, quality over cost, calibration, reliability of PRS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from export.bootstrap import Estimate, estimate
from export.figure import figure
from export.routerbench.decision import Decisions
from export.routerbench.measure import Point
from export.routerbench.report import REFERENCE, Curves, Facts

BAND = ("routet2i", "ours")  # routers drawn with their interval, as the best baseline is


def write(folder: Path, curves: Curves, facts: Facts, decisions: Decisions | None) -> None:
    """Write deferral.png and cost.png, and where the bundle decides, calibration.png and reliability.png."""
    banded = (*BAND, facts.best_baseline)
    shown = [name for name in curves.routers if name in (*banded, "number of objects", REFERENCE)]
    shares = (0.0, *(point.rate for point in curves.oracle), 1.0)

    def won(points: Sequence[Point]) -> list[Estimate]:
        return [Estimate(0.0, 0.0, 0.0), *(point.pgr for point in points), Estimate(1.0, 1.0, 1.0)]

    def served(points: Sequence[Point]) -> list[Estimate]:
        return [estimate(curves.edge), *(point.quality for point in points), curves.cloud_only.quality]

    with figure(folder / "deferral.png", "quality won, as a share of what cloud-only wins") as axes:
        axes.set_xlabel("share of prompts sent to the cloud")
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="random, expected")
        for name in shown:
            _line(axes, name, shares, won(curves.routers[name]), band=name in banded)
        _line(axes, "oracle, cross-fitted", shares, won(curves.oracle), color="0.2", linestyle="--")
        axes.set_xlim(0, 1)
    with figure(folder / "cost.png", "mean quality of the served images") as axes:
        axes.set_xlabel("cost of 1,000 prompts, in prices of a cloud image")
        ends = (float(curves.edge[0]), curves.cloud_only.quality.value)
        axes.plot([0, 1000], ends, color="0.6", linestyle=":", label="random, expected")
        costs = [1000 * share for share in shares]
        for name in shown:
            _line(axes, name, costs, served(curves.routers[name]), band=name in BAND[-1:])
        _line(axes, "oracle, cross-fitted", costs, served(curves.oracle), color="0.2", linestyle="--")
        axes.set_xlim(0, 1000)
    if decisions is None:
        return
    with figure(folder / "calibration.png", "realised share in the cloud") as axes:
        axes.set_xlabel("wanted routing rate")
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="as wanted")
        for split, rates in decisions.rates.items():
            _line(
                axes,
                split,
                [one.wanted for one in rates],
                [one.realised for one in rates],
                band=split == "test",
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
    with figure(folder / "reliability.png", "realised PRS, mean over the prompts of a bin") as axes:
        axes.set_xlabel("predicted PRS")
        predicted = [one.predicted for one in decisions.bins]
        ends = (min(predicted), max(predicted))
        axes.plot(ends, ends, color="0.6", linestyle=":", label="as predicted")
        values = [one.realised.value for one in decisions.bins]
        spread = [
            [one.realised.value - one.realised.low for one in decisions.bins],
            [one.realised.high - one.realised.value for one in decisions.bins],
        ]
        axes.errorbar(predicted, values, yerr=spread, fmt="o", capsize=3, label="test prompts, 95 %")


def _line(
    axes: Axes, name: str, x: Sequence[float], values: Sequence[Estimate], *, band: bool = False, **style: str
) -> None:
    (line,) = axes.plot(x, [one.value for one in values], marker=".", label=name, **style)
    if band:
        low, high = [one.low for one in values], [one.high for one in values]
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
