"""The benchmark's tables: a Markdown report for people, CSV files for programs."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.superiority import METRICS
from export.bootstrap import Estimate, Floats
from export.calibrate import FAMILIAR
from export.markdown import head, row
from export.mixture import Shape
from export.routerbench.bundled import NAME as BUNDLED
from export.routerbench.ceiling import Ceiling
from export.routerbench.decision import EARLY, STREAM, Decisions
from export.routerbench.measure import DELTA_P, RATES, SMALL, Point, aiq, apgr, cpt, saved_at_dp, share_at_dp

RESULTS = (
    *("router", "rate", "headroom", "headroom_low", "headroom_high"),
    *("delta_p", "delta_p_low", "delta_p_high", "pgr", "win_gain", "inspector_accuracy"),
)
SUMMARY = ("router", "apgr", "cpt50", "aiq", "cloud_share_at_dp50", "decision_ms_p50", "decision_ms_p95")
ORACLE, CLOUD_ONLY, REFERENCE = "oracle", "cloud only", "told the scenes (reference)"
RESERVED = (BUNDLED, ORACLE, CLOUD_ONLY, REFERENCE)
"""Rows of the report that are none of ROUTERS: no router of one's own may be called so."""
PAPER = {
    "random": 40.00,
    "classifier (RouteLLM, from scratch)": 71.51,
    "Hybrid LLM, probabilistic": 73.49,  # the paper does not say which of the three it is
    "ZOOTER": 77.95,
    "routet2i": 83.97,
}
"""dP in the paper at a routing rate of 50 %, of other models, images and judge."""
MEANS = ("at 50 %", "mean over all rates, as drawn", "mean over all rates, each scene once")
TOLD_APART = (BUNDLED, "ours", "routet2i")
"""Routers compared with every baseline."""


@dataclass(frozen=True)
class Apart:
    """Headroom that one router captures more than another, paired over the same resamples."""

    at_half: Estimate
    mean: Estimate
    """Over all rates."""
    mean_once: Estimate
    """The same on one prompt a scene."""

    @property
    def all(self) -> tuple[Estimate, ...]:
        """In the order of MEANS."""
        return self.at_half, self.mean, self.mean_once


@dataclass(frozen=True)
class Facts:
    """What the report says beside the tables."""

    prompts: int
    scenes: int
    images: int
    """Of each model and test prompt."""
    seeds: int
    """Fits of each router."""
    training_prompts: int
    training_scenes: int
    counted: NDArray[np.bool_]
    best_baseline: str
    headroom_once: Mapping[str, Estimate]
    """At 50 %, on one prompt a scene."""
    differences: Mapping[str, Mapping[str, Apart]]
    """Router -> baseline -> headroom above the baseline's."""
    ablations: Mapping[tuple[str, str], Apart]
    """(without a part, with it): headroom that this loses."""
    directions: int
    """That have nine tenths of the variance of the training prompts' gaps."""
    kept_whole: float
    """Share of the test prompts of which token selection leaves out none."""
    inspected: Mapping[str, Mapping[str, Estimate | None]]
    """Router -> another -> how much more often at 50 % the inspector finds what was asked for."""
    correlations: Mapping[str, float]
    elsewhere: Mapping[str, Mapping[str, Estimate]]
    settings: Mapping[str, Mapping[str, float]]
    ceiling: Ceiling | None
    sentences: float
    """Share of the expected gain's variance between sentences of one scene."""
    oracle: Sequence[tuple[int, float]]
    """(images it chooses by, gain over random) at 50 %, on ``oracle_prompts`` prompts."""
    oracle_prompts: int
    foreseen: Mapping[str, float]
    """What routers gain over random at 50 % on those prompts."""
    cloud_better: float
    """Share of the pairs of images of which the cloud's is the better one, by PRS."""
    seconds: float


@dataclass(frozen=True)
class Curves:
    """What was measured at every rate: of the routers by name, of the oracle, and of cloud-only; mean quality [R] of
    the models' images, of all test prompts and of each resample.
    """

    routers: Mapping[str, Sequence[Point]]
    oracle: Sequence[Point]
    cloud_only: Point
    edge: Floats
    cloud: Floats

    @property
    def all(self) -> dict[str, Sequence[Point]]:
        """Of the routers and of the oracle."""
        return {**self.routers, ORACLE: self.oracle}


