"""Do the quality metrics measure what they say, and do they say the same of the next image of the same prompt?

    edge-export validity LABELS [--judge CLIP] [--out docs/metrics.md]

- Validity: pictures of scenes that the judge never saw, spoiled by the damages it learnt from and by ten it has never
  met; how often each metric falls below that of the original. A metric that measures falls nearly always under
  its own damage, and seldom under another's. The ten again on other scenes, from hardly to wholly spoiled.
- Reliability: of the variance between generated images, the share that lies between prompts, and not between two
  images of one prompt (intraclass correlation, one-way random effects). No router can predict the rest.
- Adherence: how often it tells a picture's own prompt from one with an object, a count or the relation wrong.
- Agreement: where the labels hold the inspector's verdicts (`edge-export inspect`), the rank correlation of each metric
  with them over generated images.

Takes about six minutes on one core.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from edge_agent.superiority import METRICS
from export.bootstrap import Floats, intervals
from export.errors import ExportError
from export.evaluate import spearman
from export.markdown import head, row
from export.negatives import FAULTS, hard_negatives
from export.outcomes import ADHERENCE, INSPECTED, JUDGE_DIGEST, MODELS, WHOSE, Outcomes, unlike
from export.output import check_output, default_output, shown, write_output
from export.quality import Judge
from export.starter.damage import Sample, damage, render_samples
from export.starter.foreign_damage import foreign_damage
from export.starter.shipped import STARTER_JUDGE
from export.starter.world import Scene, caption, sample_scenes
from export.terminal import console, progress

OUT, BEGINS = "metrics.md", "# What the metrics measure"
PICTURES = 600
SEVERITY = 0.6
FRESH = 300  # pictures at each of the severities below
SEVERITIES = (0.2, 0.4, 0.6, 0.8, 1.0)
NEARLY_ALWAYS = 0.95  # share of pictures in which a metric is to fall under its own damage
SEED = 41
RESAMPLES = 1000
Spoil = Callable[[Sample, str, float, np.random.Generator], np.ndarray]


def falls(judge: Judge, spoil: Spoil, samples: Sequence[Sample], severity: float = SEVERITY) -> Floats:
    """[damages, metrics]: the share of pictures whose metric is lower once spoiled, damages in the order of metrics."""
    rng = np.random.default_rng(SEED)
    names = [metric.name for metric in judge.metrics]
    before = _judged(judge, [sample.picture for sample in samples])
    shares = []
    with progress() as bar:
        for name in bar.track(names, description="damage"):
            spoiled = [spoil(sample, name, severity, rng) for sample in samples]
            shares.append((_judged(judge, spoiled) < before).mean(axis=0))
    return np.stack(shares)


def own_falls(judge: Judge, spoil: Spoil, samples: Sequence[Sample]) -> Floats:
    """[severities, metrics]: the share of pictures whose metric is lower under its own damage, at SEVERITIES."""
    return np.stack([falls(judge, spoil, samples, severity).diagonal() for severity in SEVERITIES])


def seldom(shares: Floats) -> str:
    """The metrics whose share [M] is less than NEARLY_ALWAYS, with it in percent; "none" when there are none."""
    found = zip(METRICS, shares, strict=True)
    few = [f"{name} ({100 * share:.1f})" for name, share in found if share < NEARLY_ALWAYS]
    return ", ".join(few) or "none"


def reliability(values: Floats) -> Floats:
    """Intraclass correlation ICC(1) of values [N, S, M], [M]: what one image tells of its prompt.

    Shrout and Fleiss, Psychological Bulletin 86 (1979): (B - W) / (B + (S - 1) W), B and W being the mean squares
    between and within prompts. A negative estimate says that there is nothing between prompts.
    """
    prompts, seeds, _ = values.shape
    means = values.mean(axis=1)
    between = seeds * means.var(axis=0, ddof=1)
    within = ((values - means[:, None]) ** 2).sum(axis=(0, 1)) / (prompts * (seeds - 1))
    return np.asarray((between - within) / (between + (seeds - 1) * within))


def with_interval(statistic: Callable[[NDArray[np.int64]], Floats], scenes: NDArray[np.int64]) -> list[str]:
    """The statistic of all rows, and its 95 % bootstrap interval over their ``scenes``, as text, an entry a column."""
    return [f"{found:.2f}" for found in intervals(statistic, scenes, RESAMPLES, SEED)]


def complete(test: Outcomes) -> tuple[Floats, Floats]:
    """Edge and cloud qualities [N, S, M] of the prompts, S being the seeds that every one of them has."""
    seeds = test.common_seeds()
    if seeds < 2:
        raise ExportError(
            "one image of a test prompt does not tell how reliable a metric is: label with --measured-draws 2 or more"
        )
    return test.edge_seeds[:, :seeds].astype(np.float64), test.cloud_seeds[:, :seeds].astype(np.float64)


def agreement(labels: Path) -> dict[str, list[float]]:
    """Rank correlation of every metric with the inspector's verdicts over each model's images; {} without verdicts, NaN
    where they say nothing: of fewer than two images, or the same of all.
    """
    table = pq.read_table(labels)
    if INSPECTED not in table.column_names:
        return {}
    found = {}
    verdicts = table[INSPECTED].to_numpy().astype(np.float64)
    for model in MODELS:
        rows = (table["model"].to_numpy() == model) & ~np.isnan(verdicts)
        measured = (name for name in (*METRICS, ADHERENCE) if name in table.column_names)
        values = (table[name].to_numpy().astype(np.float64)[rows] for name in measured)
        known = ((value, ~np.isnan(value)) for value in values)
        pairs = ((value[there], verdicts[rows][there]) for value, there in known)
        found[model] = [spearman(*pair) if len(np.unique(pair[1])) > 1 else np.nan for pair in pairs]
    return found


def preferred(labels: Path) -> tuple[dict[str, list[str]], int]:
    """Of two images of one prompt of which the inspector passes one: how often a metric is higher on that one, each
    metric in turn, by whose images they are. And of how many prompts there are such two.

    A mean over prompts, so that what prompts differ by counts for nothing, with its interval over scenes.
    """
    table = pq.read_table(labels)
    verdicts = table[INSPECTED].to_numpy().astype(np.float64)
    names = [name for name in (*METRICS, ADHERENCE) if name in table.column_names]
    values = np.stack([table[name].to_numpy().astype(np.float64) for name in names], axis=1)
    outcomes = Outcomes.read(labels)
    said = outcomes.scenes()
    scene = dict(zip(outcomes.ids.tolist(), said.tolist(), strict=True))
    ids, model = table["prompt_id"].to_numpy(), table["model"].to_numpy()
    judged = np.flatnonzero(~np.isnan(verdicts) & ~np.isnan(values).any(axis=1))
    order = judged[np.argsort(ids[judged], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)

    def higher(whose: Sequence[str]) -> tuple[Floats, NDArray[np.int64]]:
        shares, of = [], []
        for group in groups:
            rows = group[np.isin(model[group], whose)]
            right, wrong = rows[verdicts[rows] == 1], rows[verdicts[rows] == 0]
            if len(right) and len(wrong):
                shares.append((values[right][:, None] > values[wrong]).mean(axis=(0, 1)))
                of.append(scene[int(ids[rows[0]])])
        return np.array(shares), np.array(of)

    found = {
        "two of the edge's": higher(("edge",)),
        "two of the cloud's": higher(("cloud",)),
        "any two": higher(("edge", "cloud")),
    }
    cells = {
        name: with_interval(lambda rows, shares=shares: shares[rows].mean(axis=0), of)
        for name, (shares, of) in found.items()
        if len(of)
    }
    return cells, len(found["any two"][1])


def tells_apart(
    judge: Judge, scenes: Sequence[Scene], samples: Sequence[Sample]
) -> dict[str, tuple[Floats, NDArray[np.int64]]]:
    """Fault -> for each hard negative of it whether the picture is less like it than like the scene's caption.

    And which scene that is, numbered from 0.
    """
    rng = np.random.default_rng(SEED)
    number = {scene: place for place, scene in enumerate(dict.fromkeys(scenes))}
    told: dict[str, list[tuple[bool, int]]] = {fault: [] for fault in FAULTS}
    for scene, sample in zip(scenes, samples, strict=True):
        text = caption(scene, rng)
        seen = judge.look([Image.fromarray(sample.picture)])
        for negative in hard_negatives(text, scene):
            score = judge.adherence_of(seen, [text], [[negative.text]])[0]
            told[negative.fault].append((bool(score > 0.5), number[scene]))
    return {
        fault: (
            np.array([said for said, _ in found], np.float64),
            np.array([of for _, of in found], np.int64),
        )
        for fault, found in told.items()
    }


def report(judge: Judge, labels: Path, name: Path | str = STARTER_JUDGE) -> str:
    """The whole report as Markdown; ``name`` is where the judge was loaded from.

    Raises ExportError where the labels say that they are of another judge, or hold too little to report on.
    """
    starter = Path(name).resolve() == STARTER_JUDGE.resolve()
    named = "the starter judge" if starter else f"the judge `{name}`"
    trained = "the judge" if starter else "the starter judge"
    test = Outcomes.read(labels).split("test")
    # Half of the report is of the judge and half of the labels.
    if unlike({JUDGE_DIGEST: judge.digest}, test.facts):
        raise ExportError(
            f"the labels are {WHOSE[JUDGE_DIGEST]} {test.facts[JUDGE_DIGEST][:16]}, and {name} is "
            f"{judge.digest[:16]}: name with --judge the CLIP that `edge-export label` measured them with"
        )
    edge, cloud = complete(test)  # before what takes minutes
    rng = np.random.default_rng(SEED)
    scenes = sample_scenes("inspector", PICTURES, SEED)
    samples = render_samples(scenes, rng)
    known, foreign = falls(judge, damage, samples), falls(judge, foreign_damage, samples)
    others = sample_scenes("test", FRESH, SEED)
    by_severity = own_falls(judge, foreign_damage, render_samples(others, np.random.default_rng(SEED)))
    count, seeds, _ = edge.shape
    said = test.scenes()
    components = {
        "edge image": with_interval(lambda rows: reliability(edge[rows]), said),
        "cloud image": with_interval(lambda rows: reliability(cloud[rows]), said),
        "gap": with_interval(lambda rows: reliability((cloud - edge)[rows]), said),
    }
    lines = [
        BEGINS,
        "",
        f"Made by `edge-export validity {shown(labels)}` with {named}.",
        "",
        "## Validity",
        "",
        f"{PICTURES} rendered scenes that the judge never saw, damage of severity {SEVERITY}: in how many percent of",
        "the pairs each metric (column) is lower on the spoiled picture than on the original. Rows are the damages;",
        "each metric's own is in bold. 50 is what a metric that does not care would show.",
        "",
        f"Damages that {trained} was trained on, at other scenes:",
        "",
        *_table("damage", known),
        "",
        "Damages of other families, which it has never met (`export/starter/foreign_damage.py`):",
        "",
        *_table("damage", foreign),
        "",
        "Detail's is a Kuwahara filter; Pillow's mode filter, which takes each channel apart, would add coloured",
        "fringes.",
        "",
        "### At other severities, on other scenes",
        "",
        f"The damages of other families again, on {FRESH} pictures of {len(set(others))} scenes of the split `test`,",
        "on which, as they are said, no model, judge or router was trained: in how many percent of the pairs each",
        "metric is lower under its own damage, by the damage's severity.",
        "",
        *_by_severity(by_severity),
        "",
        *textwrap.wrap(
            _how_far(known.diagonal(), foreign.diagonal(), by_severity), 118, break_on_hyphens=False
        ),
        "",
        "## Reliability",
        "",
        f"Intraclass correlation ICC(1) over {count} test prompts of {seeds} images a model: the share of the variance",
        "that is the prompt's. What is left to the seed no router can foresee. 95 % bootstrap intervals over the",
        f"{len(set(said))} scenes that these prompts say: sentences of one scene share its outcomes.",
        "",
        *head("metric", *components),
    ]
    for index, name in enumerate(METRICS):
        lines.append(row(name, *(column[index] for column in components.values())))
    lines += [
        "",
        "## Adherence",
        "",
        "The optional metric (`edge-export label --adherence`), on the same rendered scenes: how often the judge",
        "finds a picture more like its own prompt than like the same sentence with one thing wrong. 0.5 is chance;",
        "intervals are over scenes.",
        "",
        *head("wrong", "sentences", "told apart"),
    ]
    for fault, (told, of) in tells_apart(judge, scenes, samples).items():
        cell = (
            with_interval(lambda rows, told=told: told[rows].mean(keepdims=True), of)[0] if len(told) else ""
        )
        lines.append(row(fault, str(len(told)), cell))
    if found := agreement(labels):
        lines += [
            "",
            "## Agreement with the inspector",
            "",
            "Rank correlation of each metric with whether the inspector finds in the image what was asked for.",
            "",
            *head("metric", *found),
        ]
        measured = (*METRICS, ADHERENCE)[: len(next(iter(found.values())))]
        for index, name in enumerate(measured):
            cells = ("" if np.isnan(column[index]) else f"{column[index]:.2f}" for column in found.values())
            lines.append(row(name, *cells))
        higher, prompts = preferred(labels)
        lines += [
            "",
            "Prompts differ in what they ask for and in how their pictures look, which hides what a metric says of one",
            "prompt's pictures. Of two images of one prompt of which the inspector passes one, how often the metric is",
            f"higher on that one; {prompts} prompts have such two, 0.5 is chance, intervals are over scenes. *Any two*",
            "are mostly one of either model's, and the cloud's is the better one in both respects:",
            "",
            *head("metric", *higher),
        ]
        for index, name in enumerate(measured):
            lines.append(row(name, *(column[index] for column in higher.values())))
    return "\n".join(lines) + "\n"


def _judged(judge: Judge, pictures: Sequence[np.ndarray]) -> NDArray[np.float32]:
    return judge.quality([Image.fromarray(picture) for picture in pictures])


def _table(corner: str, shares: Floats) -> list[str]:
    lines = head(corner, *METRICS)
    for own, name in enumerate(METRICS):
        cells = [f"{100 * share:.0f}" for share in shares[own]]
        cells[own] = f"**{cells[own]}**"
        lines.append(row(name, *cells))
    return lines


def _by_severity(shares: Floats) -> list[str]:
    by_metric = zip(METRICS, shares.T, strict=True)
    rows = (row(name, *(f"{100 * share:.0f}" for share in of_metric)) for name, of_metric in by_metric)
    return [*head("metric", *map(str, SEVERITIES)), *rows]


def _how_far(known: Floats, foreign: Floats, by_severity: Floats) -> str:
    """What the tables bear out, and what not; shares of each metric under its own damage."""
    enough = f"{100 * NEARLY_ALWAYS:.0f} %"
    here = "; ".join(
        f"at {severity} {seldom(shares)}" for severity, shares in zip(SEVERITIES, by_severity, strict=True)
    )
    margin = 196 * np.sqrt(NEARLY_ALWAYS * (1 - NEARLY_ALWAYS) / FRESH)
    return (
        f"The second table speaks of one damage a metric and of severity {SEVERITY} alone, and of pictures on which "
        "the places that the judge looks from (`VIEWS` in `export/quality.py`) were partly chosen. Metrics that fall "
        f"in fewer than {enough} of its pictures: {seldom(foreign)}. In fewer than {enough} of these others, on which "
        f"nothing was chosen: {here}. Of {FRESH} pictures {margin:.1f} % more or less may be chance. Under the damages "
        f"that were trained on, in the first table: {seldom(known)}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; exit code 0."""
    parser = argparse.ArgumentParser("edge-export validity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("labels", type=Path, help="labels.parquet of `edge-export label`")
    parser.add_argument(
        "--judge", default=STARTER_JUDGE, help="a CLIP: folder or hub id (default: the starter's)"
    )
    parser.add_argument("--out", type=Path, help=f"default: {OUT}")
    options = parser.parse_args(argv)
    out = options.out or default_output(OUT, BEGINS)
    check_output(out, options.labels)
    write_output(out, report(Judge(options.judge), options.labels, options.judge))
    console.print(f"written to {out}")
    return 0
