"""How much of the gain can be foreseen at all: where its variance lies, and what one gets who is told the scenes.

The gain of a prompt (measured quality of the cloud's image less that of the edge's, a mean over metrics) is split into
what adds up over the words of its scene (objects, counts, sizes, background, relation), what pairs of them add (an
object *on* a background, four *of* an object), what is the scene's own, and what is left to the image's seed.
Components are the weights of a Gaussian process's kernels, by maximum marginal likelihood.

Only the first two carry over to scenes that were not trained on. The same Gaussian process, told the scenes, is the
*reference*: it sees without error what routers must read from token states, and learns from the same gains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from export.bootstrap import Floats
from export.evaluate import routed
from export.prompts import REPEATING
from export.starter.world import Scene

ITERATIONS = 15
SEED = 0  # draws the scenes that are left out
KINDS = ("words, adding up", "pairs of words", "the scene's own", "the image's seed")


@dataclass(frozen=True)
class Ceiling:
    """Shares of the gain's variance, and the scores of the reference on other prompts."""

    components: Mapping[str, float]
    """By KINDS; they add up to 1."""
    curve: Sequence[tuple[int, float]]
    """(scenes learnt from, correlation of the reference with measured gains on training scenes left out)"""
    scores: Floats
    """[N] of the prompts asked for, low goes to the cloud."""

    @property
    def carried_over(self) -> float:
        """Share of the *expected* gain's variance that words and pairs of words explain."""
        words, pairs, scene, _ = (self.components[kind] for kind in KINDS)
        return (words + pairs) / (words + pairs + scene)


def words(scene: Scene) -> dict[str, float]:
    """What adds up."""
    found: dict[str, float] = {f"on {scene.background}": 1, f"{len(scene.groups)} kinds": 1}
    found |= {f"{scene.objects} objects": 1, f"{scene.relation}": 1}
    for group in scene.groups:
        found[group.name] = 1
        for part in (f"{group.count} of it", group.size):
            found[part] = found.get(part, 0) + 1 / len(scene.groups)
    return found


def pairs(scene: Scene) -> dict[str, float]:
    """What two parts of a scene may add together."""
    kinds = f"{len(scene.groups)} kinds"
    found: dict[str, float] = {f"{scene.background}, {kinds}": 1, f"{scene.background}, {scene.objects}": 1}
    found[f"{scene.background}, {scene.relation}"] = 1
    for group in scene.groups:
        for part in (scene.background, str(group.count), group.size, kinds):
            found[f"{group.name}, {part}"] = 1
        found[f"{scene.background}, {group.size}"] = 1
    for one, other in combinations(sorted(group.name for group in scene.groups), 2):
        found[f"{one} and {other}"] = 1
    return found


