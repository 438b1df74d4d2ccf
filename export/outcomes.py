"""The outcome matrix: measured qualities, prompts x models x seeds x metrics, read from ``labels.parquet``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.superiority import METRICS
from export.errors import ExportError
from export.output import replacing
from export.prompts import PROMPTS, as_read, of_ceiling, scenes_by_text, scenes_of
from export.terminal import console

MODELS = ("edge", "cloud")
SPLITS = tuple(PROMPTS)
COLUMNS = ("prompt_id", "prompt", "split", "objects", "model", "seed", *METRICS)
INSPECTED = "inspected"
INSPECTION = (INSPECTED, "inspected_share")
"""Optional columns of `edge-export inspect`."""
ADHERENCE = "adherence"
"""Optional column of `edge-export label`: no router is trained on it, and the paper's ten stay comparable."""
INSPECTOR = "inspector_digest"  # metadata: whose verdicts they are
EDGE_DIGEST, CLOUD_DIGEST, JUDGE_DIGEST = "edge_digest", "cloud_digest", "judge_digest"
"""The facts of labels, and of what was made of them, that name both models and the judge."""

WHOSE = {EDGE_DIGEST: "of edge model", CLOUD_DIGEST: "of cloud model", JUDGE_DIGEST: "from judge"}
"""What each of them says of labels, for people."""

FACTS = (*WHOSE, "metrics")
"""Metadata of the Parquet schema: `Bundle.model_digest` of the edge model, the digests of the cloud model
(`cloud-server digest`) and of the judge, and the metrics as JSON: one [name, positive text, negative text] a metric, in
the order of METRICS."""


