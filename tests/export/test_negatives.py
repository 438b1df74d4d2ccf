"""Hard negatives, and the metric that is made of them, with the shipped judge."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from export.negatives import hard_negatives
from export.prompts import router_prompts
from export.quality import Judge
from export.starter.world import Group, Scene, render

SCENE = Scene((Group("green apple"), Group("dog", 2, "big")), "night", "left of")


def test_each_negative_has_one_thing_wrong_and_reads_like_the_prompt():
    text = "a green apple left of two big dogs under the stars"
    objects = [n.text for n in hard_negatives(text, SCENE) if n.fault == "object"]
    assert len(objects) == 2
    assert objects[0].endswith(" left of two big dogs under the stars") and "green apple" not in objects[0]
    assert objects[1].startswith("a green apple left of two big ") and "dogs" not in objects[1]
    rest = [(n.fault, n.text) for n in hard_negatives(text, SCENE) if n.fault != "object"]
    assert rest == [
        ("count", "two green apples left of two big dogs under the stars"),
        ("count", "a green apple left of three big dogs under the stars"),
        ("relation", "a green apple right of two big dogs under the stars"),
    ]


def test_a_scene_of_every_object_with_a_vowel_has_negatives_too():
    scene = Scene((Group("apple"), Group("orange"), Group("owl")))
    objects = [n.text for n in hard_negatives("an apple, an orange and an owl", scene) if n.fault == "object"]
    assert len(objects) == 3


def test_the_apple_of_a_green_apple_is_left_alone():
    scene = Scene((Group("green apple"), Group("apple")), relation="above")
    (first, second) = (
        n.text for n in hard_negatives("a green apple above an apple", scene) if n.fault == "count"
    )
    assert first == "two green apples above an apple"
    assert second == "a green apple above two apples"


def test_every_prompt_of_the_grammar_has_all_its_negatives_and_the_same_each_time():
    for prompt in router_prompts({"test": 40, "wording": 20}):
        faults = [negative.fault for negative in hard_negatives(prompt.text, prompt.scene)]
        kinds = len(prompt.scene.groups)
        assert (faults.count("object"), faults.count("count")) == (kinds, kinds)
        assert faults.count("relation") == (prompt.scene.relation is not None)
        assert hard_negatives(prompt.text, prompt.scene) == hard_negatives(prompt.text, prompt.scene)


def test_a_picture_adheres_to_its_own_prompt_and_not_to_another():
    judge, rng = Judge(), np.random.default_rng(0)
    text, wrong = "two cats on a beach", "two rockets on a beach"
    image = Image.fromarray(render(Scene((Group("cat", 2),), "beach"), rng))
    right, swapped, unknown = judge.adherence_of(
        judge.look([image] * 3), [text, wrong, text], [[wrong], [text], []]
    )
    assert right > 0.5 > swapped
    assert right + swapped == pytest.approx(1, abs=1e-5)
    assert np.isnan(unknown)
