"""Whatever text passes the checks goes all the way: read, scored, written into a PNG and into the ledger."""

from __future__ import annotations

import io
import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_agent.budget import Budget
from edge_agent.bundle import Bundle
from edge_agent.errors import InvalidRequest
from edge_agent.image import encode_png, with_facts
from edge_agent.policy import Reason
from edge_agent.quota import Ledger
from edge_agent.reader import Reader
from edge_agent.request import ImageRequest, Limits, validate
from edge_agent.settings import STARTER

LIMITS = Limits(sizes=((64, 64),), steps=(4,))
REQUEST = ImageRequest(request_id="r-1", prompt="a cat")
PNG = encode_png(np.zeros((8, 8, 3), dtype=np.uint8))

# Of all planes, with what tokenizers and files trip over: joiners, marks, right to left, their own special tokens.
pieces = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "<|endoftext|>",
            "<|startoftext|>",
            "<unk>",
            "\u200d",
            "\ufe0f",
            "\u202e",
            "\ufeff",
            "👩‍👩‍👧",
            "\t",
            "\n",
        ]
    ),
)
texts = st.lists(pieces, max_size=6).map("".join) | st.text(
    st.characters(categories=["Cs", "Cc", "Cn", "Co"])
)


@pytest.fixture(scope="module")
def readers(routed_bundle: Path) -> tuple[Reader, ...]:
    """Of the starter, and of random weights of Stable Diffusion's shape."""
    return tuple(Reader.open(Bundle.open(folder), 0.5) for folder in (STARTER, routed_bundle))


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    ledger = Ledger.open(
        tmp_path_factory.mktemp("ledger") / "quota.sqlite3", (Budget("all", "total", 2**40),)
    )
    yield ledger
    ledger.close()


@settings(max_examples=60, deadline=None)
@given(texts)
@example("\u200b")
@example("<|endoftext|>")
@example("x" * 2_000)
@example("\U0001f468\u200d" * 400)
def test_a_prompt_is_refused_by_its_name_or_read_scored_and_kept_as_it_is(
    readers: tuple[Reader, ...], prompt: str
) -> None:
    try:
        validate(REQUEST._replace(prompt=prompt), LIMITS)
    except InvalidRequest as refused:
        assert refused.field == "prompt"
        refused.message.encode()
        return
    for reader in readers:
        reading = reader.read(prompt)
        assert reading.prs is not None and math.isfinite(reading.prs) and 0 <= reading.prs <= 1
        pulls = reading.decision("edge", Reason.PARETO_EDGE, reader.alpha).tokens
        assert all(math.isfinite(pull) for token in pulls for pull in token.pull)
        json.dumps([token.text for token in pulls]).encode()
        "".join(token.text for token in pulls).encode()  # as the wire does
    with Image.open(io.BytesIO(with_facts(PNG, {"prompt": prompt}))) as image:
        image.load()
        assert image.text == {"prompt": prompt}


@settings(max_examples=100, deadline=None)
@given(texts | st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=130))
def test_an_app_is_refused_by_its_name_or_has_an_account(ledger: Ledger, app: str) -> None:
    try:
        validate(REQUEST._replace(app=app), LIMITS)
    except InvalidRequest as refused:
        assert refused.field == "app"
        refused.message.encode()
        return
    (before,) = ledger.states(app)
    ledger.reserve(uuid.uuid4().hex, app, 40)
    (after,) = ledger.states(app)
    assert after.reserved_micro_usd == before.reserved_micro_usd + 40


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_the_quota_may_be_asked_for_under_any_name(ledger: Ledger, app: str) -> None:
    assert [state.name for state in ledger.states(app)] == ["all"]
