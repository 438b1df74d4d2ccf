"""How malformed a sketch's objects are is measured where they are, on the way to other objects."""

import numpy as np
import pytest

from export.starter.damage import render_samples
from export.starter.sketch import HARMLESS, RUINED, _harm
from export.starter.world import sample_scenes


@pytest.mark.parametrize(
    ("way", "harm"), [(0, 0), (HARMLESS, 0), ((HARMLESS + RUINED) / 2, 0.5), (RUINED, 1), (1, 1)]
)
def test_a_picture_is_as_harmed_as_it_is_on_its_way_to_other_objects(way, harm):
    samples = render_samples(sample_scenes("judge", 6, seed=3), np.random.default_rng(0))
    pictures = np.stack([sample.picture for sample in samples])
    painted = pictures + way * (np.stack([sample.twin for sample in samples]) - pictures.astype(np.float32))
    painted[~np.stack([sample.objects for sample in samples])] = 255  # the background is nobody's fault
    assert _harm(samples, pictures, painted) == pytest.approx(np.full(6, harm), abs=1e-3)