@dataclass(frozen=True)
class Summary:
    """One router over all rates. ``cpt50`` is the share of cloud calls that wins half of what cloud-only wins;
    ``decision_ms`` the median and the 95th percentile, or NaN of what is no router.
    """

    apgr: Estimate
    cpt50: Estimate
    cpt80: Estimate
    aiq: Estimate
    cloud_share_at_dp50: Estimate
    decision_ms: tuple[float, float]

    @classmethod
    def of(cls, curve: Sequence[Point], curves: Curves, times: Floats | None) -> Summary:
        """``times`` [T] of one decision, in milliseconds."""
        p50, p95 = (float(np.quantile(times, q)) if times is not None else np.nan for q in (0.5, 0.95))
        return cls(
            apgr(curve),
            cpt(curve, 0.5),
            cpt(curve, 0.8),
            aiq(curve, curves.edge, curves.cloud),
            share_at_dp(curve, 50),
            (p50, p95),
        )


def write(
    folder: Path,
    curves: Curves,
    decision_ms: Mapping[str, Floats],
    facts: Facts,
    decisions: Decisions | None,
) -> None:
    """Write results.csv, summary.csv and report.md."""
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(RESULTS)
        for router, curve in curves.all.items():
            rows.writerows(_result(router, point) for point in curve)
        rows.writerow(_result(CLOUD_ONLY, curves.cloud_only))
    summary = {
        router: Summary.of(curve, curves, decision_ms.get(router)) for router, curve in curves.all.items()
    }
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(SUMMARY)
        rows.writerows(_summary(router, one) for router, one in summary.items())
    (folder / "report.md").write_text(_report(curves, summary, facts, decisions), encoding="utf-8")


def at(curve: Sequence[Point], rate: float) -> Point:
    """The point of one rate."""
    return next(point for point in curve if point.rate == rate)


def _result(router: str, point: Point) -> list[object]:
    found = point.inspector_accuracy
    headroom = (point.headroom.value, point.headroom.low, point.headroom.high)
    numbers = (
        *(point.delta_p.value, point.delta_p.low, point.delta_p.high),
        *(point.pgr.value, point.win_gain.value),
    )
    return [
        *(router, point.rate),
        *("" if np.isnan(number) else f"{number:.4f}" for number in (*headroom, *numbers)),
        "" if found is None else f"{found.value:.4f}",
    ]


def _summary(router: str, one: Summary) -> list[object]:
    values = (found.value for found in (one.apgr, one.cpt50, one.aiq, one.cloud_share_at_dp50))
    return [router, *("" if np.isnan(number) else f"{number:.4f}" for number in (*values, *one.decision_ms))]


