import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from edge_agent.superiority import METRICS
from export.errors import ExportError
from export.metrics import load_metrics
from export.starter.damage import SIDE_EFFECTS
from export.starter.judge import BLAMED, FAULTS, RUINED, UNDAMAGED, make_batch, restored, train
from export.starter.sketch import Sketches
from export.starter.world import plural, sample_scenes

NUMBER = 24


def _sketches(harm):
    """One for each row of ``harm``: a shade of its own, and a hundred lighter as a sketch paints it."""
    pictures = np.arange(len(harm), dtype=np.uint8).repeat(64 * 64 * 3).reshape(-1, 64, 64, 3)
    scenes = sample_scenes("judge", len(harm), seed=1)
    return Sketches(scenes, pictures, pictures + 100, np.array(harm, np.float32))


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


def test_sketches_come_after_the_scenes_damaged_by_rule_beside_what_they_should_have_been():
    metrics = load_metrics()
    sketches = _sketches(np.random.default_rng(0).random((50, len(METRICS))))
    ruled, batch = make_batch(NUMBER, 5, metrics), make_batch(NUMBER, 5, metrics, 10, sketches)
    number = NUMBER + 10
    assert batch.pictures.shape == (2 * number, 64, 64, 3)
    assert (len(batch.texts), len(batch.wrong)) == (2 * number, number)
    undamaged, spoiled = batch.pictures[:number], batch.pictures[number:]
    assert (undamaged[:NUMBER] == ruled.pictures[:NUMBER]).all()
    assert (spoiled[:NUMBER] == ruled.pictures[NUMBER:]).all()
    assert (batch.targets[number:][:NUMBER] == ruled.targets[NUMBER:]).all()
    chosen = undamaged[NUMBER:, 0, 0, 0]  # a sketch's shade is its number
    assert len(set(chosen.tolist())) > 3
    assert (undamaged[NUMBER:] == sketches.pictures[chosen]).all()
    assert (spoiled[NUMBER:] == sketches.sketched[chosen]).all()
    assert (batch.targets[:number] == np.float32(UNDAMAGED)).all()
    harm = (UNDAMAGED - batch.targets[number:][NUMBER:]) / (UNDAMAGED - RUINED)
    assert harm == pytest.approx(sketches.harm[chosen], abs=1e-5)
    for text, place in zip(batch.texts[NUMBER:number], chosen, strict=True):
        group = sketches.scenes[place].groups[0]
        assert group.name in text or plural(group.name) in text


@pytest.mark.parametrize(
    ("harm", "blamed"),
    [
        ({}, []),
        ({"color": BLAMED - 0.01}, []),
        ({"color": BLAMED}, ["color"]),
        ({"detail": 0.5, "color": 0.9, "layout": BLAMED - 0.01}, ["color", "detail"]),
        (
            {"detail": 0.5, "color": 0.9, "layout": 0.7, "realism": 0.6},
            ["color", "layout", "realism", "detail"],
        ),
        ({"realism": 1, "detail": 1, "integrity": 1}, ["detail", "realism", "integrity"]),
    ],
)
def test_a_sketch_is_blamed_for_its_worst_faults_where_they_are_bad(harm, blamed):
    metrics = load_metrics()
    batch = make_batch(1, 5, metrics, 1, _sketches([[harm.get(name, 0) for name in METRICS]]))
    negatives = [metrics[METRICS.index(name)].negative.lower() for name in blamed[:FAULTS]]
    assert batch.texts[3] == ", ".join([batch.texts[1], *negatives])


def test_the_same_seed_makes_the_same_batch():
    one, other, third = (make_batch(4, seed, load_metrics()) for seed in (1, 1, 2))
    assert (one.pictures == other.pictures).all()
    assert one.texts == other.texts
    assert one.wrong == other.wrong
    assert (one.pictures != third.pictures).any()


def test_some_scenes_damaged_by_rule_go_through_the_autoencoder_and_both_pictures_of_one_alike():
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).eval()
    undamaged = torch.rand(NUMBER + 16, 3, 16, 16) * 2 - 1
    pixels = torch.cat([undamaged, undamaged])
    seen = restored(pixels, NUMBER, autoencoder, np.random.default_rng(3))
    assert seen.shape == pixels.shape
    assert seen.abs().max() <= 1
    changed = (seen != pixels).flatten(1).any(1).view(2, -1)
    assert 0.2 < changed[:, :NUMBER].float().mean() < 0.8
    assert not changed[:, NUMBER:].any()  # sketches have been through it already
    torch.testing.assert_close(*seen.chunk(2), atol=1e-5, rtol=0)


def test_the_judge_needs_an_autoencoder_and_says_whose(tmp_path):
    with pytest.raises(ExportError, match="run `edge-export starter decoder --work "):
        train(tmp_path, steps=1)
