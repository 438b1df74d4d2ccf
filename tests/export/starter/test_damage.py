import numpy as np
import pytest

from edge_agent.superiority import METRICS
from export.metrics import load_metrics
from export.starter.damage import DAMAGES, SIDE_EFFECTS, damage, render_samples
from export.starter.foreign_damage import foreign_damage
from export.starter.world import sample_scenes


@pytest.fixture(scope="module")
def samples():
    return render_samples(sample_scenes("inspector", 8, seed=0), np.random.default_rng(0))


def _distance(spoil, samples, severity):
    rng = np.random.default_rng(1)
    spoiled = [spoil(sample, severity, rng) for sample in samples]
    assert all(picture.shape == samples[0].picture.shape and picture.dtype == np.uint8 for picture in spoiled)
    return np.mean(
        [np.abs(s.astype(int) - sample.picture).mean() for s, sample in zip(spoiled, samples, strict=True)]
    )


@pytest.mark.parametrize(
    "way", [way for ways in DAMAGES.values() for way in ways], ids=lambda way: way.__name__
)
def test_a_worse_damage_moves_a_picture_further_from_the_original(way, samples):
    assert 0 < _distance(way, samples, 0.2) < _distance(way, samples, 1.0)


@pytest.mark.parametrize("metric", METRICS)
def test_so_does_one_that_no_judge_has_met(metric, samples):
    def spoil(sample, severity, rng):
        return foreign_damage(sample, metric, severity, rng)

    assert 0 < _distance(spoil, samples, 0.2) < _distance(spoil, samples, 1.0)


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_s_damages_take_turns(metric, samples):
    rng = np.random.default_rng(0)
    seen = {damage(samples[0], metric, 0.6, rng).tobytes() for _ in range(30)}
    assert len(seen) >= len(DAMAGES[metric])


def test_what_goes_with_a_picture_shows_the_same_place(samples):
    for sample in samples:
        assert (sample.picture == sample.empty)[~sample.objects].mean() > 0.9
        assert 0.02 < sample.objects.mean() < 0.8
        assert (sample.twin != sample.picture)[sample.objects].any()
        assert ((sample.sprites > 0) == sample.objects).mean() > 0.9


def test_there_are_damages_and_one_pair_of_texts_for_every_metric():
    assert tuple(metric.name for metric in load_metrics()) == METRICS
    assert set(SIDE_EFFECTS) == set(DAMAGES) == set(METRICS)
    for own, others in SIDE_EFFECTS.items():
        assert own not in others
        assert set(others) <= set(METRICS)


@pytest.mark.parametrize("spoil", [damage, foreign_damage])
def test_an_unknown_damage_is_refused(spoil, samples):
    with pytest.raises(ValueError, match="taste"):
        spoil(samples[0], "taste", 0.5, np.random.default_rng(0))
