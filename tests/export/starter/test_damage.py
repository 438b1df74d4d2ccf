import numpy as np
import pytest

from edge_agent.superiority import METRICS
from export.quality import load_metrics
from export.starter.damage import SIDE_EFFECTS, damage
from export.starter.foreign_damage import foreign_damage
from export.starter.world import render, sample_scenes


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [render(scene, rng) for scene in sample_scenes("inspector", 8, seed=0)]


@pytest.mark.parametrize("spoil", [damage, foreign_damage])
@pytest.mark.parametrize("metric", METRICS)
def test_a_worse_damage_moves_a_picture_further_from_the_original(metric, spoil, pictures):
    def distance(severity):
        rng = np.random.default_rng(1)
        spoiled = [spoil(p, metric, severity, rng, pictures[i - 1]) for i, p in enumerate(pictures)]
        assert all(s.shape == p.shape and s.dtype == np.uint8 for s, p in zip(spoiled, pictures, strict=True))
        return np.mean([np.abs(s.astype(int) - p).mean() for s, p in zip(spoiled, pictures, strict=True)])

    assert 0 < distance(0.2) < distance(1.0)


def test_there_is_one_damage_and_one_pair_of_texts_for_every_metric():
    assert tuple(metric.name for metric in load_metrics()) == METRICS
    assert set(SIDE_EFFECTS) == set(METRICS)
    for own, others in SIDE_EFFECTS.items():
        assert own not in others
        assert set(others) <= set(METRICS)


@pytest.mark.parametrize("spoil", [damage, foreign_damage])
def test_an_unknown_damage_is_refused(spoil, pictures):
    with pytest.raises(ValueError, match="taste"):
        spoil(pictures[0], "taste", 0.5, np.random.default_rng(0), pictures[1])
