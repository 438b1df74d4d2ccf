"""Each fault is found in objects that have it; whatever is done to the background is nobody's fault."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edge_agent.superiority import METRICS
from export.starter.damage import render_samples
from export.starter.faults import BESIDE_REALISM, HARMLESS, LOST, REACH, UNRECOGNISED, UNSEEN, Shown, faults
from export.starter.world import Group, Scene, sample_scenes

SCENES = (  # of one to four objects, and room to move them
    Scene((Group("apple", 1, "big"),), "snow"),
    Scene((Group("cat"), Group("car")), "beach", "left of"),
    Scene((Group("frog", 2),), "plain"),
    Scene((Group("fox"), Group("banana"), Group("fish")), "night"),
    Scene((Group("strawberry", 4),), "meadow"),
)


def _shown(scenes):
    samples = render_samples(list(scenes), np.random.default_rng(0))
    pictures, twins, empty = (
        torch.from_numpy(np.stack([getattr(sample, name) for sample in samples])).permute(0, 3, 1, 2) / 255
        for name in ("picture", "twin", "empty")
    )
    sprites = np.stack([sample.sprites for sample in samples])
    return Shown(pictures, twins, empty, torch.from_numpy(sprites).long())


@pytest.fixture(scope="module")
def shown():
    return _shown(SCENES)


def _objects(shown):
    return (shown.sprites > 0)[:, None]


def _moved(shown, down, right):
    """The objects elsewhere, on the same background."""
    there = _objects(shown).roll((down, right), (2, 3))
    return torch.where(there, shown.pictures.roll((down, right), (2, 3)), shown.empty)


def _by_metric(shown, painted):
    return dict(zip(METRICS, faults(shown, painted).T.numpy(), strict=True))


def _blurred(pictures):
    return F.avg_pool2d(F.pad(pictures, [1] * 4, mode="replicate"), 3, stride=1)


def test_a_picture_as_it_should_be_has_no_fault_at_all():
    shown = _shown(sample_scenes("judge", 24, seed=3))
    assert (faults(shown, shown.pictures) == 0).all()


@pytest.mark.parametrize("move", [(REACH, 0), (-REACH, REACH), (0, -1), (2, -3)])
def test_an_object_that_was_only_moved_a_little_is_none_the_worse(shown, move):
    measured = _by_metric(shown, _moved(shown, *move))
    for metric, fault in measured.items():  # next to the object there is another bit of background
        assert fault.max() < 0.2 if metric in ("detail", "definition") else fault.max() < 0.02, metric


def test_an_object_that_was_moved_too_far_is_not_found(shown):
    assert _by_metric(shown, _moved(shown, REACH + 4, 0))["realism"].min() > 0.4


def test_another_object_in_its_place_is_malformed():
    shown = _shown(sample_scenes("judge", 24, seed=3))
    realism = _by_metric(shown, shown.twins)["realism"]
    assert realism.min() > 0.5
    assert np.median(realism) == 1


@pytest.mark.parametrize(
    ("way", "harm"), [(0, 0), (HARMLESS, 0), ((HARMLESS + UNRECOGNISED) / 2, 0.5), (UNRECOGNISED, 1), (1, 1)]
)
@pytest.mark.parametrize("end", ["twins", "empty"])
def test_objects_are_as_malformed_as_they_are_on_their_way_to_what_they_are_not(shown, end, way, harm):
    wrong = getattr(shown, end)
    on_the_way = shown.pictures + way * (wrong - shown.pictures)
    painted = torch.where(_objects(shown), on_the_way, 1.0)  # the background is nobody's fault
    measured = _by_metric(replace(shown, twins=wrong, empty=wrong), painted)
    shares = {"realism": 1, "harmony": 1, **BESIDE_REALISM}
    for metric in ("realism", "harmony", "consistency", "layout"):
        expected = np.full(len(SCENES), shares[metric] * harm)
        assert measured[metric] == pytest.approx(expected, abs=1e-3), metric


@pytest.mark.parametrize(("further", "way"), [(0.5, 0.2), (2, 0.1)])
def test_objects_are_measured_by_the_further_of_another_and_none(shown, further, way):
    """As far as 0.2 of the way to none is, it is but 0.1 of that to another twice as far."""
    twins = shown.pictures + further * (shown.empty - shown.pictures)
    measured = _by_metric(replace(shown, twins=twins), shown.pictures + 0.2 * (shown.empty - shown.pictures))
    expected = np.full(len(SCENES), (way - HARMLESS) / (UNRECOGNISED - HARMLESS))
    assert measured["realism"] == pytest.approx(expected, abs=1e-3)
    assert measured["harmony"] == pytest.approx(expected, abs=1e-3)


def test_one_malformed_object_counts_by_how_many_there_are(shown):
    painted = torch.where(shown.sprites[:, None] == 2, shown.empty, shown.pictures)
    realism = _by_metric(shown, painted)["realism"]
    assert realism == pytest.approx(np.array([0, 1 / 2, 1 / 2, 1 / 3, 1 / 4]), abs=0.02)


@pytest.mark.parametrize("metric", ["color", "clarity"])
@pytest.mark.parametrize("harm", [0, 0.5, 1])
def test_washed_out_objects_lack_colour_and_veiled_ones_clarity(shown, metric, harm):
    grey = shown.pictures.mean(dim=1, keepdim=True)
    end = {"color": grey, "clarity": shown.empty}[metric]
    share = UNSEEN + harm * (LOST[metric] - UNSEEN)
    fault = _by_metric(shown, shown.pictures + share * (end - shown.pictures))[metric]
    assert fault == pytest.approx(np.full(len(SCENES), harm), abs=1e-3)


def test_blurred_objects_lack_the_finer_the_more_but_no_part(shown):
    measured = _by_metric(shown, _blurred(shown.pictures))
    assert measured["sharpness"].min() > 0.8
    assert measured["definition"].min() > 0.7
    assert measured["detail"].min() > 0.5
    assert (measured["sharpness"] > measured["detail"]).all()
    for metric in ("clarity", "color", "integrity"):
        assert measured[metric].max() < 0.2, metric


def test_objects_cut_off_lack_integrity(shown):
    objects = _objects(shown)
    covered = objects.flatten(2).float().cumsum(dim=2)
    lower = objects & (covered > 0.6 * covered[..., -1:]).view_as(objects)
    measured = _by_metric(shown, torch.where(lower, shown.empty, shown.pictures))
    assert measured["integrity"].min() > 0.9
    assert (measured["integrity"] > measured["sharpness"]).all()


def test_objects_that_are_gone_lack_everything(shown):
    measured = _by_metric(shown, shown.empty)
    for metric in set(METRICS) - {"consistency", "layout", "color"}:  # beach and meadow have colour too
        assert measured[metric].min() > 0.99, metric


def test_exchanged_colours_have_no_harmony_and_all_the_detail(shown):
    measured = _by_metric(shown, torch.where(_objects(shown), shown.pictures.roll(1, 1), shown.pictures))
    assert measured["harmony"].min() == 1
    assert max(measured[metric].max() for metric in ("definition", "detail", "sharpness")) < 0.1


def test_darker_objects_have_the_harmony_and_the_detail_they_had(shown):
    measured = _by_metric(shown, shown.pictures - 0.1)
    assert measured["realism"].min() > 0
    for metric in ("harmony", "definition", "detail", "sharpness", "color"):
        assert measured[metric].max() < 0.02, metric


def test_whatever_is_painted_every_metric_has_a_share_of_its_fault(shown):
    torch.manual_seed(0)
    pictures = shown.pictures
    for painted in (torch.rand_like(pictures), pictures * 0, pictures * 0 + 1, 1 - pictures, shown.twins):
        measured = faults(shown, painted)
        assert measured.shape == (len(SCENES), len(METRICS))
        assert measured.dtype == torch.float32
        assert measured.min() >= 0
        assert measured.max() <= 1
        for metric, share in BESIDE_REALISM.items():
            realism = measured[:, METRICS.index("realism")]
            assert (measured[:, METRICS.index(metric)] >= share * realism - 1e-6).all()


def test_a_picture_has_the_same_faults_alone_as_among_others_with_more_objects(shown):
    painted = shown.pictures + 0.2 * (shown.twins - shown.pictures)
    together = faults(shown, painted)
    assert ((together > 0) & (together < 1)).any(dim=1).all()
    for row in range(len(SCENES)):
        one = slice(row, row + 1)
        alone = Shown(shown.pictures[one], shown.twins[one], shown.empty[one], shown.sprites[one])
        torch.testing.assert_close(faults(alone, painted[one]), together[one], atol=1e-4, rtol=0)


def test_an_object_hidden_by_another_has_no_faults(shown):
    """Its number is nowhere: here 2 is, and the ones behind it count on."""
    painted = shown.pictures + 0.2 * (shown.twins - shown.pictures)
    hidden = replace(shown, sprites=shown.sprites + (shown.sprites > 1).long())
    torch.testing.assert_close(faults(hidden, painted), faults(shown, painted), atol=1e-5, rtol=0)
