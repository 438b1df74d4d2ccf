"""The benchmark's picture: deferral curves, quality won over the share of prompts that go to the cloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from export.routerbench.measure import Point
from export.routerbench.report import Facts

mpl.use("Agg")  # files, no window

from matplotlib import pyplot as plt

BAND = ("routet2i", "ours")  # routers drawn with their interval


def write(folder: Path, points: Mapping[str, Sequence[Point]], oracle: Sequence[Point], facts: Facts) -> None:
    """Write deferral.png: PGR over the routing rate, for the routers that say most."""
    figure, axes = plt.subplots(figsize=(7, 4.6), dpi=130, layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="random, expected")
    shown = [name for name in points if name in (*BAND, facts.best_baseline, "number of objects")]
    for name in shown:
        rates = [0.0, *(point.rate for point in points[name]), 1.0]
        (line,) = axes.plot(
            rates, [0.0, *(point.pgr.value for point in points[name]), 1.0], marker=".", label=name
        )
        if name in BAND:
            low = [0.0, *(point.pgr.low for point in points[name]), 1.0]
            high = [0.0, *(point.pgr.high for point in points[name]), 1.0]
            axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    rates = [0.0, *(point.rate for point in oracle), 1.0]
    axes.plot(
        rates,
        [0.0, *(point.pgr.value for point in oracle), 1.0],
        color="0.2",
        linestyle="--",
        label="oracle, cross-fitted",
    )
    axes.set_xlabel("share of prompts sent to the cloud")
    axes.set_ylabel("quality won, as a share of what cloud-only wins")
    axes.set_xlim(0, 1)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(folder / "deferral.png")
    plt.close(figure)
