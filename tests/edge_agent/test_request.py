"""What cannot be served is refused before any work, naming the field; what can be is never altered."""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_server.request import VISIBLE
from edge_agent.errors import DeadlinePassed, InvalidRequest, UnknownApp
from edge_agent.request import _VISIBLE, MAX_SEED, ImageRequest, Limits, Privacy, Routing, validate

LIMITS = Limits(sizes=((64, 64), (128, 64)), steps=(4, 8, 25))
REQUEST = ImageRequest(request_id="r-1", prompt="two cats on a beach")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_seed_and_size_are_filled_in_and_steps_and_guidance_are_left_to_the_model_that_runs() -> None:
    done = validate(REQUEST, LIMITS, draw_seed=lambda: 17)
    assert done == REQUEST._replace(seed=17, width=64, height=64)


def test_what_the_caller_said_stays() -> None:
    said = REQUEST._replace(
        seed=0, width=128, height=64, steps=25, guidance_scale=0.0, negative_prompt="blurry"
    )
    assert validate(said, LIMITS) == said


def test_what_lies_at_a_limit_is_taken() -> None:
    largest = REQUEST._replace(
        request_id="aZ09._:-" * 16,
        app="~" * 128,
        seed=MAX_SEED,
        guidance_scale=50.0,
        max_price_micro_usd=2**63 - 1,
        resume_offset=2**63 - 1,
        traceparent=TRACE,
        routing=Routing.CLOUD_ONLY,
    )
    assert validate(largest, LIMITS) == largest._replace(width=64, height=64)


def test_a_drawn_seed_is_a_seed_and_two_draws_differ() -> None:
    seeds = {validate(REQUEST, LIMITS).seed for _ in range(4)}
    assert len(seeds) > 1
    assert all(seed is not None and 0 <= seed <= MAX_SEED for seed in seeds)


