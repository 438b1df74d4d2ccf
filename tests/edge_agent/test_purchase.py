"""What the resolver may do to a reservation while others hold it, and what it can do without a cloud."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.cloud import CloudClient
from edge_agent.errors import CloudError, DuplicateRequest
from edge_agent.purchase import Purchases, purchase_id
from edge_agent.quota import Budget, Ledger
from edge_agent.request import ImageRequest
from tests.running import ScriptedCloud, scripted_cloud, until

CEILING = 10_000
DAY = (Budget("day", "day", 1_000_000),)

Begin = Callable[[str], Purchases]


@pytest.fixture
async def begin(tmp_path: Path) -> AsyncIterator[Begin]:
    """Purchases of one cloud, with a call in the ledger that an earlier run left open."""
    async with AsyncExitStack() as closing:

        def begin(address: str) -> Purchases:
            cloud = CloudClient(address)
            ledger = Ledger.open(tmp_path / "quota.sqlite3", DAY)
            ledger.reserve("left", "default", CEILING, cloud.identity)
            purchases = Purchases(ledger, cloud)
            closing.push_async_callback(purchases.close)
            return purchases

        yield begin


def request(request_id: str) -> ImageRequest:
    return ImageRequest(request_id=request_id, prompt="a cat", seed=1, width=64, height=64)


def unresolved(purchases: Purchases) -> list[str]:
    return [reservation.request_id for reservation in purchases.ledger.unresolved()]


async def test_an_id_whose_outcome_is_being_asked_for_cannot_be_reserved_anew_and_then_be_released(
    begin: Begin,
) -> None:
    answered: set[str] = set()
    async with scripted_cloud("d" * 64) as cloud:
        cloud.answerable = answered.__contains__
        purchases = begin(cloud.address)
        first = await purchases.reserve(request("again"), CEILING, 0.0)
        await purchases.start()
        await until(lambda: cloud.lookups == ["left"])  # both were open when the resolver looked
        await first.aclose()  # never sent, so it is released
        answered.add("left")
        await until(lambda: cloud.lookups == ["left", "again"])
        with pytest.raises(DuplicateRequest, match="under way"):
            await purchases.reserve(request("again"), CEILING, 60.0)
        answered.add("again")
        await until(lambda: purchases._under_way == set())
        second = await purchases.reserve(request("again"), CEILING, 60.0)
        await asyncio.sleep(0.2)
        assert unresolved(purchases) == ["again"]
        await second.aclose()


async def test_what_was_never_sent_is_released_also_while_the_cloud_is_out_of_reach(begin: Begin) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        purchases = begin(f"127.0.0.1:{closed.getsockname()[1]}")
        await purchases.reserve(request("hasty"), CEILING, 60.0)
        purchases.hand_over("hasty", sent=False)  # as when its caller goes away within the reservation
        assert unresolved(purchases) == ["left", "hasty"]
        await purchases.start()
        await until(lambda: unresolved(purchases) == ["left"])


async def test_a_call_that_was_sent_is_asked_about_also_where_an_earlier_one_of_its_id_was_not(
    begin: Begin,
) -> None:
    async with scripted_cloud("d" * 64) as cloud:
        cloud.manner = "break"  # made and charged, and the way back breaks
        purchases = begin(cloud.address)
        first = await purchases.reserve(request("again"), CEILING, 0.0)
        leaving = asyncio.create_task(first.aclose())  # never sent, so it is released
        await asyncio.sleep(0)
        leaving.cancel()  # while the release is being written
        await asyncio.gather(leaving, return_exceptions=True)
        await until(lambda: unresolved(purchases) == ["left"])
        second = await purchases.reserve(request("again"), CEILING, 60.0)
        with pytest.raises(CloudError):
            _ = [event async for event in second.images()]
        await second.aclose()
        await purchases.start()
        await until(lambda: unresolved(purchases) == [])
        assert sorted(cloud.lookups) == ["again", "left"]
        assert purchases.ledger.states()[0].spent_micro_usd == ScriptedCloud.PRICE


async def test_an_id_that_is_used_again_is_refused_by_the_name_that_its_app_gave(begin: Begin) -> None:
    purchases = begin("127.0.0.1:1")
    wish = replace(request("again"), app="kiosk")
    first = await purchases.reserve(wish, CEILING, 60.0)
    purchases.concluded(purchase_id(wish))
    with pytest.raises(DuplicateRequest, match="the request id 'again' was used before"):
        await purchases.reserve(wish, CEILING, 60.0)
    await first.aclose()


async def test_what_never_fits_and_what_a_clock_ahead_left_is_said_with_what_to_do(tmp_path: Path) -> None:
    now = 1_800_000_000.0
    budgets = (*DAY, Budget("day@kiosk", "day", CEILING - 1, "kiosk"))
    ledger = Ledger.open(tmp_path / "quota.sqlite3", budgets, clock=lambda: now)
    ledger.reserve("ahead", "default", CEILING, CloudClient("127.0.0.1:1").identity)
    purchases = Purchases(ledger, CloudClient("127.0.0.1:1"))
    (advice,) = await purchases.advice(CEILING)
    assert "'day@kiosk' is $0.009999" in advice and "--max-price" in advice
    now -= 86_400.0
    _, advice = await purchases.advice(CEILING)
    assert "1 cloud calls" in advice and "2027-01-15" in advice and str(tmp_path / "quota.sqlite3") in advice
    await purchases.close()


async def test_a_reservation_that_the_cloud_cannot_answer_for_does_not_hold_up_those_after_it(
    begin: Begin,
) -> None:
    def answerable(request_id: str) -> bool:
        if request_id == "left":
            raise ValueError(request_id)  # as where what the cloud has noted of it is damaged
        return True

    async with scripted_cloud("d" * 64) as cloud:
        cloud.answerable = answerable
        purchases = begin(cloud.address)
        await purchases.reserve(request("after"), CEILING, 0.0)
        purchases.hand_over("after", sent=True)
        await purchases.start()
        await until(lambda: unresolved(purchases) == ["left"])
        assert cloud.lookups[0] == "left"
