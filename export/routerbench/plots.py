"""The benchmark's pictures: deferral curves, quality over cost, calibration, reliability of PRS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes

from export.evaluate import Estimate
from export.routerbench.decision import Decisions
from export.routerbench.measure import Point
from export.routerbench.report import REFERENCE, Curves, Facts

mpl.use("Agg")  # files, no window

from matplotlib import pyplot as plt

BAND = ("routet2i", "ours")  # routers drawn with their interval


def write(folder: Path, curves: Curves, facts: Facts, decisions: Decisions | None) -> None:
    """Write deferral.png and cost.png, and where the bundle decides, calibration.png and reliability.png."""
    shown = [
        name
        for name in curves.routers
        if name in (*BAND, facts.best_baseline, "number of objects", REFERENCE)
    ]
    with _figure(folder / "deferral.png", "quality won, as a share of what cloud-only wins") as axes:
        axes.set_xlabel("share of prompts sent to the cloud")
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="random, expected")
        for name in shown:
            _curve(axes, name, curves.routers[name], 0.0, 1.0, band=name in BAND)
        _curve(axes, "oracle, cross-fitted", curves.oracle, 0.0, 1.0, color="0.2", linestyle="--")
        axes.set_xlim(0, 1)
    with _figure(folder / "cost.png", "mean quality of the served images") as axes:
        axes.set_xlabel("cost of 1,000 prompts, in prices of a cloud image")
        won = facts.cloud - facts.edge
        axes.plot([0, 1000], [facts.edge, facts.cloud], color="0.6", linestyle=":", label="random, expected")
        for name in shown:
            _curve(axes, name, curves.routers[name], facts.edge, won, cost=1000.0, band=name in BAND)
        _curve(
            axes,
            "oracle, cross-fitted",
            curves.oracle,
            facts.edge,
            won,
            cost=1000.0,
            color="0.2",
            linestyle="--",
        )
        axes.set_xlim(0, 1000)
    if decisions is None:
        return
    with _figure(folder / "calibration.png", "realised share in the cloud") as axes:
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
    with _figure(folder / "reliability.png", "realised PRS, mean over the prompts of a bin") as axes:
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


@contextmanager
def _figure(file: Path, label: str) -> Iterator[Axes]:
    figure, axes = plt.subplots(figsize=(7, 4.6), dpi=130, layout="constrained")
    yield axes
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)


def _curve(
    axes: Axes,
    name: str,
    points: Sequence[Point],
    start: float,
    span: float,
    *,
    cost: float = 1.0,
    band: bool = False,
    **style: str,
) -> None:
    """PGR from edge-only to cloud-only, in units of ``span`` above ``start``."""
    ends = (Estimate(0.0, 0.0, 0.0), Estimate(1.0, 1.0, 1.0))
    values = [
        Estimate(start + span * one.value, start + span * one.low, start + span * one.high)
        for one in (ends[0], *(point.pgr for point in points), ends[1])
    ]
    rates = [cost * rate for rate in (0.0, *(point.rate for point in points), 1.0)]
    _line(axes, name, rates, values, band=band, **style)


def _line(
    axes: Axes, name: str, x: Sequence[float], values: Sequence[Estimate], *, band: bool, **style: str
) -> None:
    (line,) = axes.plot(x, [one.value for one in values], marker=".", label=name, **style)
    if band:
        low, high = [one.low for one in values], [one.high for one in values]
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
