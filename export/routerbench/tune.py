"""Choose the settings of the benchmark's routers, with the same budget for each.

    python -m export.routerbench.tune OUT.csv [--labels LABELS] [--bundle BUNDLE] [--router NAME]

Every router that learns is fitted with the setting that it began with and with 23 others, drawn at random from its
``space``, one seed each. They are compared by what they win on validation and calibration prompts; no test prompt is
read. Each fit adds a line to OUT.csv, and a second run goes on where the first one was stopped. Then the best of each
router is printed: it is taken by writing it into ``routers.py``, for ours into `export.train.Recipe`. Takes about an
hour on two cores.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

from edge_agent.bundle import Bundle
from export.arguments import at_least
from export.errors import ExportError
from export.outcomes import Outcomes
from export.output import check_output, write_output
from export.prompts import never_learnt
from export.routerbench.fitting import (
    blamed_on,
    checked,
    ending,
    keep_states,
    leave_interrupts,
    worth,
)
from export.routerbench.router import Prompts
from export.routerbench.routers import TUNED, Tuned
from export.starter.shipped import STARTER_BUNDLE, STARTER_LABELS
from export.terminal import console, progress

COLUMNS = ("labels", "router", "setting", "validation", "calibration")
COMPARED = ("validation", "calibration")
TRIALS = 24
_NETWORK = {"learning_rate": 1e-3, "falling": 0, "masked": 0.0, "weight_decay": 1e-2}
FIRST: Mapping[str, Mapping[str, float]] = {
    "kNN": {"k": 30},
    "matrix factorisation (RouteLLM)": {
        "learning_rate": 1e-3, "falling": 0, "weight_decay": 1e-2, "width": 64
    },
    "classifier (RouteLLM, from scratch)": _NETWORK,
    "Hybrid LLM, deterministic": _NETWORK,
    "Hybrid LLM, probabilistic": _NETWORK,
    "Hybrid LLM, transformed": _NETWORK,
    "ZOOTER": _NETWORK,
    "routet2i": {"learning_rate": 1e-2, "dropout": 0.3, "gap_weight": 3.0, "weight_decay": 1e-2},
    "ours": {
        "learning_rate": 1e-2, "together_rate": 1e-3, "dropout": 0.3, "masked": 0.25,
        "gap_weight": 3.0, "gain_weight": 3.0, "rank_weight": 3.0,
    },
}  # fmt: skip
"""What each had before there was a tuning."""


def settings_of(kind: type[Tuned]) -> list[Mapping[str, float]]:
    """TRIALS of them, the same every time: where the router began and what is drawn from its space."""
    draw, settings = np.random.default_rng(0), [FIRST[kind.name]]
    while len(settings) < TRIALS:
        setting = {name: values[draw.integers(len(values))] for name, values in kind.space.items()}
        if setting not in settings:
            settings.append(setting)
    return settings


class Trial:
    """What every process of the pool has read once."""

    train: Prompts
    compared: Mapping[str, Prompts]

    @classmethod
    def read(cls, outcomes: Outcomes, bundle: Path, cache: Path) -> None:
        """Keep the prompts of the splits."""
        leave_interrupts()
        torch.set_num_threads(1)
        scenes = np.arange(len(outcomes))  # nothing asks for them here
        found = Prompts.of(outcomes, Bundle.open(bundle), scenes, cache, ("train", *COMPARED))
        cls.train = found.pop("train")
        cls.compared = found

    @classmethod
    def of(cls, kind: type[Tuned], setting: Mapping[str, float]) -> dict[str, str]:
        """The line of one fit: what it captures of what the gains themselves would win, over all rates."""
        with blamed_on(f"{kind.name} with {setting}"):
            score = checked(kind.name, kind().fit(cls.train, cls.compared["validation"], 0, **setting))
        row = {"router": kind.name, "setting": json.dumps(setting)}
        for split, prompts in cls.compared.items():
            won = worth(score(prompts.unseen), prompts.gain)
            row[split] = f"{won / worth(-prompts.gain, prompts.gain):.4f}"
        return row


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the tuning; returns the exit code."""
    kinds = {kind.name: kind for kind in TUNED}
    parser = argparse.ArgumentParser(
        "python -m export.routerbench.tune", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("out", type=Path, metavar="OUT.csv", help="one line a fit")
    parser.add_argument(
        "--labels", type=Path, default=STARTER_LABELS, help="the outcome matrix (default: the starter's)"
    )
    parser.add_argument("--bundle", type=Path, default=STARTER_BUNDLE, help="whose text encoder routers read")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("routerbench-out/cache"),
        help="for token states (default: %(default)s)",
    )
    parser.add_argument("--router", choices=kinds, action="append", help="only this one; may be repeated")
    parser.add_argument("--processes", type=at_least(1), default=2, help="default: %(default)s")
    options = parser.parse_args(argv)

    check_output(options.out, options.labels, option="OUT.csv")
    outcomes, bundle = Outcomes.read(options.labels), Bundle.open(options.bundle)
    outcomes.must_be_of(bundle)
    digest = hashlib.sha256(options.labels.read_bytes()).hexdigest()[:16]
    measured = _measured(options.out, digest)
    scenes = outcomes.scenes()
    outcomes = outcomes.where(never_learnt(outcomes.splits, scenes))
    for split in ("train", *COMPARED):
        outcomes.split(split)  # ExportError where there is none
    options.cache.mkdir(parents=True, exist_ok=True)
    keep_states(outcomes.split("train"), bundle, options.cache)

    chosen = [kinds[name] for name in options.router or kinds]
    wanted = {
        (kind.name, json.dumps(setting)): (kind, setting) for kind in chosen for setting in settings_of(kind)
    }
    left = [trial for key, trial in wanted.items() if key not in measured]
    shared = (outcomes, options.bundle, options.cache)
    with (
        ProcessPoolExecutor(options.processes, initializer=Trial.read, initargs=shared) as pool,
        ending(pool),
        progress() as bar,
    ):
        task = bar.add_task("settings", total=len(wanted), completed=len(wanted) - len(left))
        for done in as_completed([pool.submit(Trial.of, kind, setting) for kind, setting in left]):
            row = {"labels": digest, **done.result()}
            measured[row["router"], row["setting"]] = row
            _write(options.out, measured, kinds)
            bar.update(task, advance=1, note=row["router"])
    for kind in chosen:
        own = [row for (name, _), row in measured.items() if name == kind.name]
        best = max(own, key=lambda row: sum(float(row[split]) for split in COMPARED))
        told = ", ".join(f"{split} {float(best[split]):.3f}" for split in COMPARED)
        console.print(f"{kind.name}: {best['setting']} of {len(own)}; {told}")
    return 0


