import numpy as np
import pyarrow.parquet as pq
import pytest

from export import prompts as prompts_of_routers
from export.prompts import (
    PROMPTS,
    holds_held_out_pair,
    never_learnt,
    own_prompts,
    router_prompts,
    scenes_by_text,
    scenes_of,
)
from export.starter.shipped import STARTER_LABELS
from export.starter.sprites import CELL, COLUMNS, OBJECTS, PACK, sprite
from export.starter.world import (
    BACKGROUNDS,
    FREQUENCY,
    SIZE,
    SIZES,
    SPLITS,
    Group,
    Scene,
    _draw,
    _names,
    backdrop,
    caption,
    outlines,
    place,
    plural,
    render,
    sample_scene,
    sample_scenes,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_every_object_has_a_sprite_with_something_on_it():
    for name in OBJECTS:
        stamp = sprite(name, 32)
        assert stamp.shape == (32, 32, 4)
        assert stamp[..., 3].max() > 0.9
        assert (stamp[..., :3] <= stamp[..., 3:] + 0.05).all(), "colours are premultiplied"


def test_the_pack_holds_a_cell_for_each_object():
    from PIL import Image

    with Image.open(PACK) as sheet:
        assert sheet.size == (COLUMNS * CELL, -(-len(OBJECTS) // COLUMNS) * CELL)


def test_a_picture_is_a_function_of_scene_and_seed():
    scene = Scene((Group("cat", 2), Group("car", 1, "big")), "beach", "above")
    first, again, other = render(scene, rng(1)), render(scene, rng(1)), render(scene, rng(2))
    assert first.dtype == np.uint8
    assert first.shape == (SIZE, SIZE, 3)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_the_relation_decides_which_half_an_object_is_in(relation):
    """A red apple against a blue fish on white: the centre of the red pixels tells."""
    picture = render(Scene((Group("apple"), Group("fish")), "plain", relation), rng()).astype(int)
    red = (picture[..., 0] - picture[..., 2]) > 100
    rows, columns = np.nonzero(red)
    centre = {"left of": columns, "right of": SIZE - columns, "above": rows, "below": SIZE - rows}[
        relation
    ].mean()
    assert centre < SIZE / 2


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_more_objects_cover_more_of_the_picture_than_the_empty_scene(count):
    picture = render(Scene((Group("apple", count),), "plain"), rng())
    assert (picture.astype(int)[..., 0] - picture.astype(int)[..., 2] > 100).sum() > 60 * count


def test_outlines_say_which_sprite_each_pixel_of_the_picture_shows():
    overlapping = (338, Scene((Group("car", 2, "big"),), "snow"))
    for seed, scene in [*enumerate(sample_scenes("judge", 20, seed=3)), overlapping]:
        picture, shown, generator = render(scene, rng(seed)), outlines(scene, rng(seed)), rng(seed)
        empty = backdrop(scene.background, generator)
        sprites = list(place(scene, generator))
        assert shown.dtype == np.uint8
        assert set(np.unique(shown)) == set(range(len(sprites) + 1))
        for number, (name, left, top, size) in enumerate(sprites, 1):
            window, stamp = np.s_[top : top + size, left : left + size], sprite(name, size)
            own = shown[window] == number
            assert own.sum() == (shown == number).sum()
            assert own.sum() > 0.8 * (stamp[..., 3] > 0.5).sum()
            assert stamp[own][:, 3].min() > 0.5  # more sprite than background
            opaque = own & (stamp[..., 3] > 0.99)
            far = np.abs(picture[window][opaque] / 255 - stamp[opaque][:, :3].clip(0, 1)).max(axis=1) > 0.02
            assert far.mean() < 0.04  # but for another's rim
        bare = np.abs(picture / 255 - empty).max(axis=2)[shown == 0] < 0.02
        assert bare.mean() > 0.9  # and the rest the sprites' own rims


def test_a_caption_names_every_object_its_count_and_its_size():
    for seed in range(300):
        scene = sample_scene(rng(seed))
        text = caption(scene, rng(seed))
        for group in scene.groups:
            assert (group.name if group.count == 1 else plural(group.name)) in text
            if group.count > 1:
                assert {2: "two", 3: "three", 4: "four"}[group.count] in text
        sized = sum(group.size != "medium" for group in scene.groups)
        words = text.replace(",", "").split()
        assert sum(words.count(word) for word in ("small", "tiny", "little", "big", "large", "huge")) == sized


def test_the_relation_survives_the_paraphrase_that_swaps_its_sides():
    scene = Scene((Group("cat"), Group("dog")), "plain", "left of")
    for seed in range(50):
        text = caption(scene, rng(seed))
        if text.index("cat") < text.index("dog"):
            assert "left of" in text
        else:
            assert "right of" in text


@pytest.mark.parametrize(("relation", "mirrored"), [("right of", "left of"), ("below", "above")])
def test_a_scene_said_the_other_way_round_is_the_same_scene(relation, mirrored):
    cat, dogs = Group("cat"), Group("dog", 2)
    said, other = Scene((cat, dogs), "beach", relation), Scene((dogs, cat), "beach", mirrored)
    assert said.asked == other.asked == other
    one, same, stranger = scenes_of(
        ["a", "b", "c"], {"a": said, "b": other, "c": Scene((dogs, cat), "beach", relation)}
    )
    assert one == same != stranger
    splits, scenes = np.array(["train", "test", "test"]), np.array([one, same, stranger])
    assert never_learnt(splits, scenes).tolist() == [True, False, True]


def test_what_is_asked_for_in_another_order_is_the_same_scene_and_nothing_else_is():
    cat, dog, car = Group("cat"), Group("dog"), Group("car")
    scenes = {
        "a": Scene((cat, dog, car), "beach"),
        "b": Scene((car, cat, dog), "beach"),
        "c": Scene((dog, car, cat), "beach"),
        "another place": Scene((cat, dog, car), "night"),
        "another size": Scene((cat, dog, Group("car", 1, "big")), "beach"),
        "the size of another": Scene((Group("cat", 1, "big"), dog, car), "beach"),
        "related": Scene((cat, dog), "beach", "left of"),
        "the other way": Scene((dog, cat), "beach", "left of"),
        "one above the other": Scene((cat, dog), "beach", "above"),
        "unrelated": Scene((cat, dog), "beach"),
    }
    first, *same = scenes_of(list(scenes), scenes)[:3]
    others = scenes_of(list(scenes), scenes)[3:].tolist()
    assert same == [first, first]
    assert len({first, *others}) == 1 + len(others)


def test_splits_are_disjoint_and_the_same_in_every_process():
    assert sum(SPLITS.values()) == 100
    scene = Scene((Group("cat"),), "beach")
    assert scene.split == Scene((Group("cat"),), "beach").split
    drawn = {split: set(sample_scenes(split, 40, seed=1)) for split in SPLITS}
    for split, scenes in drawn.items():
        assert all(scene.split == split for scene in scenes)
    assert len(set().union(*drawn.values())) == sum(len(scenes) for scenes in drawn.values())


def test_every_background_and_every_object_can_be_drawn():
    scenes = [sample_scene(rng(seed)) for seed in range(2000)]
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {group.name for scene in scenes for group in scene.groups} == set(OBJECTS)


def test_asking_for_more_prompts_keeps_the_ones_there_were():
    few = router_prompts({"train": 20, "test": 5})
    many = router_prompts({"train": 40, "test": 12})
    assert set(few) <= set(many)
    assert len({prompt.text for prompt in many}) == len(many)
    assert all(prompt.scene.split == prompt.split for prompt in many)


def test_the_starters_prompts_are_known_by_their_ids_even_where_some_are_left_out():
    drawn = [
        one for one in router_prompts({"train": 20, "test": 5}) if one.prompt_id not in (100_003, 400_000)
    ]
    ids, splits = np.array([one.prompt_id for one in drawn]), np.array([one.split for one in drawn])
    known = scenes_by_text(ids, splits)
    assert all(known[one.text] == one.scene for one in drawn)


def test_of_prompts_of_ones_own_nothing_is_drawn(tmp_path, monkeypatch):
    """Which took a minute for 70,000, and could find nothing."""
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"a picture number {number}\n" for number in range(200)))
    own = own_prompts(file)
    monkeypatch.setattr(prompts_of_routers, "router_prompts", None)
    ids, splits = np.array([one.prompt_id for one in own]), np.array([one.split for one in own])
    assert scenes_by_text(ids, splits) == {}
    for split in set(splits):
        assert scenes_by_text(ids[splits == split], splits[splits == split]) == {}


def test_training_prompts_say_scenes_of_their_own_once_many_were_drawn(monkeypatch):
    monkeypatch.setattr(prompts_of_routers, "REPEATING", 40)
    drawn = [prompt.scene for prompt in router_prompts({"train": 120, "test": 120})]
    repeating, own, test = drawn[:40], drawn[40:120], drawn[120:]
    assert len(set(own)) == len(own) and not set(own) & set(repeating)
    assert len(set(test)) < len(test)  # as they come, everywhere else


def test_scenes_are_drawn_as_numpys_choice_draws():
    ours, numpys = rng(3), rng(3)
    shares = np.array([FREQUENCY[name] for name in OBJECTS]) / sum(FREQUENCY.values())
    for number in (1, 2, 3) * 200:
        expected = numpys.choice(list(OBJECTS), size=number, replace=False, p=shares)
        assert _names(ours, number) == expected.tolist()
        assert _draw(ours, SIZES, (0.2, 0.6, 0.2)) == numpys.choice(SIZES, p=(0.2, 0.6, 0.2))


def test_the_shipped_labels_are_of_the_prompts_drawn_now():
    table = pq.read_table(STARTER_LABELS, columns=["prompt_id", "prompt"])
    shipped = dict(zip(table["prompt_id"].to_pylist(), table["prompt"].to_pylist(), strict=True))
    drawn = router_prompts(dict.fromkeys(PROMPTS, 100))
    assert [shipped[prompt.prompt_id] for prompt in drawn] == [prompt.text for prompt in drawn]


def test_pairs_kept_for_combinations_are_in_no_other_split():
    prompts = router_prompts({"train": 60, "test": 20, "combinations": 6, "wording": 6})
    assert {prompt.split for prompt in prompts if holds_held_out_pair(prompt.scene)} == {"combinations"}


def test_held_out_wordings_are_none_of_the_usual_ones():
    said = {caption(scene, rng(seed)) for seed in range(200) for scene in [sample_scene(rng(seed % 20))]}
    held_out = {
        caption(scene, rng(7), held_out=True) for seed in range(20) for scene in [sample_scene(rng(seed))]
    }
    assert not said & held_out


def test_free_form_prompts_name_objects_of_the_world_or_none_at_all():
    prompts = router_prompts({"free-form": 60})
    assert len(prompts) == 60
    scenes = [prompt.scene for prompt in prompts if prompt.scene]
    assert {group.name for scene in scenes for group in scene.groups} <= set(OBJECTS)
    assert {scene.background for scene in scenes} <= set(BACKGROUNDS)
    assert any(prompt.scene is None for prompt in prompts)
