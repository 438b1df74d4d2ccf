"""Ways to spoil a picture, several for each quality metric: from them the judge learns what the metrics' words mean.

A judge that has met one kind of blur knows that kind. Those of a metric have the fault in common and little else, so
that what is learnt carries to kinds it never met (`foreign_damage.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from export.starter.sprites import OBJECTS
from export.starter.world import Scene, as_picture, backdrop, outlines, render

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


@dataclass(frozen=True)
class Sample:
    """A picture, uint8 [H, W, 3], and what some damages need beside it, of the same shape."""

    picture: np.ndarray
    empty: np.ndarray
    """Its background with nothing on it."""
    objects: np.ndarray
    """bool [H, W]: where something is on it."""
    twin: np.ndarray
    """The same places, filled with other objects."""
    other: np.ndarray
    """A picture of something else."""
    sprites: np.ndarray
    """uint8 [H, W]: 0 for the background, k for the k-th object."""


Damage = Callable[[Sample, float, np.random.Generator], np.ndarray]


def render_samples(scenes: list[Scene], rng: np.random.Generator) -> list[Sample]:
    """The scenes' pictures with what spoils them; each has the one before as its ``other``."""
    seeds = [int(seed) for seed in rng.integers(2**32, size=len(scenes))]
    pictures = [render(scene, np.random.default_rng(seed)) for scene, seed in zip(scenes, seeds, strict=True)]
    samples = []
    for index, (scene, seed) in enumerate(zip(scenes, seeds, strict=True)):
        free = [name for name in OBJECTS if name not in {group.name for group in scene.groups}]
        names = rng.choice(free, size=len(scene.groups), replace=False)
        groups = tuple(replace(g, name=str(name)) for g, name in zip(scene.groups, names, strict=True))
        # The same seed, so the same horizon, colours and places.
        empty = as_picture(backdrop(scene.background, np.random.default_rng(seed)))
        twin = render(replace(scene, groups=groups), np.random.default_rng(seed))
        there = np.abs(pictures[index].astype(np.int16) - empty).max(axis=-1) > 12
        sprites = outlines(scene, np.random.default_rng(seed))
        samples.append(Sample(pictures[index], empty, there, twin, pictures[index - 1], sprites))
    return samples


def damage(sample: Sample, metric: str, severity: float, rng: np.random.Generator) -> np.ndarray:
    """The picture spoiled by ``severity`` in (0, 1], in one of the metric's ways: uint8 [H, W, 3].

    Raises ValueError when no damage is known for the metric.
    """
    if metric not in DAMAGES:
        raise ValueError(f"no damage is known for the metric {metric!r}")
    ways = DAMAGES[metric]
    return ways[int(rng.integers(len(ways)))](sample, severity, rng)


# --- definition: too little information ---------------------------------------------------------------------------


def _fewer_pixels(sample: Sample, severity: float, _: np.random.Generator) -> np.ndarray:
    height, width = sample.picture.shape[:2]
    small = max(8, round(width / (1.5 + 4 * severity)))
    picture = Image.fromarray(sample.picture).resize((small, small), Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), Image.Resampling.NEAREST))


def _fewer_lines(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    height, width = sample.picture.shape[:2]
    lines = max(8, round(height / (2 + 6 * severity)))
    size = (width, lines) if rng.random() < 0.5 else (lines, height)
    picture = Image.fromarray(sample.picture).resize(size, Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), Image.Resampling.NEAREST))


