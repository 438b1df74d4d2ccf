"""A linear map from latents to colours, so that a preview costs no run of the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from export.reference import Reference


def fit_preview(references: Sequence[Reference]) -> tuple[tuple[float, float, float], ...]:
    """A row of red, green, blue for each channel of the latents, then the constant: least squares over `references`.

    What is fitted is each latent position and the mean colour of the pixels that the decoder made of it.
    """
    known, wanted = [], []
    for reference in references:
        channels, rows, columns = reference.latents.shape
        height, width, _ = reference.colours.shape
        blocks = reference.colours.reshape(rows, height // rows, columns, width // columns, 3)
        wanted.append(blocks.mean((1, 3)).reshape(-1, 3))
        known.append(reference.latents.reshape(channels, -1).T)
    latents = np.concatenate(known).astype(np.float64)
    design = np.concatenate((latents, np.ones((len(latents), 1))), axis=1)
    fitted = np.linalg.lstsq(design, np.concatenate(wanted).astype(np.float64), rcond=None)[0]
    return tuple((float(red), float(green), float(blue)) for red, green, blue in fitted)
