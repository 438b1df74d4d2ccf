"""One bundle makes images of several sizes, and the cloud is asked for the same ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from edge_agent.bundle import Bundle
from routet2i.edge.v1 import edge_pb2
from tests.running import (
    CLOUD_PROMPT,
    EDGE_PROMPT,
    LOCAL,
    Here,
    ScriptedCloud,
    daemon_here,
    scripted_cloud,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cloud(routed_bundle: Path) -> AsyncIterator[ScriptedCloud]:
    calibration = Bundle.open(routed_bundle).calibration
    assert calibration is not None
    async with scripted_cloud(calibration.cloud_digest) as cloud:
        yield cloud


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def here(
    tmp_path_factory: pytest.TempPathFactory, sized_bundle: Path, cloud: ScriptedCloud
) -> AsyncIterator[Here]:
    async with daemon_here(sized_bundle, tmp_path_factory.mktemp("state"), cloud=cloud.address) as here:
        yield here


@pytest.mark.parametrize(
    ("wish", "size"),
    [
        ({}, (64, 64)),
        ({"width": 96}, (96, 64)),
        ({"height": 96}, (64, 96)),
        ({"width": 64}, (64, 64)),
        ({"width": 64, "height": 96}, (64, 96)),
    ],
)
async def test_an_image_has_the_size_that_was_asked_for(
    here: Here, wish: dict[str, int], size: tuple[int, int]
) -> None:
    answer = await here.app.generate(EDGE_PROMPT, routing=LOCAL, preview=True, **wish)
    assert answer.result is not None
    assert (answer.result.image.width, answer.result.image.height) == answer.picture.size == size


async def test_a_size_that_there_is_not_is_refused_naming_those_there_are(here: Here) -> None:
    answer = await here.app.generate(EDGE_PROMPT, width=96, height=96)
    assert answer.code == "INVALID_ARGUMENT"
    assert "no images of 96x96 pixels; it makes 64x64, 96x64, 64x96" in answer.message


async def test_the_sizes_are_listed_the_default_first(here: Here) -> None:
    edge, cloud = (await here.app.stub.ListModels(edge_pb2.ListModelsRequest(), timeout=30)).models
    assert [(size.width, size.height) for size in edge.sizes] == [(64, 64), (96, 64), (64, 96)]
    assert not cloud.sizes


async def test_other_sizes_leave_the_calibration_valid_and_come_from_the_cloud_too(
    here: Here, cloud: ScriptedCloud
) -> None:
    answer = await here.app.generate(CLOUD_PROMPT, height=96)
    assert (answer.reason, answer.served_by, answer.picture.size) == ("pareto_cloud", "cloud", (64, 96))
    assert (cloud.received[-1].image.width, cloud.received[-1].image.height) == (64, 96)


async def test_a_size_that_the_cloud_does_not_make_is_asked_for_once_a_minute(
    here: Here, cloud: ScriptedCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing of the cloud's state, and holds back no image of another size."""
    monkeypatch.setattr(cloud, "sizes", ((64, 64),))
    before, money = len(cloud.received), await here.app.budget()
    answers = [await here.app.generate(CLOUD_PROMPT, width=96) for _ in range(2)]
    assert [answer.reason for answer in answers] == ["pareto_cloud", "cloud_unavailable"]
    assert {answer.served_by for answer in answers} == {"edge"}
    assert all(answer.picture.size == (96, 64) for answer in answers)
    assert answers[0].result is not None and "not of that size" in answers[0].result.fallback_error
    assert len(cloud.received) == before + 1
    assert await here.app.budget() == money
    assert not (await here.app.status()).advice
    assert (await here.app.generate(CLOUD_PROMPT)).served_by == "cloud"


async def test_a_cloud_that_does_not_make_the_default_size_is_told_of_in_the_status(
    here: Here, cloud: ScriptedCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "sizes", ((96, 64),))
    assert (await here.app.generate(CLOUD_PROMPT)).served_by == "edge"
    (advice,) = (await here.app.status()).advice
    assert "not of that size" in advice
