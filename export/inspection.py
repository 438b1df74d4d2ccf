"""Is what was asked for in the picture? The inspector's verdicts on generated images, and what they are worth.

    edge-export inspect LABELS IMAGES [--report docs/inspector.md]

Adds to the labels, for every image that lies in the folder IMAGES (`edge-export label` keeps them under
`--parts`, in `images`), the columns `inspected` (1 when everything asked for is there, else 0) and `inspected_share`
(how much of it is). An image that is not in the folder keeps the verdict this inspector has given it; where no scene is
known there is none.
Then measures the inspector: on rendered scenes it has not met, on the same with the prompts exchanged, and against
verdicts on generated images given by eye (``starter/inspector_audit.json``). No router, predictor or calibration reads
what is written here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from export.bootstrap import interval
from export.errors import ExportError
from export.markdown import head, row
from export.outcomes import INSPECTION, INSPECTOR, MODELS, Outcomes, facts_of, read_table, write_table
from export.output import check_output, shown, write_output
from export.pieces import Key, all_pictures, keys_of, made_with
from export.prompts import SHARES, Prompt, redrawn, scenes_of
from export.starter.inspector import Inspector, Sight
from export.starter.shipped import STARTER_INSPECTOR
from export.starter.world import Scene, render, sample_scenes
from export.terminal import console, progress

AUDIT = Path(__file__).parent / "starter" / "inspector_audit.json"
APART = 8.0  # pixels, an eighth of the picture: nearer than that nothing is left of or above anything
RENDERED = 1000  # held-out scenes
SEED = 52
RESAMPLES = 1000
KINDS = ("one object", "several of a kind", "two kinds", "three kinds")


@dataclass(frozen=True)
class Verdict:
    """What of a prompt was found. ``related`` and ``placed`` are None where the prompt asks for neither.

    As in GenEval, objects nobody asked for are no fault unless they are too many of a kind that was asked for.
    Sizes are not judged: a generated object of two thirds the size is still what was asked for.
    """

    present: tuple[bool, ...]
    """For each kind of object, whether there is one at all."""
    counted: tuple[bool, ...]
    """For each kind, whether there are as many as asked for."""
    related: bool | None
    """Whether the first kind stands to the second as asked."""
    placed: bool | None
    """Whether the background is the one asked for; a plain one need not be asked for."""

    @property
    def strict(self) -> bool:
        """Everything asked for is there."""
        return all(self._checks)

    @property
    def share(self) -> float:
        """The share of what was asked for that is there."""
        return float(np.mean(self._checks))

    @property
    def _checks(self) -> tuple[bool, ...]:
        return (*self.counted, *(check for check in (self.related, self.placed) if check is not None))


def verdict(sight: Sight, scene: Scene) -> Verdict:
    """Compare what was seen with what was asked for."""
    middles = [
        np.array([(seen.x, seen.y) for seen in sight.objects if seen.name == group.name]).reshape(-1, 2)
        for group in scene.groups
    ]
    related = None
    if scene.relation is not None:
        first, second = middles[:2]
        related = len(first) > 0 and len(second) > 0 and _stands(first, second, scene.relation)
    return Verdict(
        tuple(len(found) > 0 for found in middles),
        tuple(len(found) == group.count for found, group in zip(middles, scene.groups, strict=True)),
        related,
        None if scene.background == "plain" else sight.background == scene.background,
    )


def _stands(first: NDArray[np.float64], second: NDArray[np.float64], relation: str) -> bool:
    right, down = first.mean(axis=0) - second.mean(axis=0)
    return bool({"left of": -right, "right of": right, "above": -down, "below": down}[relation] >= APART)


def kind_of(scene: Scene) -> str:
    """Which of KINDS a prompt is."""
    if len(scene.groups) == 1:
        return KINDS[0] if scene.objects == 1 else KINDS[1]
    return KINDS[len(scene.groups)]


def inspect(
    table: pa.Table, folder: Path, inspector: Inspector, scenes: Mapping[int, Scene]
) -> tuple[pa.Table, dict[Key, Verdict]]:
    """The labels with the verdicts, and these by their pictures."""
    if not scenes:
        raise ExportError(
            "the inspector knows the starter's scenes only, and these labels are of other prompts: there is nothing "
            "that it could look for"
        )
    _made_by_the_same_models(table, folder)
    rows = {key: row for row, key in enumerate(keys_of(table))}
    found: dict[Key, Verdict] = {}
    facts = facts_of(table)
    if facts.get(INSPECTOR) != inspector.digest:
        table = table.drop_columns([name for name in INSPECTION if name in table.column_names])
    strict, share = (_column(table, name) for name in INSPECTION)
    with progress() as bar:
        pictures = bar.track(all_pictures(folder), len(table), description="inspect")
        known = ((key, image) for key, image in pictures if key in rows and key[1] in scenes)
        while batch := list(islice(known, 64)):
            sights = inspector.look([Image.fromarray(image) for _, image in batch])
            for (key, _), sight in zip(batch, sights, strict=True):
                found[key] = verdict(sight, scenes[key[1]])
                strict[rows[key]], share[rows[key]] = found[key].strict, found[key].share
    if not found:
        raise ExportError(
            f"{folder} holds no picture of these labels: name the folder `images` under --parts"
        )
    for name, column in zip(INSPECTION, (strict, share), strict=True):
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, pa.array(column, from_pandas=True))
    return table.replace_schema_metadata(facts | {INSPECTOR: inspector.digest}), found


def _column(table: pa.Table, name: str) -> NDArray[np.float32]:
    if name not in table.column_names:
        return np.full(len(table), np.nan, np.float32)
    return table[name].to_numpy().astype(np.float32)


def _made_by_the_same_models(table: pa.Table, folder: Path) -> None:
    made = made_with(folder)
    if made is None:
        raise ExportError(
            f"{folder} holds no images of `edge-export label`: name the folder `images` under --parts"
        )
    facts = facts_of(table)
    for name, digest in made.items():
        if facts.get(name) != digest:
            raise ExportError(
                f"{folder} holds images of other models than the labels measure ({name}): label again"
            )


def on_rendered(inspector: Inspector, number: int) -> dict[str, list[float]]:
    """Held-out rendered scenes by kind: share found right, strict; and with another scene's prompt, strict."""
    rng = np.random.default_rng(SEED)
    scenes = sample_scenes("validation", number, SEED)
    sights = inspector.look([Image.fromarray(render(scene, rng)) for scene in scenes])
    right: dict[str, list[float]] = {kind: [] for kind in KINDS}
    shuffled: list[float] = []
    for index, (scene, sight) in enumerate(zip(scenes, sights, strict=True)):
        right[kind_of(scene)].append(verdict(sight, scene).strict)
        if scenes[index - 1] != scene:
            shuffled.append(verdict(sight, scenes[index - 1]).strict)
    return right | {"prompts exchanged": shuffled}


