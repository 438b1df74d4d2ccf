"""Ten ways to spoil a picture, one a quality metric: from them the judge learns what the metrics' words mean."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

# A damage is mostly seen by its own metric, and in part by those that look at much the same thing.
SIDE_EFFECTS: dict[str, dict[str, float]] = {
    "definition": {"detail": 0.5, "sharpness": 0.3},
    "detail": {"definition": 0.4, "sharpness": 0.2},
    "clarity": {"color": 0.3},
    "sharpness": {"definition": 0.5, "detail": 0.5},
    "harmony": {"consistency": 0.2},
    "realism": {"integrity": 0.4, "layout": 0.2},
    "color": {"clarity": 0.2},
    "consistency": {"layout": 0.3, "integrity": 0.3, "harmony": 0.2},
    "layout": {"consistency": 0.4, "integrity": 0.5, "realism": 0.3},
    "integrity": {"realism": 0.4, "detail": 0.2},
}


def damage(
    image: np.ndarray, metric: str, severity: float, rng: np.random.Generator, other: np.ndarray
) -> np.ndarray:
    """Spoil uint8 [H, W, 3] by ``severity`` in (0, 1]. ``other`` is a different picture of the same size."""
    picture = Image.fromarray(image)
    height, width = image.shape[:2]
    if metric == "definition":  # fewer pixels
        small = max(8, round(width / (1.5 + 4 * severity)))
        return np.asarray(picture.resize((small, small), Image.Resampling.BOX).resize((width, height), 0))
    if metric == "detail":  # flat areas, outlines kept
        return np.asarray(picture.filter(ImageFilter.MedianFilter(3 + 2 * round(2 * severity))))
    if metric == "clarity":  # a veil of grey over everything
        veil = rng.uniform(150, 220)
        return _uint8(image + (veil - image.astype(np.float32)) * 0.85 * severity)
    if metric == "sharpness":
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6 + 2.2 * severity)))
    if metric == "harmony":  # patches of foreign colour
        out = image.astype(np.float32)
        for _ in range(2 + round(3 * severity)):
            top, left, size = *rng.integers(0, height - 16, size=2), rng.integers(10, 24)
            patch = out[top : top + size, left : left + size]
            patch += (rng.uniform(0, 255, size=3) - patch) * (0.35 + 0.5 * severity)
        return _uint8(out)
    if metric == "realism":  # bent shapes
        return _warp(image, 1.5 + 5 * severity, rng)
    if metric == "color":
        return np.asarray(ImageEnhance.Color(picture).enhance(1 - severity))
    if metric == "consistency":  # one part of another picture
        share = int(width * (0.2 + 0.3 * severity))
        out = image.copy()
        if rng.random() < 0.5:
            out[:, :share] = other[:, :share]
        else:
            out[:share] = other[:share]
        return out
    if metric == "layout":  # tiles change places
        tile = 16 if severity > 0.5 else 32
        tiles = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
        out = image.copy()
        for (y, x), (v, u) in zip(tiles, rng.permutation(tiles), strict=True):
            out[y : y + tile, x : x + tile] = image[v : v + tile, u : u + tile]
        return out
    if metric == "integrity":  # pieces missing, filled with the background of the same rows
        out = image.copy()
        for _ in range(2 + round(4 * severity)):
            size = int(rng.integers(8, 14 + round(8 * severity)))
            top, left = rng.integers(4, height - size, size=2)
            out[top : top + size, left : left + size] = image[top : top + size, :1]
        return out
    raise ValueError(f"no damage is known for the metric {metric!r}")


def _warp(image: np.ndarray, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Move pixels along a smooth random field of at most ``amplitude`` pixels."""
    height, width = image.shape[:2]
    coarse = rng.uniform(-amplitude, amplitude, size=(2, 6, 6)).astype(np.float32)
    field = [np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in coarse]
    rows, columns = np.mgrid[0:height, 0:width]
    rows = np.clip(np.rint(rows + field[0]), 0, height - 1).astype(int)
    columns = np.clip(np.rint(columns + field[1]), 0, width - 1).astype(int)
    return image[rows, columns]


def _uint8(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 255) + 0.5).astype(np.uint8)
