"""The benchmark's tables: a Markdown report for people, CSV files for programs."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.superiority import METRICS
from export.evaluate import Estimate
from export.routerbench.measure import Point, aiq, apgr, cpt, share_at_dp
from export.routerbench.router import Floats

RESULTS = (
    *("router", "rate", "headroom", "headroom_low", "headroom_high"),
    *("delta_p", "delta_p_low", "delta_p_high", "pgr", "win_gain", "inspector_accuracy"),
)
SUMMARY = ("router", "apgr", "cpt50", "aiq", "cloud_share_at_dp50", "decision_ms_p50", "decision_ms_p95")
PAPER = {
    "random": 40.00,
    "classifier (RouteLLM, from scratch)": 71.51,
    "Hybrid LLM, probabilistic": 73.49,
    "ZOOTER": 77.95,
    "routet2i": 83.97,
}
"""dP in the paper at a routing rate of 50 %. Its models and images are others; levels do not compare, orders may."""


@dataclass(frozen=True)
class Facts:
    """What the report says beside the tables."""

    prompts: int
    seeds: int
    training_prompts: int
    counted: NDArray[np.bool_]
    best_baseline: str
    differences: Mapping[str, Estimate]
    correlations: Mapping[str, float]
    elsewhere: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, Mapping[str, float]]
    edge: float
    cloud: float
    seconds: float


def write(
    folder: Path,
    points: Mapping[str, Sequence[Point]],
    oracle: Sequence[Point],
    decision_ms: Mapping[str, Floats],
    facts: Facts,
) -> None:
    """Write results.csv, summary.csv and report.md."""
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(RESULTS)
        for router, curve in points.items():
            rows.writerows(_result(router, point) for point in curve)
    summary = [_summary(router, curve, decision_ms[router], facts) for router, curve in points.items()]
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(SUMMARY)
        rows.writerows(summary)
    (folder / "report.md").write_text(_report(points, oracle, summary, facts), encoding="utf-8")


def at(curve: Sequence[Point], rate: float) -> Point:
    """The point of one rate."""
    return next(point for point in curve if point.rate == rate)


def _result(router: str, point: Point) -> list[object]:
    found = point.inspector_accuracy
    numbers = (
        *(point.headroom.value, point.headroom.low, point.headroom.high),
        *(point.delta_p.value, point.delta_p.low, point.delta_p.high),
        *(point.pgr.value, point.win_gain.value),
    )
    accuracy = "" if found is None else f"{found.value:.4f}"
    return [router, point.rate, *(f"{number:.4f}" for number in numbers), accuracy]


def _summary(router: str, curve: Sequence[Point], times: Floats, facts: Facts) -> list[object]:
    numbers = (
        *(apgr(curve), cpt(curve, 0.5), aiq(curve, facts.edge, facts.cloud), share_at_dp(curve, 50)),
        *(float(np.quantile(times, q)) for q in (0.5, 0.95)),
    )
    return [router, *(f"{number:.4f}" for number in numbers)]


def _report(
    points: Mapping[str, Sequence[Point]],
    oracle: Sequence[Point],
    summary: Sequence[Sequence[object]],
    facts: Facts,
) -> str:
    counted = [name for name, used in zip(METRICS, facts.counted, strict=True) if used]
    lines = [
        "# Routers for text-to-image, compared",
        "",
        f"Made by `edge-export routerbench` in {facts.seconds:.0f} s: {facts.training_prompts} training prompts,",
        f"{facts.prompts} test prompts of {facts.seeds} images a model, three seeds a router, 95 % bootstrap intervals",
        "over prompts. All routers were trained from scratch on the same token states, with the same three settings to",
        f"choose from on validation. dP counts {', '.join(counted)}; the interval of the others' mean gap holds 0.",
        f"Mean quality: edge {facts.edge:.4f}, cloud {facts.cloud:.4f}.",
        "",
        "## At a routing rate of 50 %",
        "",
        "| router | captured headroom | dP, % | pooled dP, % | win gain, points | rank correlation with realised PRS "
        "| inspector accuracy | dP in the paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for router, curve in points.items():
        point = at(curve, 0.5)
        found = "" if point.inspector_accuracy is None else _text(point.inspector_accuracy)
        cells = [
            *(router, _text(point.headroom), _text(point.delta_p, 1), _text(point.pooled_dp, 1)),
            *(_text(point.win_gain, 1), f"{facts.correlations[router]:.3f}", found),
            f"{PAPER[router]:.2f}" if router in PAPER else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "| oracle | 1 | | | | | | |",
        "",
        f"The best baseline on validation is {facts.best_baseline}. Captured headroom above its, paired over prompts:",
        *(f"- {name}: {_text(difference)}" for name, difference in facts.differences.items()),
        "",
        "## Over all rates",
        "",
        "| " + " | ".join(SUMMARY) + " |",
        "|" + "---|" * len(SUMMARY),
        *("| " + " | ".join(map(str, row)) + " |" for row in summary),
        f"| oracle | {apgr(oracle):.4f} | {cpt(oracle, 0.5):.4f} "
        f"| {aiq(oracle, facts.edge, facts.cloud):.4f} | | | |",
        "",
        "Decision times are of the router alone in torch on one thread, token states being there already.",
    ]
    splits = next(iter(facts.elsewhere.values()))
    if splits:
        lines += [
            "",
            "## Elsewhere",
            "",
            "What is won over random at 50 %, in percent of what cloud-only wins, on prompts unlike the training's.",
            "",
            "| router | " + " | ".join(splits) + " |",
            "|---|" + "---|" * len(splits),
        ]
        for router, found_there in facts.elsewhere.items():
            lines.append(
                f"| {router} | " + " | ".join(f"{value:.1f}" for value in found_there.values()) + " |"
            )
    lines += ["", "## Settings chosen on validation", "", "| router | setting |", "|---|---|"]
    for router, setting in facts.settings.items():
        if setting:
            lines.append(f"| {router} | " + ", ".join(f"{k} {v:g}" for k, v in setting.items()) + " |")
    lines += ["", "![deferral curves](deferral.png)", ""]
    return "\n".join(lines)


def _text(estimate: Estimate, digits: int = 2) -> str:
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
