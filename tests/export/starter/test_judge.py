import numpy as np

from edge_agent.superiority import METRICS
from export.quality import load_metrics
from export.starter.damage import SIDE_EFFECTS
from export.starter.judge import RUINED, UNDAMAGED, make_batch

NUMBER = 24


def test_a_batch_shows_every_scene_twice_and_says_what_is_wrong_with_the_second():
    metrics = load_metrics()
    batch = make_batch(NUMBER, 5, metrics)
    assert batch.pictures.shape == (2 * NUMBER, 64, 64, 3)
    assert len(batch.texts) == len(batch.targets) == 2 * NUMBER
    clean, spoiled = batch.targets[:NUMBER], batch.targets[NUMBER:]
    assert (clean == np.float32(UNDAMAGED)).all()
    assert (spoiled >= RUINED - 1e-6).all()
    for row in range(NUMBER):
        before, after = batch.texts[row], batch.texts[NUMBER + row]
        assert after.startswith(before)
        blamed = [metric for metric in metrics if metric.negative.lower() in after[len(before) :]]
        assert 1 <= len(blamed) <= 2
        own = [METRICS.index(metric.name) for metric in blamed]
        beside = [METRICS.index(name) for metric in blamed for name in SIDE_EFFECTS[metric.name]]
        assert set(np.flatnonzero(spoiled[row] < UNDAMAGED - 1e-6)) == {*own, *beside}
    changed = (batch.pictures[:NUMBER] != batch.pictures[NUMBER:]).any(axis=(1, 2, 3))
    assert changed.mean() > 0.9
    assert all(wrong != text for wrong, text in zip(batch.wrong, batch.texts, strict=False))


def test_the_same_seed_makes_the_same_batch():
    one, other, third = (make_batch(4, seed, load_metrics()) for seed in (1, 1, 2))
    assert (one.pictures == other.pictures).all()
    assert one.texts == other.texts
    assert one.wrong == other.wrong
    assert (one.pictures != third.pictures).any()