def _report(
    curves: Curves,
    summary: Mapping[str, Summary],
    facts: Facts,
    decisions: Decisions | None,
) -> str:
    counted = [name for name, used in zip(METRICS, facts.counted, strict=True) if used]
    at_half = {name: at(curve, 0.5) for name, curve in curves.routers.items()}
    at_half |= {CLOUD_ONLY: curves.cloud_only, ORACLE: at(curves.oracle, 0.5)}
    lines = [
        "# Routers for text-to-image, compared",
        "",
        f"Made by `edge-export routerbench` in {facts.seconds:.0f} s: {facts.training_prompts} training prompts of",
        f"{facts.training_scenes} scenes,",
        f"{facts.prompts} test prompts of {facts.scenes} other scenes, {facts.images} images a model,",
        f"{facts.seeds} fits of each router, 95 % bootstrap intervals over scenes. All routers were trained from",
        "scratch on the same labels, the bundle's predictor before. They read token states, the classifiers of the",
        "literature, ZOOTER and ours also the words.",
        "",
        "Each of the benchmark's routers that learn has the best of 24 settings on validation and calibration prompts",
        "of the starter's labels (docs/tuning.csv); the ablations have that of routet2i. What ours reads, and which",
        "losses it learns from, was chosen besides, on the same prompts (docs/routers-tried.md).",
        "",
        f"dP counts {_counted(counted)}",
        f"Frequent scenes come in many test prompts; the second column has one prompt a scene, {facts.scenes} in all.",
        *_untold(facts.differences),
        f"Mean quality: edge {curves.edge[0]:.4f}, cloud {curves.cloud[0]:.4f}.",
        "",
        "## At a routing rate of 50 %",
        "",
        *head(
            "router",
            "captured headroom",
            "each scene once",
            "dP, %",
            "dP / cloud-only's",
            "pooled dP, %",
            "PGR",
            "win gain, points",
            "rank correlation with realised PRS, metrics weighing alike",
            "inspector accuracy",
            "dP in the paper",
        ),
    ]
    for router, point in at_half.items():
        found = point.inspector_accuracy
        lines.append(
            row(
                f"{router} (100 %)" if router == CLOUD_ONLY else router,
                f"{point.headroom:.2f}",
                f"{facts.headroom_once[router]:.2f}" if router in facts.headroom_once else "",
                f"{point.delta_p:.1f}",
                f"{point.over_cloud_only:.2f}",
                f"{point.pooled_dp:.1f}",
                f"{point.pgr:.2f}",
                f"{point.win_gain:.1f}",
                f"{facts.correlations[router]:.3f}" if router in facts.correlations else "",
                "" if found is None else f"{found:.3f}",
                f"{PAPER[router]:.2f}" if router in PAPER else "",
            )
        )
    lines += [
        "",
        "The paper's column is of other models, prompts and another judge: no level here compares with it.",
        "",
        "PGR is what is won, as a share of what cloud-only wins. Win gain counts whose image is better, not by how",
        "much: all routers serve equally many images of the cloud, which are the better ones in",
        f"{facts.cloud_better:.1%} of the pairs, so that only the other {1 - facts.cloud_better:.1%} can move it, and",
        "sending the prompts that gain most, which makes headroom, need not.",
        "",
        *_differences(facts),
        *_ablations(facts),
        *_inspected(facts),
        *_ceiling(facts),
        "## Over all rates",
        "",
        *head(
            *("router", "APGR", "CPT 50", "CPT 80", "AIQ", "cloud share at dP 50 %"),
            *("decision, ms, median", "decision, ms, 95th percentile"),
        ),
        *(
            row(
                router,
                *(f"{found:.3f}" for found in (one.apgr, one.cpt50, one.cpt80)),
                *(f"{one.aiq:.4f}", f"{one.cloud_share_at_dp50:.3f}"),
                *("" if np.isnan(ms) else f"{ms:.4f}" for ms in one.decision_ms),
            )
            for router, one in summary.items()
        ),
        "",
        "CPT 50 and CPT 80 are the shares of cloud calls that win half, and four fifths, of what cloud-only wins.",
        "Decision times are of the router alone on one thread, token states being there already, and in torch but for",
        "the bundle's predictor.",
        "",
        *_at_all_rates("Captured headroom", curves.routers, lambda point: f"{point.headroom:.2f}"),
        *_at_all_rates("PGR", curves.all, lambda point: f"{point.pgr:.2f}"),
        *_at_all_rates("Win gain, points", curves.all, lambda point: f"{point.win_gain:.1f}"),
        *_at_all_rates(
            "Inspector accuracy",
            {name: curve for name, curve in curves.all.items() if curve[0].inspector_accuracy is not None},
            lambda point: "" if point.inspector_accuracy is None else f"{point.inspector_accuracy:.2f}",
        ),
        *_at_all_rates(
            "dP (as a share of cloud-only's; pooled), %",
            curves.all,
            lambda point: (
                f"{point.delta_p.value:.0f} ({100 * point.over_cloud_only.value:.0f}; {point.pooled_dp.value:.0f})"
            ),
        ),
        "Cloud calls saved against random routing at the same dP, %; empty where either never reaches it. Intervals",
        "are of the samples in which both do:",
        "",
        *head("router", *(f"dP {wanted} %" for wanted in DELTA_P)),
        *(
            row(name, *(f"{saved_at_dp(curve, curves.cloud_only, wanted).percent:.0f}" for wanted in DELTA_P))
            for name, curve in curves.all.items()
        ),
    ]
    splits = next(iter(facts.elsewhere.values()))
    if splits:
        lines += [
            "",
            "## Elsewhere",
            "",
            "What is won over random at 50 %, in percent of what cloud-only wins, on prompts unlike the training's.",
            "",
            *head("router", *splits),
            *(
                row(router, *(f"{value:.1f}" for value in there.values()))
                for router, there in facts.elsewhere.items()
            ),
        ]
    lines += ["", "## Settings", "", *head("router", "setting")]
    for router, setting in facts.settings.items():
        if setting:
            lines.append(row(router, ", ".join(f"{k} {v:g}" for k, v in setting.items())))
    lines += ["", "![deferral curves](deferral.png)", "", "![quality over cost](cost.png)", ""]
    return "\n".join(lines + _decisions(decisions))


def _counted(names: Sequence[str]) -> str:
    """Of which metrics dP is made, and why not of the others."""
    if len(names) == len(METRICS):
        return "all metrics."
    return (
        f"{', '.join(names) or 'no metric'}:\n"
        f"on the others the models' mean gap is less than {SMALL:g} standard deviations on the training prompts."
    )