def test_one_side_of_the_size_selects_a_size_that_has_it() -> None:
    wide = validate(REQUEST._replace(width=128), LIMITS)
    assert (wide.width, wide.height) == (128, 64)


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": " \n\t "}, "prompt", "empty"),
        ({"prompt": "\u00a0\u3000"}, "prompt", "empty"),
        ({"prompt": "\u200b"}, "prompt", "nothing of it can be seen"),
        ({"prompt": "\u200d\u00ad \u2060\ufeff\u202e\n"}, "prompt", "nothing of it can be seen"),
        ({"prompt": "\ufe0f\u034f\u3164\u2800\U000e0061\U000e0100"}, "prompt", "nothing of it can be seen"),
        ({"prompt": "\u200b\x00"}, "prompt", "character 2 of the prompt, U+0000"),
        ({"prompt": "x" * 10_000}, "prompt", "10,000 characters; at most 2,000"),
        ({"prompt": "cat\x00dog"}, "prompt", "character 4 of the prompt, U+0000"),
        ({"prompt": "cat\rdog"}, "prompt", "U+000D"),
        ({"prompt": "cat \x9b"}, "prompt", "character 5 of the prompt, U+009B"),
        ({"prompt": "\ud83d cat"}, "prompt", "character 1 of the prompt, U+D83D"),
        ({"negative_prompt": "a\x1bb"}, "negative_prompt", "character 2 of the negative_prompt"),
        ({"negative_prompt": "x" * 2_001}, "negative_prompt", "at most 2,000"),
        ({"width": 512}, "width", "64x64, 128x64"),
        ({"height": 512}, "height", "64x64, 128x64"),
        ({"width": 128, "height": 128}, "height", "128x128 pixels"),
        ({"width": 0}, "width", "no images 0 pixels wide; it makes 64x64, 128x64"),
        ({"height": 65}, "height", "no images 65 pixels high; it makes 64x64, 128x64"),
        ({"steps": 5}, "steps", "4, 8, 25"),
        ({"steps": 0}, "steps", "4, 8, 25"),
        ({"steps": -1}, "steps", "4, 8, 25"),
        ({"seed": -1}, "seed", "4294967295"),
        ({"seed": 2**32}, "seed", "4294967295"),
        ({"guidance_scale": -0.1}, "guidance_scale", "between 0 and 50"),
        ({"guidance_scale": 51.0}, "guidance_scale", "between 0 and 50"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "nan"),
        ({"media_type": "image/jpeg"}, "media_type", "image/png"),
        ({"media_type": "image/PNG"}, "media_type", "image/png"),
        ({"max_price_micro_usd": -1}, "max_price_micro_usd", "-1"),
        ({"resume_offset": -1}, "resume_offset", "-1"),
        ({"traceparent": "00-xyz"}, "traceparent", "traceparent"),
        ({"traceparent": f"{TRACE}\r\nforged: 1"}, "traceparent", "traceparent"),
        ({"request_id": ""}, "request_id", "empty"),
        ({"request_id": "x" * 129}, "request_id", "129"),
        ({"request_id": "a\nb"}, "request_id", "letters, digits"),
        ({"request_id": "a b"}, "request_id", "letters, digits"),
        ({"app": ""}, "app", "empty"),
        ({"app": "café"}, "app", "ASCII"),
        ({"routing": Routing.CLOUD_ONLY, "privacy": Privacy.LOCAL_ONLY}, "privacy", "exclude each other"),
    ],
)
def test_a_wrong_field_is_named_and_the_message_says_what_there_is(
    change: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(REQUEST._replace(**change), LIMITS)
    assert refused.value.field == field
    assert says in refused.value.message
    refused.value.message.encode()  # also of a lone surrogate: the message itself can travel


@pytest.mark.parametrize(
    "prompt",
    [
        "x" * 2_000,
        "👩‍👩‍👧‍👦 on a beach 🏖️",
        "line one\nline two\tand a tab",
        "猫が二匹",
        "a\u200dcat",
        "e\u0301",
        "مرحبا",
        "\u200b7\ufe0f\u20e3",
        "🏴\U000e0067\U000e0062\U000e007f",
        "?!",
        "\u0301",
        "\u06dd",
        "\ue000",
        "\U0001faea\u200d\U0001fbfe",
    ],
)
def test_any_text_is_a_prompt(prompt: str) -> None:
    assert validate(REQUEST._replace(prompt=prompt), LIMITS).prompt == prompt


def test_white_space_does_not_show_and_numbers_punctuation_and_marks_of_currency_do() -> None:
    for character in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(character)
        if category[0] in "ZNP" or category == "Sc":
            assert bool(_VISIBLE.search(character)) is (category[0] != "Z"), f"U+{ord(character):04X}"


def test_edge_and_cloud_agree_on_what_shows() -> None:
    assert _VISIBLE.pattern == VISIBLE.pattern


@given(st.text(st.characters() | st.characters(categories=["Cs", "Cc"]), max_size=30))
def test_what_passes_can_be_written_as_utf8_and_what_does_not_names_the_prompt(prompt: str) -> None:
    request = REQUEST._replace(prompt=prompt)
    try:
        passed = validate(request, LIMITS).prompt
    except InvalidRequest as error:
        refused = error
    else:
        assert passed.encode().decode() == prompt
        return
    assert refused.field == "prompt"


def test_only_listed_apps_may_call_when_the_settings_list_them() -> None:
    listed = replace(LIMITS, apps=frozenset({"camera"}))
    assert validate(REQUEST._replace(app="camera"), listed).app == "camera"
    with pytest.raises(UnknownApp, match="'default'"):
        validate(REQUEST, listed)


def test_a_deadline_that_has_passed_is_refused_and_one_to_come_is_kept() -> None:
    assert validate(REQUEST._replace(deadline=100.5), LIMITS, monotonic=lambda: 100.0).deadline == 100.5
    with pytest.raises(DeadlinePassed):
        validate(REQUEST._replace(deadline=100.0), LIMITS, monotonic=lambda: 100.0)


@pytest.mark.parametrize(
    ("change", "local"),
    [({}, False), ({"routing": Routing.LOCAL_ONLY}, True), ({"privacy": Privacy.LOCAL_ONLY}, True)],
)
def test_local_only_is_one_answer_to_two_ways_of_asking(change: dict[str, Any], local: bool) -> None:
    assert REQUEST._replace(**change).local_only is local


def test_validating_twice_changes_nothing_more() -> None:
    once = validate(REQUEST, LIMITS)
    assert validate(once, LIMITS) == once