def kappa(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Cohen's kappa of two raters [N]: agreement beyond chance, 1 when they never differ."""
    agreed = (one == other).mean()
    chance = one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean())
    return float((agreed - chance) / (1 - chance)) if chance < 1 else 1.0


def bootstrap(
    values: Sequence[float] | NDArray[np.float64],
    statistic: Callable[..., float] = np.mean,
    scenes: NDArray[np.int64] | None = None,
) -> str:
    """The statistic of the rows, and its 95 % interval over their ``scenes``, as text.

    Without these every row is of a scene of its own.
    """
    rows = np.asarray(values)
    if not len(rows):
        return "-"
    of = np.arange(len(rows)) if scenes is None else scenes
    return f"{interval(lambda chosen: statistic(rows[chosen]), of, RESAMPLES, SEED):.2f}"


def scenes_of_prompts(ids: Iterable[int], prompts: Mapping[int, Prompt]) -> NDArray[np.int64]:
    """[N]: prompts that ask for the same scene get the same number."""
    return scenes_of([prompts[one].text for one in ids], {p.text: p.scene for p in prompts.values()})


def against_eye(
    found: Mapping[Key, Verdict], prompts: Mapping[int, Prompt], audit: Path = AUDIT
) -> list[str]:
    """Table rows: agreement and kappa with the verdicts in ``audit``; [] when none of its images is there.

    Images on which the inspector's threshold was chosen do not count. Intervals over scenes.
    """
    entries = [
        entry for entry in json.loads(audit.read_text(encoding="utf-8"))["images"] if not entry["chose"]
    ]
    keyed = [((entry["model"], entry["prompt_id"], entry["seed"]), entry) for entry in entries]
    pairs = [(entry, found[key]) for key, entry in keyed if key in found]
    if not pairs:
        return []
    scenes = scenes_of_prompts([entry["prompt_id"] for entry, _ in pairs], prompts)
    asked: dict[str, Callable[[Verdict], bool]] = {
        "objects": lambda v: all(v.present),
        "counts": lambda v: all(v.counted),
        "everything": lambda v: v.strict,
    }
    lines = []
    for name, of in asked.items():
        both = np.array([(bool(entry[name]), of(v)) for entry, v in pairs])
        cells = (
            *(f"{both[:, column].mean():.2f}" for column in (0, 1)),
            bootstrap(both, lambda rows: float((rows[:, 0] == rows[:, 1]).mean()), scenes),
            bootstrap(both, lambda rows: kappa(rows[:, 0], rows[:, 1]), scenes),
            f"{int((both[:, 1] & ~both[:, 0]).sum())}",
            f"{int((both[:, 0] & ~both[:, 1]).sum())}",
        )
        lines.append(row(name, str(len(pairs)), *cells))
    return lines


