"""What the inspector learns from: a sprite beyond recognition counts as none, one hardly malformed as itself."""

import numpy as np
import pytest
import torch

from export.starter import inspector
from export.starter.inspector import GRID, IGNORED, NOTHING, loosened, malform, read
from export.starter.world import Group, Scene, backdrop, stamp

LEFT, TOP, SIZE = 12, 16, 30


@pytest.mark.parametrize("seed", range(8))  # each of the four ways at least once
def test_a_malformed_sprite_is_spoiled_where_it_is_and_nowhere_else(seed):
    rng = np.random.default_rng(seed)
    before = backdrop("meadow", rng)
    canvas = before.copy()
    stamp(canvas, "fox", LEFT, TOP, SIZE)
    whole = canvas.copy()
    malform(canvas, before, LEFT, TOP, SIZE, harm=0.8, rng=rng)
    changed = np.abs(canvas - whole).max(axis=-1) > 0.05
    around = np.zeros_like(changed)
    around[TOP - 3 : TOP + SIZE + 3, LEFT - 3 : LEFT + SIZE + 3] = True
    assert changed[around].mean() > 0.05
    assert not changed[~around].any()


@pytest.mark.parametrize(
    ("named", "nameless", "taught"), [(1, 1, "itself"), (0, 1, "whatever"), (0, 0, "nothing")]
)
def test_how_malformed_a_sprite_is_decides_what_is_to_be_seen_there(monkeypatch, named, nameless, taught):
    changed = {"MALFORMED": 1, "MISSING": 0, "EXCHANGED": 0, "NAMED": named, "NAMELESS": nameless}
    for name, value in changed.items():
        monkeypatch.setattr(inspector, name, value)
    _, cells, _ = loosened(Scene((Group("fox"),)), np.random.default_rng(0))
    assert (inspector.NAMES.index("fox") in cells) == (taught == "itself")
    assert (IGNORED in cells) == (taught != "nothing")
    assert (cells == NOTHING).any()


@pytest.mark.posix
def test_a_full_disk_is_an_error_of_the_system_s(tmp_path, monkeypatch):
    """A limit on the size of files stands for it; safetensors has an error of its own for that."""
    import resource

    monkeypatch.setattr(inspector, "SCENES", 1)
    monkeypatch.setattr(inspector, "frozen_autoencoder", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(inspector.Run, "train", lambda *_: True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            inspector.train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("cells", "found"),
    [
        ({(4, 4): 0.55}, 0),  # perhaps there is something
        ({(4, 4): 0.55, (4, 5): 0.45}, 1),  # there is, with its middle here or one cell further
        ({(4, 4): 0.50, (4, 5): 0.45, (4, 6): 0.46}, 1),  # what lies between is not counted twice
        ({(4, 4): 0.95, (4, 7): 0.95}, 2),
    ],
)
def test_an_object_whose_middle_lies_between_two_cells_is_found_once(cells, found):
    chances = torch.zeros(1, NOTHING + 1, GRID, GRID)
    chances[0, NOTHING] = 1
    fox = inspector.NAMES.index("fox")
    for (row, column), chance in cells.items():
        chances[0, fox, row, column], chances[0, NOTHING, row, column] = chance, 1 - chance
    (sight,) = read(chances, torch.zeros(1, GRID, GRID), torch.eye(1, len(inspector.BACKGROUNDS)))
    assert [seen.name for seen in sight.objects] == ["fox"] * found
    assert all(seen.certainty == pytest.approx(0.95, abs=0.051) for seen in sight.objects)