def _untold(differences: Mapping[str, Mapping[str, Apart]]) -> list[str]:
    """Why headroom, or a mean of it over rates, is missing from the tables, where it is."""
    apart = [one for baselines in differences.values() for costs in baselines.values() for one in costs.all]
    if not any(np.isnan(one.value) for one in apart):
        return []
    return [
        "Headroom is left empty at rates at which, on these prompts or on a sample of them, the oracle wins no more",
        "than random, and so are means over such rates: more prompts, or more images of each, would tell.",
    ]


def _ceiling(facts: Facts) -> list[str]:
    """What stands between routers and the oracle."""
    found = facts.ceiling
    if found is None:
        return []
    alike = "No two of the test prompts say one scene."
    if not np.isnan(facts.sentences):
        alike = (
            f"Sentences of one scene share its gain: {facts.sentences:.0%} of the expected gain's variance lies "
            "between\nthem on the test prompts."
        )
    won = "The last of them wins no more than random there: of that there are no shares."
    if (best := facts.oracle[-1][1]) > 0:
        shares = ", ".join(f"{name} wins {gain / best:.2f}" for name, gain in facts.foreseen.items())
        won = f"Of what the last of them wins there, at 50 %, {shares}."
    return [
        "## The ceiling",
        "",
        "Where the variance of the gain lies, one image a model, on the training scenes:",
        "",
        *head("part", "share"),
        *(row(kind, f"{share:.0%}") for kind, share in found.components.items()),
        "",
        f"{alike} Of the expected gain, words and pairs of words explain {found.carried_over:.0%};",
        "only that part carries over to scenes that nobody trained on, and the oracle knows the rest as well. The",
        "reference is a Gaussian process told the scenes: it reads without error what routers must read from states.",
        "It learns with the number of scenes (correlation with the measured gain of training scenes left out): "
        + ", ".join(f"{correlation:.2f} from {scenes}" for scenes, correlation in found.curve)
        + ".",
        "",
        f"What the oracle wins over random at 50 % on {facts.oracle_prompts} test prompts, by the number of images",
        f"that it chooses by; headroom is measured against the one that chooses by {facts.images - 1}:",
        "",
        *head("images", "gain over random"),
        *(row(str(images), f"{gain:.4f}") for images, gain in facts.oracle),
        "",
        won,
        "",
    ]


def _inspected(facts: Facts) -> list[str]:
    """Whether what routers win shows in what an inspector finds."""
    shown = {name: found for name, found in facts.inspected.items() if None not in found.values()}
    if not shown:
        return []
    return [
        "How much more often, at 50 %, the inspector finds in the served image what was asked for than by",
        "",
        *head("router", *next(iter(shown.values()))),
        *(row(name, *(f"{one:.3f}" for one in found.values() if one)) for name, found in shown.items()),
        "",
    ]


def _at_all_rates(
    what: str, curves: Mapping[str, Sequence[Point]], cell: Callable[[Point], str]
) -> list[str]:
    if not curves:
        return []
    return [
        f"{what}:",
        "",
        *head("router", *(f"{rate:.0%}" for rate in RATES)),
        *(row(name, *map(cell, curve)) for name, curve in curves.items()),
        "",
    ]


def _differences(facts: Facts) -> list[str]:
    """How far the paper's method and ours are above or below each baseline."""
    best = facts.best_baseline
    lines = [
        f"The best baseline on validation is {best}. Captured headroom above its, paired over scenes:",
        "",
        *head("router", *MEANS),
        *(row(name, *map("{:.3f}".format, apart[best].all)) for name, apart in facts.differences.items()),
        "",
        "Above every baseline's, that one in bold: it alone was chosen without the test prompts, and no interval is",
        "widened for the number of comparisons:",
        "",
        *head("router", "above", *MEANS),
    ]
    for name in (name for name in TOLD_APART if name in facts.differences):
        for baseline, apart in facts.differences[name].items():
            lines.append(
                row(
                    name,
                    f"**{baseline}**" if baseline == best else baseline,
                    *map("{:.3f}".format, apart.all),
                )
            )
    return [*lines, ""]