def ceiling(train: Sequence[Scene], gain: Floats, single: Floats, asked: Sequence[Scene]) -> Ceiling:
    """From training prompts' scenes and gains [N]; ``asked`` are the prompts to score.

    Components are those of the first REPEATING training prompts, which were drawn as ``asked`` were. They are shares of
    what varies in ``single`` [N], the gains of one image a model, while ``gain`` may be a mean over several.
    """
    centre, spread = float(gain.mean()), float(gain.std())
    target = (gain - centre) / spread
    names, number = np.unique([repr(scene) for scene in train], return_inverse=True)
    order = np.random.default_rng(SEED).permutation(len(names))
    every = [*train, *asked]
    tables = [_table(every, features) for features in (words, pairs)]
    _, said = np.unique([repr(scene) for scene in every], return_inverse=True)
    known, like_asked = len(train), min(len(train), REPEATING)
    few = said[:like_asked]
    drawn_alike = [table[:like_asked] @ table[:like_asked].T for table in tables]
    drawn_alike.append((few[:, None] == few).astype(np.float64))
    weights, noise = _fitted(drawn_alike, target[:like_asked])
    parts = [
        weight * float(np.diag(kernel).mean() - kernel.mean())
        for weight, kernel in zip(weights, drawn_alike, strict=True)
    ]
    scenes_part = np.array(parts) * spread**2 / float(single[:like_asked].var())
    shares = [*scenes_part, 1 - scenes_part.sum()]
    *of_words, of_scene = weights
    weighed = np.hstack([weight**0.5 * table for weight, table in zip(of_words, tables, strict=True)])

    def predicted(learnt: np.ndarray, where: np.ndarray) -> Floats:
        """What the Gaussian process expects, computed by its features. Prompts of a scene share them, so their mean
        gain says all that they say; what is the scene's own counts as noise for the slopes, and is added back for
        prompts of scenes that were learnt from.
        """
        mean = float(target[learnt].mean())
        scenes, first, which, times = np.unique(
            said[learnt], return_index=True, return_inverse=True, return_counts=True
        )
        gains, features = np.bincount(which, target[learnt] - mean) / times, weighed[learnt[first]]
        variance = of_scene + noise / times
        precise = features / variance[:, None]
        slopes = cho_solve(cho_factor(features.T @ precise + np.eye(features.shape[1])), precise.T @ gains)
        found = mean + weighed[where] @ slopes
        place = np.minimum(np.searchsorted(scenes, said[where]), len(scenes) - 1)
        own = (gains - features @ slopes) * of_scene / variance
        return np.asarray(found + np.where(scenes[place] == said[where], own[place], 0.0))

    left_out = np.flatnonzero(np.isin(number, order[-len(names) // 5 :]))
    curve = []
    for share in (0.1, 0.2, 0.4, 0.8):
        scenes = order[: int(share * len(names))]
        learnt = np.flatnonzero(np.isin(number, scenes))
        found = np.corrcoef(predicted(learnt, left_out), target[left_out])[0, 1]
        curve.append((len(scenes), float(found)))
    scores = predicted(np.arange(known), np.arange(known, len(every)))
    return Ceiling(dict(zip(KINDS, map(float, shares), strict=True)), curve, -scores)


def oracle_by_images(gains: Floats, rate: float) -> list[tuple[int, float]]:
    """(images it chooses by, gain over random routing) of the oracle, from ``gains`` [N, S] of S images a prompt.

    It chooses by some images of each prompt and is paid by another; every image pays in turn. Choosing by few, it takes
    luck for quality and is a lower bar than it should be.
    """
    count = gains.shape[1]
    found = []
    for number in dict.fromkeys((1, 3, 7, count - 1)):
        if number < count:
            turns = [
                routed(-gains[:, np.arange(turn + 1, turn + 1 + number) % count].mean(axis=1), rate)
                @ gains[:, turn]
                for turn in range(count)
            ]
            found.append((number, float(np.mean(turns)) / len(gains) - rate * float(gains.mean())))
    return found


def sentences_share(gains: Floats, scenes: NDArray[np.int64]) -> float:
    """Share of the expected gain's variance that lies between sentences of one scene, from ``gains`` [N, S].

    ``scenes`` [N] numbers what each prompt says. Near zero, by chance below it, where the wording does not matter; NaN
    where no scene is said twice.
    """
    mean, count = gains.mean(axis=1), gains.shape[1]
    image = float(((gains - mean[:, None]) ** 2).sum()) / (gains.size - len(gains)) / count
    _, number, times = np.unique(scenes, return_inverse=True, return_counts=True)
    free = len(mean) - len(times)
    if not free:
        return float("nan")
    within = float(((mean - (np.bincount(number, mean) / times)[number]) ** 2).sum()) / free
    return (within - image) / (float(mean.var(ddof=1)) - image)


def _table(scenes: Sequence[Scene], features: Callable[[Scene], dict[str, float]]) -> Floats:
    """[N, F], a feature a column; the rows' squares are one in the mean."""
    found = [features(scene) for scene in scenes]
    place = {name: index for index, name in enumerate(sorted({name for one in found for name in one}))}
    table = np.zeros((len(scenes), len(place)))
    for row, one in enumerate(found):
        table[row, [place[name] for name in one]] = list(one.values())
    return table / np.sqrt((table**2).sum(axis=1).mean())


def _fitted(kernels: Sequence[Floats], target: Floats) -> tuple[list[float], float]:
    """Weights of the kernels and of the noise with the largest marginal likelihood of ``target`` [n]."""
    size = len(target)

    def cost(logs: Floats) -> tuple[float, Floats]:
        *weights, noise = np.exp(logs)
        # One more kernel of ones: the mean may be any.
        whole = sum(weight * kernel for weight, kernel in zip(weights, kernels, strict=True)) + 1.0
        factor = cho_factor(whole + noise * np.eye(size), lower=True)
        solved, inverse = cho_solve(factor, target), cho_solve(factor, np.eye(size))
        slopes = [
            weight * ((inverse * kernel).sum() - solved @ kernel @ solved) / 2
            for weight, kernel in zip(weights, kernels, strict=True)
        ]
        slopes.append(noise * (np.trace(inverse) - solved @ solved) / 2)
        return float(target @ solved / 2 + np.log(np.diag(factor[0])).sum()), np.array(slopes)

    start = np.log([*(0.1 for _ in kernels), 0.4])
    bounds = [(-9.0, 3.0)] * len(start)
    found = minimize(cost, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS})
    *weights, noise = np.exp(found.x).tolist()
    return weights, noise
