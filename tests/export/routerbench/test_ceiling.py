from __future__ import annotations

import numpy as np
import pytest

from export.routerbench import ceiling as module
from export.routerbench.ceiling import KINDS, ceiling, oracle_by_images, pairs, sentences_share, words
from export.starter.world import Group, Scene, sample_scenes


def test_a_gain_that_adds_up_is_found_to_and_carries_over_to_other_scenes() -> None:
    scenes, draw = sample_scenes("train", 500, seed=1), np.random.default_rng(0)
    worth = {name: draw.normal() for scene in scenes for name in words(scene)}

    def gain(scene: Scene) -> float:
        return sum(worth.get(name, 0.0) * times for name, times in words(scene).items())

    truth = np.array([gain(scene) for scene in scenes])
    asked = sample_scenes("test", 150, seed=2)
    gains = truth + draw.normal(0, 0.3 * truth.std(), len(truth))
    found = ceiling(scenes, gains, gains, asked)
    assert sum(found.components.values()) == pytest.approx(1)
    assert tuple(found.components) == KINDS
    assert found.components["words, adding up"] > 0.5
    assert found.carried_over > 0.8
    assert np.corrcoef(-found.scores, [gain(scene) for scene in asked])[0, 1] > 0.8
    assert found.curve[-1][1] > 0.6


def test_a_gain_that_is_every_scene_s_own_does_not() -> None:
    scenes, draw = sample_scenes("train", 500, seed=1), np.random.default_rng(0)
    worth = {scene: draw.normal() for scene in scenes}
    gains = np.array([worth[scene] for scene in scenes]) + draw.normal(0, 0.3, 500)
    found = ceiling(scenes, gains, gains, scenes[:9])
    assert found.carried_over < 0.4
    assert found.components["the scene's own"] > found.components["the image's seed"]


def test_components_are_shares_of_single_images_gains_and_not_of_their_means() -> None:
    scenes, draw = sample_scenes("train", 500, seed=1), np.random.default_rng(0)
    worth = {scene: draw.normal() for scene in scenes}
    each = np.array([worth[scene] for scene in scenes])[:, None] + draw.normal(0, 1, (500, 4))
    found = ceiling(scenes, each.mean(axis=1), each[:, 0], scenes[:9])
    assert sum(found.components.values()) == pytest.approx(1)
    assert found.components["the image's seed"] == pytest.approx(0.5, abs=0.15)


def test_the_reference_is_the_gaussian_process_of_words_pairs_and_scenes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (for_words, for_pairs, for_scenes), noise = weights = [0.5, 0.3, 0.2], 0.1
    monkeypatch.setattr(module, "_fitted", lambda *_: weights)
    scenes, draw = sample_scenes("train", 80, seed=1), np.random.default_rng(0)
    scenes += scenes[:30]  # some are said twice
    gains = draw.normal(0.1, 1, len(scenes))
    asked = [*sample_scenes("test", 20, seed=2), *scenes[20:40]]
    found = ceiling(scenes, gains, gains, asked)
    every = [*scenes, *asked]
    of_words, of_pairs = (module._table(every, features) for features in (words, pairs))
    said = np.array([repr(scene) for scene in every])
    kernel = for_words * of_words @ of_words.T + for_pairs * of_pairs @ of_pairs.T
    kernel += for_scenes * (said[:, None] == said)
    known, target = len(scenes), (gains - gains.mean()) / gains.std()
    noisy = kernel[:known, :known] + noise * np.eye(known)
    np.testing.assert_allclose(-found.scores, kernel[known:, :known] @ np.linalg.solve(noisy, target))


def test_words_and_pairs_of_a_scene() -> None:
    scene = Scene((Group("cat", 2), Group("dog", 1, "big")), "beach", "left of")
    assert words(scene)["2 of it"] == words(scene)["medium"] == 0.5
    assert {"cat", "dog", "on beach", "left of", "3 objects", "2 kinds"} <= set(words(scene))
    assert {"cat and dog", "cat, beach", "cat, 2", "dog, big", "beach, left of"} <= set(pairs(scene))


def test_what_sentences_of_a_scene_do_not_share_is_told_from_what_images_do_not() -> None:
    draw = np.random.default_rng(0)
    scenes = np.repeat(np.arange(200), 3)
    shared, own = draw.normal(0, 1, 200)[scenes], draw.normal(0, 1, 600)
    seeds = draw.normal(0, 1, (600, 4))
    assert sentences_share(shared[:, None] + seeds, scenes) == pytest.approx(0, abs=0.1)
    assert sentences_share((shared + own)[:, None] + seeds, scenes) == pytest.approx(0.5, abs=0.1)
    assert np.isnan(sentences_share(seeds, np.arange(600)))


def test_an_oracle_that_chooses_by_more_images_wins_more_and_one_without_signal_nothing() -> None:
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 2, (2000, 16))
    found = oracle_by_images(draw.normal(0.3, 1, 2000)[:, None] + noise, 0.5)
    assert [images for images, _ in found] == [1, 3, 7, 15]
    gains = [gain for _, gain in found]
    assert gains == sorted(gains)
    # It knows the mean of 15 others, so a correlation of 1 / sqrt(1 + 4 / 15) with what pays; half of |N(0, 1)|.
    assert gains[-1] == pytest.approx(0.5 * np.sqrt(2 / np.pi) / np.sqrt(1 + 4 / 15), abs=0.05)
    assert oracle_by_images(noise, 0.5)[-1][1] == pytest.approx(0, abs=0.05)