def _ablations(facts: Facts) -> list[str]:
    """Which parts of the paper's design earn their place here."""
    if not facts.ablations:
        return []
    return [
        "What the paper's method loses in headroom without one of its parts, paired:",
        "",
        *head("without", "beside", *MEANS, "does the part earn its place here?"),
        *(
            row(name, whole, *map("{:.2f}".format, costs.all), _verdict(costs))
            for (name, whole), costs in facts.ablations.items()
        ),
        "",
        "By expected gain the same networks rank by what headroom is made of; a single metric can rank by nothing",
        "else, and is compared with that. Both gates are linear, so that T+ - T- = T (P+ - P-) S: a single gate can",
        "say whatever both can, and what this ablation changes is how training goes. Of the gaps of a prompt, one a",
        f"metric, {facts.directions} directions have nine tenths of the variance on the training prompts: their mean",
        f"says much of what they say. Selection keeps up to {Shape.kept} tokens, which is all of",
        f"{facts.kept_whole:.0%} of the test prompts.",
        "",
    ]


def _verdict(costs: Apart) -> str:
    """What each of the three measures says, those that agree together."""
    said: dict[str, list[str]] = {"yes": [], "no, better without": [], "not that could be told": []}
    for cost, measure in zip(costs.all, MEANS, strict=True):
        answer = (
            "yes" if cost.low > 0 else "no, better without" if cost.high < 0 else "not that could be told"
        )
        said[answer].append(measure)
    agreed = {answer: measures for answer, measures in said.items() if measures}
    if len(agreed) == 1:
        return f"{next(iter(agreed))}, by all three"
    return "; ".join(f"{answer}: {' and '.join(measures)}" for answer, measures in agreed.items())


def _decisions(made: Decisions | None) -> list[str]:
    if made is None:
        return [
            "The bundle has no predictor or no calibration for these labels: its decisions were not measured.",
            "",
        ]
    lines = [
        "## The bundle's own decisions",
        "",
        "### Calibration",
        "",
        "Realised share of prompts in the cloud for a wanted rate; the interval draws calibration prompts and the",
        "split's anew. Where alpha has reached 1/2 the rate may stay below. In bold: the wanted rate lies outside.",
        "",
        *head("split", *(f"{rate:.0%}" for rate in RATES), "largest rate"),
    ]
    for split, rates in made.rates.items():
        cells = [
            f"{'' if rate.kept else '**'}{rate.realised:.2f}{'' if rate.kept else '**'}"
            + (" (1/2)" if rate.bounded else "")
            for rate in rates
        ]
        lines.append(row(split, *cells, f"{made.reachable[split]:.2f}"))
    told = made.explanations
    lines += [
        "",
        f"The calibration prompts' largest rate, which the bundle promises, is {made.reachable['calibration']:.2f}.",
        "",
        f"Where alpha follows the prompts (`--follow-prompts true`), over {STREAM} of a split's, when half should go",
        "to the cloud:",
        "",
        *head("split", "calibrated alpha", f"following, the first {EARLY}", "after them"),
        *(
            row(split, f"{one.fixed:.2f}", f"{one.early:.2f}", f"{one.later:.2f}")
            for split, one in made.followed.items()
        ),
        "",
        "![calibration](calibration.png)",
        "",
        "### Reliability of PRS",
        "",
        f"Slope of realised over predicted PRS on the test prompts: {made.slope:.2f}; 1 would be reliable. Mean of",
        f"realised less mean of predicted: {made.offset:.3f}; 0 would be. The edge's images are the better ones",
        f"(realised PRS above 1/2) for {made.edge_wins:.1%} of them; the bound alpha <= 1/2 keeps",
        f"{made.kept_back:.1%} on the edge at every rate.",
        "",
        "![reliability](reliability.png)",
        "",
        "### Explanations",
        "",
        f"On {told.prompts} test prompts, deleting the token that the decision names first and encoding again moves",
        f"PRS by {told.named:.4f}, deleting any other by {told.others:.4f}:",
        f"{told.ratio:.2f} times as much (aim: 3), and {told.over_any:.2f} times as much as deleting one at",
        "random, which may be the named one. The token that `edge-agent route --explain` names first, which deletes",
        f"every one to find out, moves it {told.measured:.2f} times as much as another. That is a maximum, above 1",
        "by construction: no name can exceed it, and among moves at random it would be 2.5 or more.",
        "",
        "### Domain",
        "",
        f"Prompts with a token that fewer than {FAMILIAR} training prompts have, prompts further from the training",
        "prompts than 95 % of the calibration prompts are (nearest mean token state),",
        "and how well predicted PRS ranks realised PRS there.",
        "",
        *head("split", "with a rare token", "far", "rank correlation"),
        *(
            row(split, f"{one.with_unknown:.0%}", f"{one.far:.0%}", f"{one.correlation:.2f}")
            for split, one in made.domains.items()
        ),
        "",
    ]
    return lines