@dataclass(frozen=True)
class Outcomes:
    """Qualities in [0, 1] of ``N`` prompts. ``*_seeds`` hold each image, NaN beyond the seeds a prompt has."""

    ids: NDArray[np.int64]
    """[N]"""
    prompts: tuple[str, ...]
    splits: NDArray[np.str_]
    """[N], each one of SPLITS."""
    objects: NDArray[np.int64]
    """[N], number of objects the prompt names."""
    edge_seeds: NDArray[np.float32]
    """[N, S, M]"""
    cloud_seeds: NDArray[np.float32]
    """[N, S, M]"""
    edge_inspected: NDArray[np.float32] | None
    """[N, S], 1 where the inspector finds in the image what was asked for, 0 where not, NaN where nothing says; None
    without the column ``inspected``."""
    cloud_inspected: NDArray[np.float32] | None
    """[N, S], likewise."""
    facts: Mapping[str, str]
    """The file's own metadata, see FACTS; what is not stated is missing here."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def edge(self) -> NDArray[np.float32]:
        """Mean over seeds, [N, M]."""
        return np.nanmean(self.edge_seeds, axis=1)

    @property
    def cloud(self) -> NDArray[np.float32]:
        """Mean over seeds, [N, M]."""
        return np.nanmean(self.cloud_seeds, axis=1)

    def where(self, chosen: NDArray[np.bool_]) -> Outcomes:
        """The prompts that ``chosen`` [N] is true for."""
        rows = np.flatnonzero(chosen)
        return Outcomes(
            self.ids[rows],
            tuple(self.prompts[row] for row in rows),
            self.splits[rows],
            self.objects[rows],
            self.edge_seeds[rows],
            self.cloud_seeds[rows],
            None if self.edge_inspected is None else self.edge_inspected[rows],
            None if self.cloud_inspected is None else self.cloud_inspected[rows],
            self.facts,
        )

    def split(self, name: str) -> Outcomes:
        """The prompts of one split; ExportError when there are fewer than two."""
        part = self.where(self.splits == name)
        if len(part) < 2:
            raise ExportError(
                f"the labels hold {len(part)} prompts of the split {name!r}: label more prompts"
            )
        return part

    def common_seeds(self) -> int:
        """How many images every prompt has of both models. ExportError when a few have fewer than most: all prompts
        would be measured by as many as these have.

        More images than of others are made of the prompts of `of_ceiling`, so most is said of the rest.
        """
        counts = np.minimum(*((~np.isnan(one[..., 0])).sum(1) for one in (self.edge_seeds, self.cloud_seeds)))
        ordinary = counts[~of_ceiling(self.ids)]
        most = int(np.bincount(ordinary if len(ordinary) else counts).argmax())
        least = int(counts.argmin())
        if (fewest := int(counts[least])) < most:
            raise ExportError(
                f"prompt {self.ids[least]} has {fewest} of the {most} images of each model that most prompts have, "
                f"and all would be measured by {fewest}: run `edge-export label` again, or remove the prompts that "
                f"have fewer, {(counts < most).sum()} of {len(self)}"
            )
        return fewest

    def must_be_inspected_whole(self) -> None:
        """ExportError for a prompt of which some images have a verdict and some have none.

        `edge-export inspect` leaves such where it was shown a part of the images, and a mean over them is no accuracy.
        """
        if self.edge_inspected is None or self.cloud_inspected is None:
            return
        made = ~np.isnan(np.concatenate([self.edge_seeds[..., 0], self.cloud_seeds[..., 0]], axis=1))
        said = ~np.isnan(np.concatenate([self.edge_inspected, self.cloud_inspected], axis=1))
        part = np.flatnonzero(said.any(axis=1) & (said != made).any(axis=1))
        if part.size:
            row = part[0]
            raise ExportError(
                f"prompt {self.ids[row]} has a verdict on {said[row].sum()} of its {made[row].sum()} images: run "
                f"`edge-export inspect` on all of them, or remove the column {INSPECTED!r}"
            )

    def must_be_of(self, bundle: Bundle) -> None:
        """ExportError when the labels say that they are of another edge model than ``bundle``."""
        if unlike({EDGE_DIGEST: bundle.model_digest}, self.facts):
            raise ExportError(
                f"the labels are {WHOSE[EDGE_DIGEST]} {self.facts[EDGE_DIGEST][:16]}, and {bundle.folder} holds "
                f"{bundle.model_digest[:16]}: name the bundle they were made with, or label again"
            )

    def scenes(self) -> NDArray[np.int64]:
        """[N]: prompts that say the same have the same number, see `scenes_of`."""
        return scenes_of(self.prompts, scenes_by_text(self.ids, self.splits))

    @classmethod
    def read(cls, path: Path) -> Outcomes:
        """Read and check the matrix; ExportError names the first prompt whose cells are missing or wrong."""
        table = read_table(path)
        column = {name: table[name].to_numpy() for name in COLUMNS}
        ids, first, row_of = np.unique(column["prompt_id"], return_index=True, return_inverse=True)
        for name in ("prompt", "split", "objects"):
            other = np.flatnonzero(column[name] != column[name][first][row_of])
            if other.size:
                raise ExportError(f"{path}: prompt {ids[row_of[other[0]]]} has more than one {name}")
        prompts = tuple(column["prompt"][first].tolist())
        _distinct(path, ids, prompts)
        splits = column["split"][first].astype(str)
        if unknown := sorted(set(splits) - set(SPLITS)):
            raise ExportError(f"{path}: unknown split {unknown[0]!r}; there are {', '.join(SPLITS)}")

        values = np.stack([column[name] for name in METRICS], axis=1).astype(np.float32)
        wrong = np.flatnonzero(~((values >= 0) & (values <= 1)).all(axis=1))
        if wrong.size:
            raise ExportError(
                f"{path}: a quality outside [0, 1] or not a number at {_image(column, wrong[0])}; label it again"
            )

        def by_seed(rows: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
            """By model [N, S, M], of a row an image."""
            return {
                model: _seeds(path, model, ids, row_of, column["seed"], rows, column["model"] == model)
                for model in MODELS
            }

        seeds = by_seed(values)
        _same_seeds(path, ids, row_of, column["seed"], column["model"] == "edge", splits == "train")
        inspected: dict[str, NDArray[np.float32]] = {}
        for name in (name for name in INSPECTION if name in table.column_names):
            verdict = table[name].to_numpy()
            wrong = np.flatnonzero((verdict < 0) | (verdict > 1))  # where it is NaN nothing is said
            if wrong.size:
                raise ExportError(
                    f"{path}: {name} is {verdict[wrong[0]]}, outside [0, 1], at {_image(column, wrong[0])}; remove "
                    f"the columns {' and '.join(INSPECTION)}, and run `edge-export inspect` again"
                )
        if INSPECTED in table.column_names:
            verdicts = by_seed(table[INSPECTED].to_numpy().astype(np.float32)[:, None])
            inspected = {model: verdict[..., 0] for model, verdict in verdicts.items()}
        facts = facts_of(table)
        declared = _known_metrics(path, facts.get("metrics"))
        _remark_unread(path, table.schema, declared)
        return cls(
            ids.astype(np.int64),
            prompts,
            splits,
            column["objects"][first].astype(np.int64),
            seeds["edge"],
            seeds["cloud"],
            inspected.get("edge"),
            inspected.get("cloud"),
            {name: facts[name] for name in FACTS if name in facts},
        )


def unlike(known: Mapping[str, str | None], stated: Mapping[str, str]) -> str | None:
    """The first fact that is ``known`` and ``stated`` otherwise. What one side leaves open is taken to be the same."""
    return next(
        (name for name, fact in known.items() if fact and stated.get(name, fact) not in ("", fact)), None
    )


def read_table(path: Path) -> pa.Table:
    """The matrix as it lies in the file, a row an image; ExportError when it is none."""
    if not path.is_file():  # of a folder pyarrow would read all that lies in it
        raise ExportError(f"there is no file {path}; name the labels that `edge-export label` wrote")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ExportError(
            f"{path}: not readable as labels ({error}); make them with `edge-export label`"
        ) from error
    if not len(table):
        raise ExportError(f"{path}: the labels have no rows; make them with `edge-export label`")
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise ExportError(f"{path}: no column {missing[0]!r}; make the labels again with `edge-export label`")
    _sound_columns(path, table)
    if unknown := set(table["model"].unique().to_pylist()) - {*MODELS}:
        raise ExportError(f"{path}: unknown model {sorted(map(str, unknown))[0]!r}; there are edge and cloud")
    return table


def facts_of(table: pa.Table) -> dict[str, str]:
    """What the metadata of a matrix states, FACTS and others."""
    return {name.decode(): fact.decode() for name, fact in (table.schema.metadata or {}).items()}


def write_table(table: pa.Table, path: Path) -> None:
    """Write a matrix, or a piece of one. Bytes of measured numbers lie together by their place in the number, as the
    first ones are alike: the file is a third smaller.
    """
    measured = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    other = [name for name in table.column_names if name not in measured]
    with replacing(path) as partial:
        pq.write_table(
            table, partial, compression="zstd", use_dictionary=other, use_byte_stream_split=measured
        )


def _sound_columns(path: Path, table: pa.Table) -> None:
    """ExportError for a column of another type, a hole where a row says what it is of, or metadata that is no text."""
    wanted: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
        **dict.fromkeys(("prompt", "split", "model"), ("text", _is_text)),
        **dict.fromkeys(("prompt_id", "objects", "seed"), ("whole numbers", pa.types.is_integer)),
        **dict.fromkeys((*METRICS, *INSPECTION), ("numbers", _is_number)),
    }
    for name, (what, fits) in wanted.items():
        if name not in table.column_names:
            continue
        column = table[name]
        if not fits(column.type):
            raise ExportError(
                f"{path}: column {name!r} holds {column.type}, not {what}; make the labels again"
            )
        # Of a measurement that is missing `Outcomes.read` names the prompt.
        if name not in (*METRICS, *INSPECTION) and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ExportError(f"{path}: row {row} has no {name}; remove it, or make the labels again")
    stated = (table.schema.metadata or {}).items()
    if unreadable := [key for key, value in stated if not (_is_utf8(key) and _is_utf8(value))]:
        raise ExportError(
            f"{path}: its metadata {unreadable[0]!r} is not text in UTF-8; make the labels again"
        )


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _image(column: Mapping[str, NDArray[np.generic]], row: int) -> str:
    return ", ".join(f"{name} {column[name][row]}" for name in ("prompt_id", "model", "seed"))


def _distinct(path: Path, ids: NDArray[np.int64], prompts: Sequence[str]) -> None:
    """ExportError for a prompt that says nothing, or that is read as another one."""
    first: dict[str, int] = {}
    for number, text in enumerate(prompts):
        read = as_read(text)
        if not read:
            raise ExportError(f"{path}: prompt {ids[number]} is empty; remove it")
        if (same := first.setdefault(read, number)) != number:
            again = "" if text == prompts[same] else f", or as good as: {prompts[same]!r}"
            raise ExportError(
                f"{path}: prompts {ids[same]} and {ids[number]} are both {text!r}{again}; remove one, or a router is "
                "measured on what it learnt"
            )


def _remark_unread(path: Path, schema: pa.Schema, declared: Sequence[str]) -> None:
    """Say of measurements that nobody knows that they count for nothing.

    They are no fault: metadata does not declare all that is measured, see ADHERENCE, and nothing here reads them.
    """
    known = {*COLUMNS, *INSPECTION, ADHERENCE, *declared}
    for field in schema:
        if pa.types.is_floating(field.type) and field.name not in known:
            console.print(
                f"{path}: column {field.name!r} is not read: it is no metric of this version or of the file's metadata"
            )


def _known_metrics(path: Path, stated: str | None) -> tuple[str, ...]:
    """The metrics that the metadata names, () where it does not say; ExportError unless they begin with METRICS.

    Optional ones may follow.
    """
    if stated is None:
        return ()
    try:
        names = tuple(str(name) for name, _, _ in json.loads(stated))
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"{path}: its metadata's metrics are no list of [name, positive text, negative text]; make the labels "
            "again with `edge-export label`"
        ) from error
    if names[: len(METRICS)] != METRICS:
        unknown = next((name for name in names if name not in METRICS), None)
        what = f"unknown metric {unknown!r}" if unknown else f"metrics {', '.join(names)}"
        raise ExportError(f"{path}: {what}; this version compares {', '.join(METRICS)}, in this order")
    return names


def _same_seeds(
    path: Path,
    ids: NDArray[np.int64],
    row_of: NDArray[np.int64],
    seed: NDArray[np.int64],
    edge: NDArray[np.bool_],
    learnt: NDArray[np.bool_],
) -> None:
    """ExportError for a cell of the matrix that one model has and the other lacks: images are compared in pairs.

    Training prompts, those ``learnt`` [N] from, are compared by their means, of which the edge's may be of more images.
    """
    cells = {
        model: set(zip(row_of[rows].tolist(), seed[rows].tolist(), strict=True))
        for model, rows in (("edge", edge), ("cloud", ~edge))
    }
    for model, other in (("edge", "cloud"), ("cloud", "edge")):
        missing = cells[other] - cells[model]
        if model == "cloud":
            missing = {cell for cell in missing if not learnt[cell[0]]}
        if missing:
            prompt, number = min(missing)
            raise ExportError(
                f"{path}: prompt {ids[prompt]} has no image of the {model} model with seed {number}, of the "
                f"{other} model it has; run `edge-export label` again"
            )


def _seeds(
    path: Path,
    model: str,
    ids: NDArray[np.int64],
    row_of: NDArray[np.int64],
    seed: NDArray[np.int64],
    values: NDArray[np.float32],
    chosen: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Rows of one model as [N, S, M], seeds in ascending order, NaN where a prompt has fewer than S."""
    rows = np.flatnonzero(chosen)
    rows = rows[np.lexsort((seed[rows], row_of[rows]))]
    prompt = row_of[rows]
    twice = np.flatnonzero((np.diff(prompt) == 0) & (np.diff(seed[rows]) == 0))
    if twice.size:
        where = f"prompt {ids[prompt[twice[0]]]}, model {model}, seed {seed[rows][twice[0]]}"
        raise ExportError(f"{path}: two rows of {where}; remove one")
    count = np.bincount(prompt, minlength=len(ids))
    if not count.all():
        missing = ids[np.argmin(count)]
        raise ExportError(
            f"{path}: prompt {missing} has no image of the {model} model; run `edge-export label` again"
        )
    place = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    grid = np.full((len(ids), int(count.max()), values.shape[1]), np.nan, np.float32)
    grid[prompt, place] = values[rows]
    return grid