def verdicts(table: pa.Table) -> dict[Key, tuple[float, float]]:
    """What the labels say of each image: whether all is there, and how much of it."""
    values = np.stack([_column(table, name) for name in INSPECTION], axis=1)
    pairs = zip(keys_of(table), values.tolist(), strict=True)
    return {key: tuple(pair) for key, pair in pairs if not np.isnan(pair).any()}


def of_models(
    said: Mapping[Key, tuple[float, float]],
    prompts: Mapping[int, Prompt],
    splits: Collection[str] = ("test",),
) -> list[str]:
    """Table rows: accuracy of both models on the splits' prompts by kind; intervals over scenes."""
    by_kind: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
    for (model, prompt_id, _), seen in said.items():
        scene = prompts[prompt_id].scene if prompt_id in prompts else None
        if scene is not None and prompts[prompt_id].split in splits:
            names = (
                kind_of(scene),
                *((f"{scene.objects} of a kind",) if len(scene.groups) == 1 else ()),
                "all",
            )
            for name in names:
                by_kind.setdefault((name, model), {}).setdefault(prompt_id, []).append(seen)
    lines = []
    for name in ("one object", *(f"{count} of a kind" for count in (2, 3, 4)), *KINDS[2:], "all"):
        asked = by_kind.get((name, "edge"), {})
        cells = [str(len(asked)), str(len(set(scenes_of_prompts(asked, prompts).tolist())))]
        for column in range(len(INSPECTION)):
            for model in MODELS:
                groups = by_kind.get((name, model), {})
                means = [float(np.mean([pair[column] for pair in seen])) for seen in groups.values()]
                cells.append(bootstrap(means, scenes=scenes_of_prompts(groups, prompts)))
        lines.append(row(name, *cells))
    return lines


def prompts_of(outcomes: Outcomes) -> dict[int, Prompt]:
    """The router's own prompts among those of the labels, by id; of others no scene is known."""
    texts = dict(zip(outcomes.ids.tolist(), outcomes.prompts, strict=True))
    drawn = redrawn(outcomes.ids, outcomes.splits)
    return {p.prompt_id: p for p in drawn if texts.get(p.prompt_id) == p.text}


