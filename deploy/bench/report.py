"""The rows as a table for the terminal, as JSON, and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from row import Row

COLUMNS = ("what", "measured", "in calm moments", "target", "", "note")


def table(rows: Sequence[Row]) -> Table:
    """For a terminal or a pipe."""
    made = Table(*COLUMNS, box=SIMPLE, pad_edge=False)
    colours = {True: "green", False: "red", None: "dim"}
    for row in rows:
        verdict = f"[{colours[row.met]}]{row.verdict}[/]"
        made.add_row(row.what, row.shown, row.shown_calm, row.target, verdict, row.note.replace("[", r"\["))
    return made


def write(folder: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> list[Path]:
    """Writes bench.json, with every single measurement, and bench.md; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {**facts, "rows": [asdict(row) for row in rows]}
    texts = {
        "bench.json": json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False),
        "bench.md": _markdown(rows, facts),
    }
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return [folder / name for name in texts]


def _markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    machine, bundle = facts["machine"], facts["bundle"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = ()
    if providers := facts.get("providers"):
        where = ("", f"Ours on {providers['names']}; first opened in {providers['opened_s']:.1f} s.")
    return "\n".join(
        (
            f"{machine['processor']}, {machine['cores_used']} of {machine['cores']} cores, "
            f"{machine['memory_gb']} GB, {machine['system']} {machine['architecture']}, load {machine['load_before']} "
            f"before the run. {versions}.",
            "",
            f"Bundle {bundle['name']} ({bundle['model_digest'][:16]}): {bundle['width']} x {bundle['height']} pixels, "
            f"{bundle['steps']} steps, guidance {bundle['guidance']:g}. Values are medians of pairs measured in turns, "
            "with 95 % bootstrap intervals.",
            *where,
            "",
            line(COLUMNS),
            line(("---",) * len(COLUMNS)),
            *(line((row.what, row.shown, row.shown_calm, row.target, row.verdict, row.note)) for row in rows),
        )
    )
