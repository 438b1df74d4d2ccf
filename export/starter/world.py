"""The starter world: scenes of sprites, the pictures they make and the sentences that describe them.

A *scene* is what a caption can say: which objects, how many, how big, how they stand to each other, and where.
Where exactly each sprite lands is left to the renderer's random generator, as a photographer's framing is.

What makes a prompt hard has several sources, so that counting its nouns is not the whole answer: the number of
objects, rare objects, look-alikes, binding a size or a place to the right object, and words that make the prompt
longer and the picture no harder.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np

from export.starter.sprites import OBJECTS, sprite

T = TypeVar("T")

SIZE = 64  # pixels, width and height of every picture

COMMON = tuple(OBJECTS)[:16]
LOOK_ALIKES = tuple(OBJECTS)[16:20]
RARE = tuple(OBJECTS)[20:]
# Look-alikes are half as frequent as common objects, rare ones a quarter: a small model learns them less well.
FREQUENCY = {**dict.fromkeys(COMMON, 1.0), **dict.fromkeys(LOOK_ALIKES, 0.5), **dict.fromkeys(RARE, 0.25)}

BACKGROUNDS = ("plain", "beach", "night", "snow", "meadow", "desert")
SIZES = ("small", "medium", "big")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

# Share of scene hashes, in percent, that belongs to each purpose. Disjoint by construction.
SPLITS = {
    "generators": 60,
    "judge": 12,
    "test": 4,
    "train": 12,
    "validation": 3,
    "calibration": 4,
    "inspector": 5,
}


@dataclass(frozen=True)
class Group:
    """``count`` objects of one kind and size."""

    name: str
    count: int = 1
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    """One to three groups, the relation of the first to the second (two groups only), and the background."""

    groups: tuple[Group, ...]
    background: str = "plain"
    relation: str | None = None

    @property
    def objects(self) -> int:
        """How many sprites the picture shows."""
        return sum(group.count for group in self.groups)

    @property
    def asked(self) -> Scene:
        """One of all scenes that ask for the same: a cat right of a dog is a dog left of a cat, and without a relation
        it does not matter which group is named first.
        """
        if self.relation is None:
            return Scene(tuple(sorted(self.groups, key=repr)), self.background)
        mirrored = {"right of": "left of", "below": "above"}.get(self.relation)
        return self if mirrored is None else Scene(self.groups[::-1], self.background, mirrored)

    @property
    def split(self) -> str:
        """The one purpose this scene may be used for: a hash decides, so it holds in every run and process."""
        bucket = int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:4], "big") % 100
        for split, share in SPLITS.items():
            bucket -= share
            if bucket < 0:
                return split
        raise AssertionError("the shares of SPLITS do not add up to 100")


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: about half show one group, a third two, the rest three."""
    kinds = _draw(rng, (1, 2, 3), (0.5, 0.35, 0.15))
    names = _names(rng, kinds)
    if kinds == 1:
        counts = [_draw(rng, (1, 2, 3, 4), (0.5, 0.2, 0.15, 0.15))]
    elif kinds == 2:
        counts = [_draw(rng, (1, 2), (0.7, 0.3)) for _ in range(2)]
    else:
        counts = [1, 1, 1]
    groups = tuple(
        Group(name, count, _draw(rng, SIZES, (0.2, 0.6, 0.2)))
        for name, count in zip(names, counts, strict=True)
    )
    relation = _pick(RELATIONS, rng) if kinds == 2 else None
    return Scene(groups, _pick(BACKGROUNDS, rng), relation)


def _names(rng: np.random.Generator, number: int) -> list[str]:
    """Distinct objects, the frequent ones more often."""
    found: list[str] = []
    while len(found) < number:
        left = tuple(0.0 if name in found else FREQUENCY[name] for name in OBJECTS)
        drawn = [_draw(rng, tuple(OBJECTS), left) for _ in range(number - len(found))]
        found.extend(dict.fromkeys(drawn))
    return found


def _draw(rng: np.random.Generator, options: tuple[T, ...], shares: tuple[float, ...]) -> T:
    """One option, with these shares: what ``Generator.choice`` draws, many times as fast."""
    return options[bisect_right(_cumulative(shares), rng.random())]


@cache
def _cumulative(shares: tuple[float, ...]) -> list[float]:
    sums = np.cumsum(shares)
    return list(sums / sums[-1])


