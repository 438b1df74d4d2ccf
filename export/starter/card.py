"""Model cards: what each shipped model is, and how exactly it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export.starter.training import RECORD

PURPOSE = {
    "autoencoder": "Pictures of 64 x 64 pixels to latents of 4 x 16 x 16 and back; part of both pipelines.",
    "decoder": "The autoencoder's decoder, trained on alone with the encoder fixed.",
    "edge-text": "The edge model's text encoder, taught to say what fills each cell of an 8 x 8 grid over the picture.",
    "cloud-text": "The cloud model's text encoder, taught likewise.",
    "edge": "The small text-to-image model, a StableDiffusionPipeline that runs on the device.",
    "cloud": "The large text-to-image model, a StableDiffusionPipeline for the cloud server.",
    "sketch": "A model at a fraction of its training. What it gets wrong taught the judge; it is not shipped.",
    "sketch-small": "Another, of the edge's size.",
    "sketch-large": "A third, larger, of the fewest steps.",
    "judge": "A small CLIP that knows the starter world; measures the quality metrics. Never sees a router's prompt.",
    "inspector": "A detector of objects and backgrounds; says whether what was asked for is in a picture, to keep the "
    "judge honest. Shares no weights, loss or scenes with it, and no router learns from it.",
}


def write_card(records: dict[str, dict[str, Any]], out: Path) -> None:
    """Write ``out`` (Markdown) from the records that the runs left."""
    lines = [
        "# Model card",
        "",
        "Starter weights of RouteT2I: made by `edge-export starter` in this repository from its own synthetic world",
        "(sprites of Noto Color Emoji, SIL Open Font License 1.1), from random weights. Licence: Apache-2.0.",
        "They draw 24 objects on six backgrounds and nothing else. The edge's size was chosen so that something is",
        "left to route; nothing was degraded otherwise.",
    ]
    for name, record in records.items():
        lines += ["", f"## {name}", "", PURPOSE[name], "", "| | |", "|---|---|"]
        lines += [
            f"| {key.replace('_', ' ')} | {value} |" for key, value in record.items() if key != "losses"
        ]
        losses = ", ".join(f"{step}: {loss}" for step, loss in record["losses"])
        lines += ["", f"Loss (smoothed) by step: {losses}."]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_records(work: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The records that finished runs left under ``work``."""
    return {name: json.loads((work / name / RECORD).read_text()) for name in names}