Measured = dict[tuple[str, str], dict[str, str]]
"""(router, setting) -> its line."""


def _measured(file: Path, labels: str) -> Measured:
    """What an earlier run has measured. ExportError where the file is something else, or of other labels."""
    if not file.exists():
        return {}
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            table = csv.DictReader(lines, strict=True)
            rows = list(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ExportError(f"{file} is no table of a tuning ({error}): name another file") from error
    if table.fieldnames is not None and tuple(table.fieldnames) != COLUMNS:
        raise ExportError(f"{file} has not the columns {', '.join(COLUMNS)} of a tuning: name another file")
    for number, row in enumerate(rows, 2):
        if None in row.values() or None in row:
            raise ExportError(f"{file}, line {number} is not whole: remove it, and it is measured again")
    if any(row["labels"] != labels for row in rows):
        raise ExportError(f"{file} was measured on other labels: name another file")
    return {(row["router"], row["setting"]): row for row in rows}


def _write(file: Path, measured: Measured, routers: Iterable[str]) -> None:
    """All lines, router by router."""
    order = {name: number for number, name in enumerate(routers)}
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(measured.values(), key=lambda row: order.get(row["router"], len(order))))
    write_output(file, text.getvalue())


if __name__ == "__main__":
    from export.__main__ import run

    raise SystemExit(run(main))