def sample_scenes(split: str, number: int, seed: int) -> list[Scene]:
    """``number`` scenes of one split, in an order that ``seed`` fixes; the same scene may come again."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < number:
        scene = sample_scene(rng)
        if scene.split == split:
            scenes.append(scene)
    return scenes


# --- pictures ---------------------------------------------------------------------------------------------------

# Sprite edge in pixels for small, medium and big, by how many sprites share the picture.
_PIXELS = {1: (20, 32, 46), 2: (16, 24, 30), 3: (14, 20, 25), 4: (14, 20, 25)}

# Centres of a group's members in a cell of width and height one.
_ARRANGEMENT = {
    1: ((0.5, 0.5),),
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.5, 0.28), (0.25, 0.73), (0.75, 0.73)),
    4: ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
}


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint the scene: uint8 [SIZE, SIZE, 3]. ``rng`` shifts sprites, colours and horizon a little."""
    canvas = backdrop(scene.background, rng)
    for name, left, top, size in place(scene, rng):
        stamp(canvas, name, left, top, size)
    return as_picture(canvas)


def stamp(canvas: np.ndarray, name: str, left: int, top: int, size: int) -> None:
    """Paint a sprite of ``size`` pixels onto the float32 canvas [SIZE, SIZE, 3]."""
    window = canvas[top : top + size, left : left + size]
    painted = sprite(name, size)
    window *= 1 - painted[..., 3:]
    window += painted[..., :3]


def as_picture(canvas: np.ndarray) -> np.ndarray:
    """The canvas as uint8; resampled sprites overshoot a little."""
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def place(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, int, int, int]]:
    """(name, left, top, size) in pixels of every sprite, in the order they are painted."""
    for group, (left, top, width, height) in zip(scene.groups, _cells(scene), strict=True):
        arrangement = _ARRANGEMENT[group.count]
        if group.count == 2 and height > width:
            arrangement = tuple((y, x) for x, y in arrangement)
        pixels = _PIXELS[min(scene.objects, 4)][SIZES.index(group.size)]
        for x, y in arrangement:
            size = int(np.clip(pixels + rng.integers(-1, 2), 12, SIZE))
            shift = rng.uniform(-2.5, 2.5, size=2)
            centre = (left + x * width + shift[0], top + y * height + shift[1])
            corner = [int(np.clip(round(c - size / 2), 0, SIZE - size)) for c in centre]
            yield group.name, corner[0], corner[1], size


