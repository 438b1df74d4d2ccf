"""Painting takes trained models (`test_recipe.py`); here is what goes before it and what is kept of it."""

import numpy as np
import pytest
import torch

from edge_agent.superiority import METRICS
from export.errors import ExportError
from export.starter import sketch
from export.starter.size import SKETCHES
from export.starter.sketch import NUMBER, SEED, sketches
from export.starter.world import sample_scenes


@pytest.fixture
def work(tmp_path):
    """All models trained, as far as their records say."""
    for size in SKETCHES:
        (tmp_path / size.name).mkdir()
        (tmp_path / size.name / "record.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("missing", SKETCHES, ids=lambda size: size.name)
def test_every_model_has_to_be_trained_and_the_one_that_is_not_is_named(work, missing):
    (work / missing.name / "record.json").unlink()
    with pytest.raises(
        ExportError, match=f"'{missing.name}' is not finished: run `edge-export starter sketch "
    ):
        sketches(work)


def test_what_was_painted_before_is_read_with_the_scenes_it_shows(work):
    pictures, sketched = np.random.default_rng(0).integers(256, size=(2, 5, 64, 64, 3), dtype=np.uint8)
    harm = np.random.default_rng(1).random((5, len(METRICS)), dtype=np.float32)
    np.savez(work / "sketch" / f"sketches-{NUMBER}.npz", pictures=pictures, sketched=sketched, harm=harm)
    kept = sketches(work)
    assert kept.scenes == sample_scenes("judge", 5, SEED)
    assert (kept.pictures == pictures).all()
    assert (kept.sketched == sketched).all()
    assert (kept.harm == harm).all()


def test_painted_pictures_are_kept_to_the_nearest_of_256_shades():
    shades = torch.tensor([0, 0.4, 0.6, 254.4, 254.6, 255]) / 255
    pictures = sketch._uint8(shades.view(1, 1, 2, 3).expand(2, 3, 2, 3))
    assert pictures.shape == (2, 2, 3, 3)
    assert pictures.dtype == np.uint8
    assert (pictures[1, ..., 2] == [[0, 0, 1], [254, 255, 255]]).all()
