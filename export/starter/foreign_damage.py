"""Ten more ways to spoil a picture, one a quality metric, that no judge was trained on.

A judge that knows its own training's blur may know nothing but that. Whether a metric means what it says is seen on
another family of the same fault: motion in place of defocus, a swirl in place of a warp.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from export.starter.damage import Sample, as_uint8


def foreign_damage(sample: Sample, metric: str, severity: float, rng: np.random.Generator) -> np.ndarray:
    """The picture spoiled by ``severity`` in (0, 1]: uint8 [H, W, 3]. Raises ValueError for an unknown metric."""
    image = sample.picture
    picture = Image.fromarray(image)
    height, width = image.shape[:2]
    pixels = image.astype(np.float32)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    if metric == "definition":  # a strongly compressed file
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=max(2, round(22 - 20 * severity)))
        return np.asarray(Image.open(file).convert("RGB"))
    if metric == "detail":  # areas as painted with a broad brush
        return as_uint8(_kuwahara(pixels, 1 + round(3 * severity)))
    if metric == "clarity":  # fog that thickens downwards
        fog = 0.9 * severity * (0.4 + 0.6 * rows / height)
        return as_uint8(pixels + (rng.uniform(170, 230) - pixels) * fog[..., None])
    if metric == "sharpness":  # the camera moved
        length = 2 + round(7 * severity)
        axis = int(rng.integers(2))
        padded = np.pad(pixels, [(length, length) if i == axis else (0, 0) for i in range(3)], mode="edge")
        shifts = range(length // 2, length // 2 + length)
        size = image.shape[axis]
        return as_uint8(np.mean([np.take(padded, range(s, s + size), axis) for s in shifts], axis=0))
    if metric == "harmony":  # stripes of a colour that belongs nowhere
        wave = np.sin((columns * rng.uniform(-1, 1) + rows) * 2 * np.pi / rng.uniform(10, 18)) > 0.3
        return as_uint8(
            pixels + (rng.uniform(0, 255, size=3) - pixels) * (0.35 + 0.5 * severity) * wave[..., None]
        )
    if metric == "realism":  # everything turns about the middle
        return _swirl(image, 0.8 + 2.2 * severity)
    if metric == "color":  # the brown of an old photograph
        grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
        return as_uint8(
            pixels + (grey[..., None] * np.array([1.07, 0.95, 0.78], np.float32) - pixels) * severity
        )
    if metric == "consistency":  # a disc of another picture
        radius = width * (0.18 + 0.2 * severity)
        middle = rng.uniform(radius, width - radius, size=2)
        disc = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < radius**2
        return np.where(disc[..., None], sample.other, image)
    if metric == "layout":  # cut into strips that slide sideways
        out = image.copy()
        strip = max(6, round(20 - 12 * severity))
        for top in range(0, height, strip):
            shift = int(rng.integers(round(6 + 10 * severity), width // 2)) * (
                1 if rng.random() < 0.5 else -1
            )
            out[top : top + strip] = np.roll(image[top : top + strip], shift, axis=1)
        return out
    if metric == "integrity":  # a wedge taken out of the middle, filled with what lies at the sides
        angle = np.arctan2(rows - height / 2, columns - width / 2)
        middle = rng.choice(angle[sample.objects])  # where there is something to be missing
        wedge = (angle - middle + 0.4 + 0.8 * severity) % (2 * np.pi) < 0.8 + 1.6 * severity
        return np.where(wedge[..., None], np.broadcast_to(image[:, :1], image.shape), image)
    raise ValueError(f"no damage is known for the metric {metric!r}")


def _kuwahara(pixels: np.ndarray, radius: int) -> np.ndarray:
    """Of the four squares that have a pixel [H, W, 3] for their corner, the mean of the one that varies least.

    Kuwahara et al., "Processing of RI-Angiocardiographic Images", 1976: edges stay, what is small within them goes, and
    no colour comes in that was not between its neighbours.
    """
    height, width, _ = pixels.shape
    padded = np.pad(pixels, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    squares = np.lib.stride_tricks.sliding_window_view(padded, (radius + 1, radius + 1), (0, 1))
    means, spread = squares.mean((-2, -1)), squares.var((-2, -1)).sum(-1)
    corners = [
        (slice(row, row + height), slice(column, column + width))
        for row in (0, radius)
        for column in (0, radius)
    ]
    calmest = np.argmin([spread[corner] for corner in corners], axis=0)
    return np.take_along_axis(
        np.stack([means[corner] for corner in corners]), calmest[None, ..., None], axis=0
    )[0]


def _swirl(image: np.ndarray, turn: float) -> np.ndarray:
    """Turn the middle by ``turn`` radians, less and less towards the border."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = rows - height / 2, columns - width / 2
    angle = turn * np.exp(-np.hypot(x, y) / (0.3 * width))
    source_x = np.cos(angle) * x - np.sin(angle) * y + width / 2
    source_y = np.sin(angle) * x + np.cos(angle) * y + height / 2
    row = np.clip(np.rint(source_y), 0, height - 1).astype(int)
    column = np.clip(np.rint(source_x), 0, width - 1).astype(int)
    return image[row, column]