def _fewer_levels(sample: Sample, severity: float, _: np.random.Generator) -> np.ndarray:
    """Few colours, dithered in a pattern."""
    pattern = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16 - 15 / 32
    step = 30 + 110 * severity
    height, width = sample.picture.shape[:2]
    threshold = np.tile(pattern, (height // 4 + 1, width // 4 + 1))[:height, :width, None]
    return as_uint8(np.round(sample.picture / step + threshold) * step)


def _coarse_wavelets(sample: Sample, severity: float, _: np.random.Generator) -> np.ndarray:
    """Differences between neighbouring blocks rounded, those of colour more than those of light."""
    channels = np.asarray(Image.fromarray(sample.picture).convert("YCbCr"), np.float32)
    step = 12 + 70 * severity
    rounded = [_rounded_haar(channels[..., c], step * (1 if c == 0 else 2), levels=3) for c in range(3)]
    return np.asarray(Image.fromarray(as_uint8(np.stack(rounded, axis=-1)), "YCbCr").convert("RGB"))


def _rounded_haar(values: np.ndarray, step: float, levels: int) -> np.ndarray:
    """Haar-transform [H, W], round the differences to multiples of ``step``, transform back."""
    if levels == 0:
        return values
    for axis in (0, 1):
        values = np.moveaxis(values, axis, 0)
        values = np.concatenate([values[0::2] + values[1::2], values[0::2] - values[1::2]]) / 2
        values = np.moveaxis(values, 0, axis)
    rows, columns = (size // 2 for size in values.shape)
    out = np.round(values / step) * step
    out[:rows, :columns] = _rounded_haar(values[:rows, :columns], step * 0.7, levels - 1)
    for axis in (1, 0):
        out = np.moveaxis(out, axis, 0)
        mean, half = np.split(out, 2)
        out = np.moveaxis(np.stack([mean + half, mean - half], axis=1).reshape(out.shape), 0, axis)
    return out


# --- detail: outlines kept, what is inside them gone --------------------------------------------------------------


def _median(sample: Sample, severity: float, _: np.random.Generator) -> np.ndarray:
    picture = Image.fromarray(sample.picture)
    return np.asarray(picture.filter(ImageFilter.MedianFilter(3 + 2 * round(2 * severity))))


def _opened(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Small bright things swallowed by dark ones, or the other way round."""
    size = 3 + 2 * round(1.2 * severity)
    filters = [ImageFilter.MinFilter(size), ImageFilter.MaxFilter(size)]
    picture = Image.fromarray(sample.picture)
    for each in filters if rng.random() < 0.5 else filters[::-1]:
        picture = picture.filter(each)
    return np.asarray(picture)


def _poster(sample: Sample, severity: float, _: np.random.Generator) -> np.ndarray:
    """A handful of flat colours, specks removed."""
    colours = round(14 - 10 * severity)
    flat = Image.fromarray(sample.picture).quantize(
        colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
    )
    return np.asarray(flat.convert("RGB").filter(ImageFilter.MedianFilter(3)))


def _smoothed_within(sample: Sample, severity: float, _: np.random.Generator) -> np.ndarray:
    """Every pixel the mean of the neighbours that are like it (a sigma filter), again and again."""
    values = sample.picture.astype(np.float32)
    tolerance = 25 + 45 * severity
    for _round in range(2 + round(3 * severity)):
        padded = np.pad(values, ((2, 2), (2, 2), (0, 0)), mode="edge")
        total, weight = np.zeros_like(values), np.zeros((*values.shape[:2], 1), np.float32)
        for top in range(5):
            for left in range(5):
                near = padded[top : top + values.shape[0], left : left + values.shape[1]]
                like = (np.abs(near - values).max(axis=-1, keepdims=True) < tolerance).astype(np.float32)
                total += like * near
                weight += like
        values = total / weight
    return as_uint8(values)


# --- clarity: a veil between the picture and who looks at it ------------------------------------------------------


def _veil(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    grey = rng.uniform(150, 220)
    return as_uint8(sample.picture + (grey - sample.picture.astype(np.float32)) * 0.85 * severity)


def _drifting_veil(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Thicker here than there."""
    thick = severity * (0.55 + 0.35 * smooth_field(sample.picture.shape[:2], 3, rng))
    grey = rng.uniform(150, 230)
    return as_uint8(sample.picture + (grey - sample.picture.astype(np.float32)) * thick[..., None])


# --- sharpness: outlines smeared ----------------------------------------------------------------------------------


def _gaussian(sample: Sample, severity: float, _: np.random.Generator) -> np.ndarray:
    return np.asarray(Image.fromarray(sample.picture).filter(ImageFilter.GaussianBlur(0.6 + 2.2 * severity)))


def _box(sample: Sample, severity: float, _: np.random.Generator) -> np.ndarray:
    return np.asarray(Image.fromarray(sample.picture).filter(ImageFilter.BoxBlur(0.8 + 2.7 * severity)))


# --- harmony: colours that belong nowhere -------------------------------------------------------------------------


def _patches(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    out = sample.picture.astype(np.float32)
    for _ in range(2 + round(3 * severity)):
        top, left, size = *rng.integers(0, out.shape[0] - 16, size=2), rng.integers(10, 24)
        patch = out[top : top + size, left : left + size]
        patch += (rng.uniform(0, 255, size=3) - patch) * (0.35 + 0.5 * severity)
    return as_uint8(out)


def _discs(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    out = sample.picture.astype(np.float32)
    rows, columns = np.mgrid[0 : out.shape[0], 0 : out.shape[1]]
    for _ in range(2 + round(4 * severity)):
        y, x = rng.uniform(0, out.shape[0], size=2)
        disc = np.hypot(rows - y, columns - x) < rng.uniform(5, 13)
        out[disc] += (rng.uniform(0, 255, size=3) - out[disc]) * (0.35 + 0.5 * severity)
    return as_uint8(out)


def _exchanged_channels(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """In part of the picture red is blue, or green, or the light is turned to dark."""
    values = sample.picture.astype(np.float32)
    foreign = 255 - values if rng.random() < 0.3 else np.roll(values, int(rng.integers(1, 3)), axis=-1)
    where = smooth_field(values.shape[:2], 4, rng) > 0.1 - 0.3 * severity
    return as_uint8(values + (foreign - values) * where[..., None] * (0.4 + 0.6 * severity))


# --- realism: shapes bent out of form -----------------------------------------------------------------------------


def _warp(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Moved along a smooth random field."""
    shape = sample.picture.shape[:2]
    reach = 1.5 + 5 * severity
    return moved(sample.picture, reach * smooth_field(shape, 6, rng), reach * smooth_field(shape, 6, rng))


def _waves(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[0 : sample.picture.shape[0], 0 : sample.picture.shape[1]]
    reach, length, phase = 1 + 3 * severity, rng.uniform(9, 22), rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.5:
        return moved(sample.picture, 0, reach * np.sin(2 * np.pi * rows / length + phase))
    return moved(sample.picture, reach * np.sin(2 * np.pi * columns / length + phase), 0)


def _lens(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Pinched or bulging about a few points of the objects."""
    rows, columns = np.mgrid[0 : sample.picture.shape[0], 0 : sample.picture.shape[1]].astype(np.float32)
    down, right = np.zeros_like(rows), np.zeros_like(columns)
    inside = np.argwhere(sample.objects)
    for _ in range(2 + round(2 * severity)):
        y, x = inside[rng.integers(len(inside))]
        radius = rng.uniform(8, 16)
        near = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * (radius / 2) ** 2))
        pull = (0.35 + 0.6 * severity) * (1 if rng.random() < 0.5 else -1)
        down += pull * near * (rows - y)
        right += pull * near * (columns - x)
    return moved(sample.picture, down, right)


def _trembling_lines(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Neighbouring lines moved apart, a little more from each to the next."""
    height = sample.picture.shape[0]
    walk = np.cumsum(rng.normal(size=height))
    walk -= np.linspace(walk[0], walk[-1], height)
    walk *= (1.5 + 3.5 * severity) / max(1e-6, float(np.abs(walk).max()))
    return moved(sample.picture, 0, walk[:, None]) if rng.random() < 0.5 else moved(sample.picture, walk, 0)


def _chimera(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Objects that are partly others: what a generator paints that has half understood."""
    where = _part(sample.objects, 0.2 + 0.35 * severity, rng)
    return np.where(where[..., None], sample.twin, sample.picture)


# --- colour -------------------------------------------------------------------------------------------------------


def _desaturated(sample: Sample, severity: float, _: np.random.Generator) -> np.ndarray:
    return np.asarray(ImageEnhance.Color(Image.fromarray(sample.picture)).enhance(1 - severity))


def _bleached(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Most colour gone, and what is left of one hue."""
    grey = np.asarray(Image.fromarray(sample.picture).convert("L"), np.float32)[..., None]
    tint = grey * rng.uniform(0.85, 1.1, size=3)
    return as_uint8(sample.picture + (tint - sample.picture) * 0.9 * severity)


# --- consistency: two pictures in one -----------------------------------------------------------------------------


def _side_of_another(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    share = int(sample.picture.shape[1] * (0.2 + 0.3 * severity))
    out = sample.picture.copy()
    turned, other = (
        (out, sample.other) if rng.random() < 0.5 else (out.swapaxes(0, 1), sample.other.swapaxes(0, 1))
    )
    side = slice(0, share) if rng.random() < 0.5 else slice(-share, None)
    turned[side] = other[side]
    return out


def _corner_of_another(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Cut off along a slanted line."""
    height, width = sample.picture.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width]
    angle = rng.uniform(0, 2 * np.pi)
    along = rows * np.sin(angle) + columns * np.cos(angle)
    beyond = along > np.quantile(along, 1 - (0.15 + 0.35 * severity))
    return np.where(beyond[..., None], sample.other, sample.picture)


def _window_on_another(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    height, width = sample.picture.shape[:2]
    tall, wide = (round(size * (0.35 + 0.3 * severity) * rng.uniform(0.8, 1.2)) for size in (height, width))
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    out = sample.picture.copy()
    out[top : top + tall, left : left + wide] = sample.other[top : top + tall, left : left + wide]
    return out


# --- layout: everything there, in the wrong place -----------------------------------------------------------------


def _shuffled_tiles(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    tiles, out = _tiles(sample, severity), sample.picture.copy()
    for place, source in zip(tiles, _new_order(len(tiles), rng), strict=True):
        out[place] = sample.picture[tiles[source]]
    return out


def _turned_tiles(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Every tile in its place, many upside down or on their side."""
    tiles, out = _tiles(sample, severity), sample.picture.copy()
    for index in rng.permutation(len(tiles))[: round(len(tiles) * (0.4 + 0.5 * severity))]:
        out[tiles[index]] = np.rot90(sample.picture[tiles[index]], int(rng.integers(1, 4)))
    return out


def _shuffled_bands(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Some of eight bands, across or down, exchanged."""
    axis = int(rng.integers(2))
    bands = np.split(sample.picture, 8, axis)
    moved = rng.permutation(8)[: 2 + round(6 * severity)]
    order = np.arange(8)
    order[moved] = moved[_new_order(len(moved), rng)]
    return np.concatenate([bands[index] for index in order], axis)


def _rolled(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Pushed out at one side and in at the other, halves by different amounts."""
    out = sample.picture.copy()
    size = out.shape[0]
    cut = int(rng.integers(size // 3, 2 * size // 3))
    for part in (slice(0, cut), slice(cut, size)):
        shift = round(size * (0.15 + 0.35 * severity) * rng.uniform(0.7, 1)) * (
            1 if rng.random() < 0.5 else -1
        )
        out[:, part] = np.roll(out[:, part], shift, axis=0)
    return out


# --- integrity: objects with parts missing ------------------------------------------------------------------------


def _missing_pieces(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Squares filled with the background of the same rows."""
    out = sample.picture.copy()
    inside = np.argwhere(sample.objects)
    for _ in range(2 + round(3 * severity)):
        size = int(rng.integers(7, 11 + round(6 * severity)))
        top, left = np.clip(inside[rng.integers(len(inside))] - size // 2, 0, out.shape[0] - size)
        out[top : top + size, left : left + size] = sample.picture[top : top + size, :1]
    return out


def _missing_part(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Of the objects, one part of any shape."""
    where = _part(sample.objects, 0.15 + 0.4 * severity, rng)
    return np.where(where[..., None], sample.empty, sample.picture)


def _missing_side(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Of the objects, what lies beyond some slanted lines."""
    rows, columns = np.mgrid[0 : sample.picture.shape[0], 0 : sample.picture.shape[1]]
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(12, 40)
    along = (rows * np.sin(angle) + columns * np.cos(angle) + rng.uniform(0, period)) % period
    beyond = along < period * (0.15 + 0.35 * severity)
    return np.where(beyond[..., None], sample.empty, sample.picture)


def _holes(sample: Sample, severity: float, rng: np.random.Generator) -> np.ndarray:
    out = sample.picture.copy()
    rows, columns = np.mgrid[0 : out.shape[0], 0 : out.shape[1]]
    inside = np.argwhere(sample.objects)
    for _ in range(2 + round(4 * severity)):
        y, x = inside[rng.integers(len(inside))]
        hole = np.hypot((rows - y) / rng.uniform(0.7, 1.4), columns - x) < rng.uniform(3, 5 + 4 * severity)
        out[hole] = sample.empty[hole]
    return out


DAMAGES: dict[str, tuple[Damage, ...]] = {
    "definition": (_fewer_pixels, _fewer_lines, _fewer_levels, _coarse_wavelets),
    "detail": (_median, _opened, _poster, _smoothed_within),
    "clarity": (_veil, _drifting_veil),
    "sharpness": (_gaussian, _box),
    "harmony": (_patches, _discs, _exchanged_channels),
    "realism": (_warp, _waves, _lens, _trembling_lines, _chimera),
    "color": (_desaturated, _bleached),
    "consistency": (_side_of_another, _corner_of_another, _window_on_another),
    "layout": (_shuffled_tiles, _turned_tiles, _shuffled_bands, _rolled),
    "integrity": (_missing_pieces, _missing_part, _missing_side, _holes),
}


# --- what they share ----------------------------------------------------------------------------------------------


def smooth_field(shape: tuple[int, ...], points: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth random field [H, W] of about -1 to 1 that turns about ``points`` times along a side."""
    coarse = rng.uniform(-1, 1, size=(points, points)).astype(np.float32)
    height, width = shape
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _tiles(sample: Sample, severity: float) -> list[tuple[slice, slice]]:
    """The squares that a picture is cut into: 4 or 16."""
    height, width = sample.picture.shape[:2]
    side = 16 if severity > 0.5 else 32
    return [
        (slice(top, top + side), slice(left, left + side))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def _new_order(count: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of ``count`` things that is not the order they are in."""
    order = rng.permutation(count)
    return np.roll(order, 1) if (order == np.arange(count)).all() else order


def moved(image: np.ndarray, down: np.ndarray | float, right: np.ndarray | float) -> np.ndarray:
    """Every pixel taken from that many rows further down and columns further right, the border's beyond it."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width]
    rows = np.clip(np.rint(rows + down), 0, height - 1).astype(int)
    columns = np.clip(np.rint(columns + right), 0, width - 1).astype(int)
    return image[rows, columns]


def _part(where: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """About ``share`` of a mask [H, W], in connected pieces."""
    field = smooth_field(where.shape, 5, rng)
    return where & (field > np.quantile(field[where], 1 - share))


def as_uint8(values: np.ndarray) -> np.ndarray:
    """Of 0 to 255, rounded and cut off."""
    return (values.clip(0, 255) + 0.5).astype(np.uint8)
