"""A linear map from latents to colours, so that a preview costs no run of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.reference import Reference

WORTH_SHOWING = 0.5
"""Share of the colours' variance that a map must explain: one that explains less shows little of the picture."""


@dataclass(frozen=True)
class PreviewMap:
    """What `edge_agent.manifest.Facts.latent_to_rgb` holds, and how good it is."""

    rows: tuple[tuple[float, float, float], ...]  # red, green, blue for each channel, then the constant
    explained: float  # share of the colours' variance


def fit_preview(references: Sequence[Reference]) -> PreviewMap:
    """Least squares over the positions of all latents: from each to the mean colour of the pixels made of it."""
    known, wanted = [], []
    for reference in references:
        channels, rows, columns = reference.latents.shape
        height, width, _ = reference.colours.shape
        blocks = reference.colours.reshape(rows, height // rows, columns, width // columns, 3)
        wanted.append(blocks.mean((1, 3)).reshape(-1, 3))
        known.append(reference.latents.reshape(channels, -1).T)
    latents = np.concatenate(known).astype(np.float64)
    colours = np.concatenate(wanted).astype(np.float64)
    design = np.concatenate((latents, np.ones((len(latents), 1))), axis=1)
    fitted = np.linalg.lstsq(design, colours, rcond=None)[0]
    left, whole = colours - design @ fitted, colours - colours.mean(0)
    explained = 1.0 - float((left**2).sum() / max((whole**2).sum(), 1e-12))
    rows = tuple((float(red), float(green), float(blue)) for red, green, blue in fitted)
    return PreviewMap(rows, explained)