def report(
    inspector: Inspector,
    found: Mapping[Key, Verdict],
    said: Mapping[Key, tuple[float, float]],
    prompts: Mapping[int, Prompt],
    command: str,
) -> str:
    """The whole report as Markdown; ``command`` is what it was made by. ``found`` is of the images at hand, ``said`` of
    all that this inspector has seen.
    """
    rendered = on_rendered(inspector, RENDERED)
    by_eye = against_eye(found, prompts)
    asked = head("prompts", "number", "scenes", "everything, edge", "cloud", "share, edge", "cloud")
    lines = [
        "# What the inspector sees",
        "",
        f"Made by `{command}`.",
        "The inspector (`export/starter/inspector.py`) is a detector trained apart from the judge, on scenes of its",
        "own; what it finds is compared with the prompt by rule (`export/inspection.py`): every kind of object as",
        "often as asked, the first to the second as asked, the background asked for. Nothing that routes learns from",
        "it.",
        "",
        "## How good the models are",
        "",
        "Share of images of the test prompts, edge and cloud. *Everything*: all that was asked for is there, as often",
        "and where it was asked for. *Share*: the mean share of it that is. 95 % bootstrap intervals over scenes:",
        "sentences of one scene share its outcomes.",
        "",
        *asked,
        *of_models(said, prompts),
        "",
        "Of one object there are only as many scenes as kinds, sizes and places, so those of the test prompts are few.",
        "The same of the prompts of train, validation, calibration and test together; no generator, judge or inspector",
        "was trained on these scenes either, as they are said:",
        "",
        *asked,
        *of_models(said, prompts, SHARES),
        "",
        "## How far it can be trusted",
        "",
        f"On {RENDERED} rendered scenes of a split it was not trained on, strict, by what they show; and with each",
        "picture held against another scene's prompt, where every yes is a false one:",
        "",
        *head("rendered scenes", "number", "found to be as asked"),
        *(row(name, str(len(values)), bootstrap(values)) for name, values in rendered.items()),
    ]
    if by_eye:
        lines += [
            "",
            "Against verdicts on generated images of both models, given by looking at them enlarged beside their",
            "prompts before the inspector had seen any (`export/starter/inspector_audit.json`). A picture got a yes",
            "for an object where one who knows the sprites would name it. There were two raters, and a third look",
            "where they differed; on the other half of the images, not counted here, the certainty was chosen from",
            "which on an object is there. Intervals are over scenes.",
            "",
            "| question | images | yes by eye | by inspector | agreement | Cohen's kappa | only inspector | only eye |",
            "|---|---|---|---|---|---|---|---|",
            *by_eye,
        ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The stage's command; exit code 0."""
    parser = argparse.ArgumentParser("edge-export inspect", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("labels", type=Path, help="labels.parquet of `edge-export label`; gets the columns")
    parser.add_argument("images", type=Path, help="folder of the images it kept: `images` under its --parts")
    parser.add_argument("--inspector", type=Path, default=STARTER_INSPECTOR, help="default: the starter's")
    parser.add_argument("--report", type=Path, help="write what it found as Markdown")
    options = parser.parse_args(argv)
    if options.report is not None:
        check_output(options.report, options.labels, option="--report")
    outcomes = Outcomes.read(options.labels)
    known = prompts_of(outcomes)
    scenes = {prompt_id: prompt.scene for prompt_id, prompt in known.items() if prompt.scene is not None}
    inspector = Inspector(options.inspector)
    table, found = inspect(read_table(options.labels), options.images, inspector, scenes)
    write_table(table, options.labels)
    console.print(f"{len(found)} of {len(table)} images inspected -> {options.labels}")
    if options.report is not None:
        command = f"edge-export inspect {shown(options.labels)} {shown(options.images)}"
        if options.inspector.resolve() != STARTER_INSPECTOR:
            command += f" --inspector {shown(options.inspector)}"
        command += f" --report {shown(options.report)}"
        write_output(options.report, report(inspector, found, verdicts(table), known, command))
        console.print(f"written to {options.report}")
    return 0
