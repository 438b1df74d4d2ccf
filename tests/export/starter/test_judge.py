import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from edge_agent.superiority import METRICS
from export.errors import ExportError
from export.quality import load_metrics
from export.starter.damage import SIDE_EFFECTS
from export.starter.judge import RUINED, UNDAMAGED, main, make_batch, restored
from export.starter.sketch import Sketches
from export.starter.world import sample_scenes

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


def test_a_sketch_stands_beside_what_it_should_have_been_and_is_blamed_by_how_bad_it_is():
    scenes = sample_scenes("judge", 50, seed=1)
    pictures, sketched = (np.full((50, 64, 64, 3), shade, np.uint8) for shade in (40, 90))
    harm = np.linspace(0, 1, 50, dtype=np.float32)
    metrics = load_metrics()
    batch = make_batch(NUMBER, 5, metrics, Sketches(scenes, pictures, sketched, harm))
    rows = np.flatnonzero((batch.pictures[:NUMBER] == 40).all(axis=(1, 2, 3)))
    assert 0 < len(rows) < NUMBER
    realism = METRICS.index("realism")
    for row in rows:
        assert (batch.pictures[NUMBER + row] == 90).all()
        assert batch.texts[NUMBER + row] == f"{batch.texts[row]}, {metrics[realism].negative.lower()}"
        severity = (UNDAMAGED - batch.targets[NUMBER + row, realism]) / (UNDAMAGED - RUINED)
        assert np.abs(harm - severity).min() < 1e-5


def test_the_same_seed_makes_the_same_batch():
    one, other, third = (make_batch(4, seed, load_metrics()) for seed in (1, 1, 2))
    assert (one.pictures == other.pictures).all()
    assert one.texts == other.texts
    assert one.wrong == other.wrong
    assert (one.pictures != third.pictures).any()


def test_some_scenes_go_through_the_autoencoder_and_both_pictures_of_one_alike():
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).eval()
    undamaged = torch.rand(NUMBER, 3, 16, 16) * 2 - 1
    pixels = torch.cat([undamaged, undamaged])
    seen = restored(pixels, autoencoder, np.random.default_rng(3))
    assert seen.shape == pixels.shape
    assert seen.abs().max() <= 1
    changed = (seen != pixels).flatten(1).any(1)
    assert 0.2 < changed.float().mean() < 0.8
    torch.testing.assert_close(seen[:NUMBER], seen[NUMBER:], atol=1e-5, rtol=0)


def test_the_judge_needs_an_autoencoder_and_says_whose(tmp_path):
    with pytest.raises(ExportError, match=r"decoder/model: run `edge-export starter decoder`"):
        main(["--work", str(tmp_path), "--steps", "1"])