def outlines(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Which sprite each pixel shows, uint8 [SIZE, SIZE]: 0 is the background, k the k-th of `place`.

    With ``rng`` as `render` gets it, of the picture that `render` paints.
    """
    backdrop(scene.background, rng)
    shown = np.zeros((SIZE, SIZE), np.uint8)
    for number, (name, left, top, size) in enumerate(place(scene, rng), 1):
        shown[top : top + size, left : left + size][sprite(name, size)[..., 3] > 0.5] = number
    return shown


def _cells(scene: Scene) -> list[tuple[float, float, float, float]]:
    """(left, top, width, height) in pixels of the part of the picture that each group fills."""
    half = SIZE / 2
    if len(scene.groups) == 1:
        return [(0, 0, SIZE, SIZE)]
    if len(scene.groups) == 3:  # an even triangle; the caption names them from the top, clockwise
        return [(SIZE / 4, 0, half, half), (half, half, half, half), (0, half, half, half)]
    sides = {
        "left of": [(0, 0, half, SIZE), (half, 0, half, SIZE)],
        "above": [(0, 0, SIZE, half), (0, half, SIZE, half)],
    }
    if scene.relation in sides:
        return list(sides[scene.relation])
    return sides["left of" if scene.relation == "right of" else "above"][::-1]


# (sky at the top, sky at the horizon, ground at the horizon, ground at the bottom), RGB in [0, 1]
_COLOURS = {
    "plain": ((0.97, 0.97, 0.97), (0.97, 0.97, 0.97), (0.97, 0.97, 0.97), (0.97, 0.97, 0.97)),
    "beach": ((0.45, 0.75, 0.98), (0.25, 0.60, 0.85), (0.95, 0.87, 0.65), (0.92, 0.80, 0.52)),
    "night": ((0.03, 0.04, 0.16), (0.12, 0.13, 0.34), (0.08, 0.09, 0.20), (0.04, 0.05, 0.12)),
    "snow": ((0.70, 0.80, 0.92), (0.86, 0.91, 0.97), (0.99, 0.99, 1.00), (0.88, 0.93, 0.98)),
    "meadow": ((0.60, 0.85, 1.00), (0.82, 0.94, 1.00), (0.45, 0.75, 0.30), (0.28, 0.58, 0.18)),
    "desert": ((0.98, 0.75, 0.45), (1.00, 0.88, 0.62), (0.88, 0.62, 0.35), (0.76, 0.46, 0.24)),
}


def backdrop(name: str, rng: np.random.Generator) -> np.ndarray:
    """A background alone, float32 [SIZE, SIZE, 3] in [0, 1]; ``rng`` shifts its horizon and colour a little."""
    top, sky, ground, bottom = (np.array(c, np.float32) for c in _COLOURS[name])
    horizon = int(rng.integers(30, 39))
    up = np.linspace(0, 1, horizon, dtype=np.float32)[:, None]
    down = np.linspace(0, 1, SIZE - horizon, dtype=np.float32)[:, None]
    column = np.concatenate([top + (sky - top) * up, ground + (bottom - ground) * down])
    canvas = np.repeat(column[:, None], SIZE, axis=1)
    if name == "night":
        for x, y in rng.integers(0, (SIZE, horizon - 4), size=(14, 2)):
            canvas[y, x] = 0.9
    return np.clip(canvas + rng.uniform(-0.02, 0.02, size=3).astype(np.float32), 0, 1)


# --- sentences --------------------------------------------------------------------------------------------------

_PLACES = {
    "plain": ("", "", " on a plain background", " on white"),
    "beach": (" on a beach", " on the beach", " by the sea"),
    "night": (" at night", " under the stars", " in the dark of night"),
    "snow": (" in the snow", " on a snowy day", " in winter"),
    "meadow": (" on a meadow", " in a green field", " on the grass"),
    "desert": (" in the desert", " in a hot desert", " on desert sand"),
}
# Wordings kept from every training: what they cost tells whether sentences or words were learnt.
_HELD_OUT_PLACES = {
    "plain": "with nothing behind",
    "beach": "where the sea meets the beach",
    "night": "in a night full of stars",
    "snow": "where winter snow lies",
    "meadow": "where green grass grows",
    "desert": "where hot desert sand lies",
}
_SIZE_WORDS = {"small": ("small", "tiny", "little"), "medium": ("",), "big": ("big", "large", "huge")}
_LEADS = ("", "", "", "a picture of ", "an image of ", "a drawing of ", "please draw ", "i want to see ")
# Words that ask for nothing: longer prompts, no harder pictures.
_ASIDES = (
    "",
    "",
    "",
    "",
    ", as my sister would like it",
    ", made for the cover of a calendar",
    ", something nice for the kitchen wall, thank you",
    ", the way people used to draw in old books for children",
)
_PLURALS = {
    "strawberry": "strawberries",
    "cactus": "cacti",
    "fish": "fish",
    "fox": "foxes",
}


@cache
def plural(name: str) -> str:
    """The English plural of an object's name."""
    return _PLURALS.get(name, name + "s")


def caption(scene: Scene, rng: np.random.Generator, *, held_out: bool = False) -> str:
    """One of the many sentences that say what the scene is, in lower case.

    ``held_out`` words it in ways that no model and no router has seen in training.
    """
    nouns = [_noun(group, rng) for group in scene.groups]
    if held_out:
        return _held_out(scene, nouns, rng)
    place = _pick(_PLACES[scene.background], rng)
    if len(nouns) == 2:
        said = _pick(_related(scene.relation or "", *nouns), rng)
    elif len(nouns) == 3:
        said = _pick(("{}, {} and {}", "{} with {} and {}", "{} and {} and {}"), rng).format(*nouns)
    else:
        said = nouns[0]
    return f"{_pick(_LEADS, rng)}{said}{place}{_pick(_ASIDES, rng)}"


def _held_out(scene: Scene, nouns: list[str], rng: np.random.Generator) -> str:
    place = _HELD_OUT_PLACES[scene.background]
    if len(nouns) == 3:
        return _pick(("{3} there are {0}, then {1}, then {2}", "{0}; {1}; {2}; all {3}"), rng).format(
            *nouns, place
        )
    if len(nouns) == 2:
        first, second = nouns
        where = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
        inverse = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
        side = where[scene.relation or ""]
        templates = (
            f"{first} on the {side}, {second} on the {inverse[side]}, {place}",
            f"{place}, {second} at the {inverse[side]} and at the {side} {first}",
        )
        return _pick(templates, rng)
    return _pick((f"{place} there should be {nouns[0]}", f"show {nouns[0]} {place}"), rng)


def _related(relation: str, first: str, second: str) -> tuple[str, ...]:
    """Sentences for 'first RELATION second'; the last names the second group first."""
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
    spoken = {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under"}
    return (
        f"{first} {relation} {second}",
        f"{first} {spoken[relation]} {second}",
        f"{second} {inverse} {first}",
    )


def _noun(group: Group, rng: np.random.Generator) -> str:
    size = _pick(_SIZE_WORDS[group.size], rng)
    words = [size] if size else []
    words.append(group.name if group.count == 1 else plural(group.name))
    if group.count > 1:
        return " ".join([NUMBERS[group.count], *words])
    phrase = " ".join(words)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
