"""What a model or its settings do not serve is refused, naming the field; what lies at a limit is served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cloud_server.errors import InvalidRequest
from cloud_server.request import MAX_SEED, Limits, Wish, check, validate

LIMITS = Limits(
    width=64,
    height=32,
    steps=4,
    guidance_scale=3.0,
    sizes=None,
    side_multiple=8,
    max_side=1024,
    max_steps=150,
    max_prompt_characters=2_000,
    negative_prompt=True,
)
WISH = Wish(request_id="r-1", app="", prompt="two cats")
CHOOSY = replace(LIMITS, sizes=((64, 32), (64, 64)), negative_prompt=False)


@pytest.mark.parametrize(
    "said",
    [
        {"seed": 0, "width": 8, "height": 1024, "steps": 1, "guidance_scale": 0.0},
        {"seed": MAX_SEED, "width": 1024, "height": 8, "steps": 150, "guidance_scale": 100.0},
        {"prompt": "x" * 2_000, "negative_prompt": "a\n\tdog"},
    ],
)
def test_what_lies_at_a_limit_is_served_as_it_was_said(said: dict[str, Any]) -> None:
    spec = validate(replace(WISH, **said), LIMITS, 17)
    assert {field: getattr(spec, field) for field in said} == said


def test_the_longest_names_and_no_price_are_taken() -> None:
    check(replace(WISH, request_id="x" * 128, app="x" * 128, max_price_micro_usd=0))


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"width": 32}, "width", "32 x 32 is not served; this model makes 64 x 32, 64 x 64"),
        ({"height": 128}, "height", "64 x 128 is not served"),
        ({"height": 64, "guidance_scale": 100.5}, "guidance_scale", "between 0 and 100"),
        ({"negative_prompt": "a dog"}, "negative_prompt", "takes no negative prompt"),
    ],
)
def test_what_a_model_does_not_make_is_refused_by_its_field(
    change: dict[str, Any], field: str, says: str
) -> None:
    assert validate(replace(WISH, height=64), CHOOSY, 17).height == 64
    with pytest.raises(InvalidRequest, match=says) as refused:
        validate(replace(WISH, **change), CHOOSY, 17)
    assert refused.value.field == field
