"""What the resolver may do to a reservation while others hold it, and what it can do without a cloud."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from edge_agent import purchase as purchase_module
from edge_agent.budget import Budget
from edge_agent.cloud import CloudClient, Outcome
from edge_agent.cloud_image import CloudImage
from edge_agent.errors import CloudError, DuplicateRequest, LedgerError, QuotaExhausted
from edge_agent.purchase import Purchase, Purchases, _asked
from edge_agent.quota import Ledger, Reservation
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


def reserve(purchases: Purchases, wish: ImageRequest) -> None:
    """As an earlier run of the daemon did."""
    key, cloud = purchases.key(wish), purchases.cloud.identity
    purchases.ledger.reserve(key, wish.app, CEILING, cloud, asked=_asked(wish))


def unresolved(purchases: Purchases) -> list[str]:
    return [reservation.request_id for reservation in purchases.ledger.unresolved()]


async def test_a_call_that_ends_while_another_is_asked_about_is_not_asked_about(begin: Begin) -> None:
    """It was open when the resolver looked."""
    answered: set[str] = set()
    async with scripted_cloud("d" * 64) as cloud:
        cloud.answerable = answered.__contains__
        purchases = begin(cloud.address)
        key = purchases.key(request("quick"))
        await purchases.reserve(request("quick"), CEILING, 60.0)
        await purchases.start()
        await until(lambda: cloud.lookups == ["left"])
        assert await purchases.settle(key, 1)
        purchases.concluded(key)
        later = purchases.key(request("later"))
        await purchases.reserve(request("later"), CEILING, 0.0)
        purchases.hand_over(later, sent=True)
        answered.update(("left", later))
        await until(lambda: unresolved(purchases) == [])
        assert cloud.lookups == ["left", later]


async def test_a_purchase_that_cannot_be_settled_is_in_the_log_beside_the_ledgers_own_line(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    async with scripted_cloud("d" * 64) as cloud:
        purchases = begin(cloud.address)
        purchases.ledger._connection.execute("PRAGMA query_only = 1")
        assert not await purchases.settle("left", 1)
    assert [record.getMessage() for record in caplog.records] == ["ledger", "unresolved"]


async def test_an_id_whose_outcome_is_being_asked_for_cannot_be_reserved_anew_and_then_be_released(
    begin: Begin,
) -> None:
    answered: set[str] = set()
    async with scripted_cloud("d" * 64) as cloud:
        cloud.answerable = answered.__contains__
        purchases = begin(cloud.address)
        key = purchases.key(request("again"))
        await purchases.reserve(request("again"), CEILING, 0.0)
        await purchases.start()
        await until(lambda: cloud.lookups == ["left"])  # both were open when the resolver looked
        purchases.hand_over(key, sent=True)
        answered.add("left")
        await until(lambda: cloud.lookups == ["left", key])
        with pytest.raises(DuplicateRequest, match="under way") as duplicate:
            await purchases.reserve(request("again"), CEILING, 60.0)
        assert duplicate.value.retry_after_s, "it may be free again in a moment"
        answered.add(key)
        await until(lambda: purchases._under_way == set())
        second = await purchases.reserve(request("again"), CEILING, 60.0)
        await asyncio.sleep(0.2)
        assert unresolved(purchases) == [key]
        await second.aclose()


async def test_what_was_never_sent_is_released_also_while_the_cloud_is_out_of_reach(begin: Begin) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        purchases = begin(f"127.0.0.1:{closed.getsockname()[1]}")
        await purchases.reserve(request("hasty"), CEILING, 60.0)
        key = purchases.key(request("hasty"))
        purchases.hand_over(key, sent=False)  # as when its caller goes away within the reservation
        assert unresolved(purchases) == ["left", key]
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
        await until(lambda: unresolved(purchases) == ["left"] and not purchases._unsent)
        second = await purchases.reserve(request("again"), CEILING, 60.0)
        with pytest.raises(CloudError):
            _ = [event async for event in second.images()]
        await second.aclose()
        await purchases.start()
        await until(lambda: unresolved(purchases) == [])
        # Asked about twice: when its image broke off, and by the resolver.
        assert sorted(cloud.lookups) == sorted([*[purchases.key(request("again"))] * 2, "left"])
        assert purchases.ledger.states()[0].spent_micro_usd == ScriptedCloud.PRICE


async def test_what_is_handed_over_is_asked_about_at_once_and_the_others_not_with_it(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.purchase.FIRST_RETRY_S", 3600.0)
    loop, timers = asyncio.get_running_loop(), list[asyncio.TimerHandle]()
    call_at = loop.call_at

    def noted(when: float, callback: Any, *arguments: Any, **named: Any) -> asyncio.TimerHandle:
        timer = call_at(when, callback, *arguments, **named)
        if "_resolve" in callback.__qualname__:
            timers.append(timer)
        return timer

    monkeypatch.setattr(loop, "call_at", noted)
    async with scripted_cloud("d" * 64) as cloud:
        purchases = begin(cloud.address)
        await purchases.start()
        keys = [await left_open(purchases, f"r-{number}", cloud) for number in range(6)]
        assert [cloud.lookups.count(key) for key in keys] == [1] * 6
        purchases.hand_over(keys[0], sent=True)  # as where its caller has tried again
        await until(lambda: cloud.lookups.count(keys[0]) == 2)
        await until(lambda: sum(not timer.cancelled() for timer in timers) == 1)  # each doubles the pause


async def test_what_waits_to_be_asked_about_again_is_not_put_off_by_what_is_handed_over_meanwhile(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.purchase.FIRST_RETRY_S", 1.0)
    async with scripted_cloud("d" * 64) as cloud:
        purchases = begin(cloud.address)
        await purchases.start()
        key = await left_open(purchases, "again", cloud)

        def asked_again() -> bool:  # looked at much more often than once a second
            purchases.hand_over("nobody", sent=True)
            return cloud.lookups.count(key) == 2

        await until(asked_again)


async def left_open(purchases: Purchases, request_id: str, cloud: ScriptedCloud) -> str:
    """The key of a call that may still arrive for an hour, and that the cloud has been asked about once."""
    key = purchases.key(request(request_id))
    await purchases.reserve(request(request_id), CEILING, 3600.0)
    purchases.hand_over(key, sent=True)
    await until(lambda: key in cloud.lookups)
    return key


async def test_a_caller_who_leaves_within_the_reservation_gets_the_money_back_and_nobody_is_asked(
    tmp_path: Path,
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class SlowLedger(Ledger):
        def reserve(self, *arguments: Any, **named: Any) -> None:
            begun.set()
            assert go_on.wait(60)
            super().reserve(*arguments, **named)

    async with scripted_cloud("d" * 64) as cloud:
        ledger = SlowLedger.open(tmp_path / "quota.sqlite3", DAY)
        purchases = Purchases(ledger, CloudClient(cloud.address))
        await purchases.start()
        leaving = asyncio.create_task(purchases.reserve(request("hasty"), CEILING, 60.0))
        assert await asyncio.to_thread(begun.wait, 60)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        with pytest.raises(DuplicateRequest, match="under way"):  # the money is still being set aside
            await purchases.reserve(request("hasty"), CEILING, 60.0)
        assert ledger.states()[0].remaining_micro_usd == DAY[0].cap_micro_usd
        go_on.set()
        await until(lambda: not (purchases._under_way or purchases._unsent or ledger.unresolved()))
        assert cloud.connections == 0
        second = await purchases.reserve(request("hasty"), CEILING, 60.0)
        assert unresolved(purchases) == [purchases.key(request("hasty"))]
        await second.aclose()
        await purchases.close()


@pytest.mark.parametrize("error", [LedgerError("the disk is failing"), MemoryError()])
@pytest.mark.parametrize("written", [True, False])
async def test_a_reservation_that_fails_is_not_under_way_and_what_it_set_aside_is_looked_for(
    tmp_path: Path, error: Exception, written: bool
) -> None:
    faults = [error]

    class FaultyLedger(Ledger):
        def reserve(self, *arguments: Any, **named: Any) -> None:
            if written or not faults:
                super().reserve(*arguments, **named)
            if faults:
                raise faults.pop()

    async with scripted_cloud("d" * 64) as cloud:
        ledger = FaultyLedger.open(tmp_path / "quota.sqlite3", DAY)
        purchases = Purchases(ledger, CloudClient(cloud.address))
        await purchases.start()
        with pytest.raises(type(error)):
            await purchases.reserve(request("again"), CEILING, 0.0)
        await until(lambda: not ledger.unresolved() and not purchases._under_way)
        assert cloud.lookups == [purchases.key(request("again"))] * written
        second = await purchases.reserve(request("again"), CEILING, 0.0)
        await second.aclose()
        await purchases.close()


async def test_an_id_that_is_used_again_is_refused_by_the_name_that_its_app_gave(begin: Begin) -> None:
    purchases = begin("127.0.0.1:1")
    wish = request("again")._replace(app="kiosk")
    first = await purchases.reserve(wish, CEILING, 60.0)
    purchases.concluded(purchases.key(wish))
    with pytest.raises(
        DuplicateRequest, match=r"'again' was used before, .* not known yet: repeat it in"
    ) as duplicate:
        await purchases.reserve(wish, CEILING, 60.0)
    assert duplicate.value.retry_after_s
    other = Purchases(purchases.ledger, CloudClient("127.0.0.1:2"))  # which can never tell
    with pytest.raises(
        DuplicateRequest, match="'again' was used before; use a new one for a new image"
    ) as duplicate:
        await other.reserve(wish, CEILING, 60.0)
    assert duplicate.value.retry_after_s is None
    await first.aclose()


async def test_who_repeats_a_call_while_it_is_being_settled_is_told_to_come_back(begin: Begin) -> None:
    """With a new id, as without it, the image would be paid for twice."""
    purchases = begin("127.0.0.1:1")
    key = purchases.key(request("again"))
    reserve(purchases, request("again"))
    assert await purchases.redeliver(request("again"), 1.0) is None
    purchases.ledger.settle(key, 1)  # between the two
    with pytest.raises(DuplicateRequest, match="repeat it in a moment") as duplicate:
        await purchases.reserve(request("again"), CEILING, 1.0)
    assert duplicate.value.retry_after_s
    again = await purchases.redeliver(request("again"), 1.0)
    assert again is not None
    await again.aclose()


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a dog"},
        {"negative_prompt": "a dog"},
        {"seed": 2},
        {"width": 32},
        {"steps": 3},
        {"guidance_scale": 2.0},
    ],
)
async def test_another_request_under_an_id_that_was_paid_for_is_told_to_take_its_own(
    begin: Begin, change: dict[str, Any]
) -> None:
    purchases, wish = begin("127.0.0.1:1"), request("again")
    reserve(purchases, wish)
    purchases.ledger.settle(purchases.key(wish), 1)
    other = wish._replace(**change)
    assert await purchases.redeliver(other, 1.0) is None
    with pytest.raises(DuplicateRequest, match="use a new one") as duplicate:
        await purchases.reserve(other, CEILING, 1.0)
    assert duplicate.value.retry_after_s is None, "to repeat it would never help"


@pytest.mark.parametrize("manner", ["honest", "drop", "break", "hang", "lie"])
async def test_whatever_becomes_of_an_image_that_is_sent_again_the_money_stays_as_it_was(
    begin: Begin, manner: str
) -> None:
    async with scripted_cloud("d" * 64) as cloud:
        purchases = begin(cloud.address)
        key = purchases.key(request("again"))
        reserve(purchases, request("again"))
        assert await purchases.redeliver(request("again"), 1.0) is None, (
            "it is not known yet whether it is paid"
        )
        purchases.ledger.settle(key, cloud.PRICE)
        cloud.manner = manner
        for timeout_s in (1.0, 0.0):
            purchase = await purchases.redeliver(request("again"), timeout_s)
            assert purchase is not None
            assert await purchases.redeliver(request("again"), 1.0) is None, "one at a time"
            with suppress(CloudError):
                async with aclosing(purchase), aclosing(purchase.images()) as events:
                    kinds = [type(event) async for event in events]
                    assert manner == "honest" and timeout_s and CloudImage in kinds
            assert purchases._under_way == set() and unresolved(purchases) == ["left"]
            assert purchases.ledger.charged(key, cloud.address, _asked(request("again"))) == cloud.PRICE
        assert purchases._arrived_by == {}, "which only what is open needs"


async def test_an_image_that_is_sent_again_takes_a_place_among_the_calls_under_way(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    purchases = begin("127.0.0.1:1")
    reserve(purchases, request("again"))
    purchases.ledger.settle(purchases.key(request("again")), 1)
    monkeypatch.setattr(purchase_module, "MOST_UNDER_WAY", 1)
    other = await purchases.reserve(request("other"), CEILING, 60.0)
    assert await purchases.redeliver(request("again"), 1.0) is None
    await other.aclose()
    again = await purchases.redeliver(request("again"), 1.0)
    assert again is not None and purchases.full
    await again.aclose()


async def test_who_reads_slowly_takes_no_place_and_gives_none_away(begin: Begin) -> None:
    async with scripted_cloud("d" * 64) as cloud:
        purchases = begin(cloud.address)
        slow = [await purchases.reserve(request("again"), CEILING, 5.0)]
        for _ in range(2):
            assert slow[-1] is not None
            async with aclosing(slow[-1].images()) as events:
                assert CloudImage in [type(event) async for event in events]
            assert purchases._under_way == set()
            slow.append(await purchases.redeliver(request("again"), 5.0))
        for purchase in slow[:-1]:
            await purchase.aclose()
        assert purchases._under_way == {purchases.key(request("again"))}, "the last one's"
        await slow[-1].aclose()
        assert purchases._under_way == set()


async def test_what_an_image_has_cost_is_not_taken_for_what_the_next_one_costs(begin: Begin) -> None:
    async with scripted_cloud("d" * 64) as cloud:
        purchases = begin(cloud.address)
        reserve(purchases, request("again"))
        purchases.ledger.settle(purchases.key(request("again")), cloud.PRICE)
        record = purchases.cloud.record
        record.told_price(cloud.PRICE - 1)  # it has become cheaper, with a model that makes other sizes
        record.refused_size((64, 64))
        purchase = await purchases.redeliver(request("again"), 5.0)
        async with aclosing(purchase), aclosing(purchase.images()) as events:
            assert CloudImage in [type(event) async for event in events]
        assert record.affordable(cloud.PRICE - 1) and not record.affordable(cloud.PRICE - 2)
        assert not record.makes((64, 64))


async def test_the_names_of_apps_and_their_ids_do_not_run_together(begin: Begin) -> None:
    purchases = begin("127.0.0.1:1")
    names = [("kiosk", "1-a"), ("kiosk1", "-a"), ("desk", "1-a")]
    keys = {purchases.key(request(request_id)._replace(app=app)) for app, request_id in names}
    assert len(keys) == len(names)


async def test_what_the_budget_refuses_is_not_under_way(tmp_path: Path) -> None:
    """Else those that were refused would fill all places in time."""
    ledger = Ledger.open(tmp_path / "quota.sqlite3", (Budget("day", "day", CEILING),))
    purchases = Purchases(ledger, CloudClient("127.0.0.1:1"))
    first = await purchases.reserve(request("first"), CEILING, 60.0)
    assert purchases.cloud is not None
    purchases.cloud.record._failures = 1  # so that the next call finds out whether it is back
    for _ in range(2):
        with pytest.raises(QuotaExhausted, match="'day'"):
            await purchases.reserve(request("again"), CEILING, 60.0)
        assert purchases.cloud.record.healthy
    await first.aclose()
    second = await purchases.reserve(request("again"), CEILING, 60.0)
    await second.aclose()
    await purchases.close()


async def test_a_call_has_the_time_that_its_reservation_left(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not outlast what the resolver waits for."""
    given: list[float] = []

    async def generate(_request: Any, _ceiling: Any, timeout_s: float, _goes_out: Any) -> AsyncIterator[Any]:
        given.append(timeout_s)
        for nothing in ():
            yield nothing

    purchases = begin("127.0.0.1:1")
    monkeypatch.setattr(purchases.cloud, "generate", generate)
    async with aclosing(await purchases.reserve(request("late"), CEILING, 60.0)) as purchase:
        await asyncio.sleep(0.2)
        assert [event async for event in purchase.images()] == []
    assert given[0] <= 59.8


async def test_who_takes_no_more_of_an_image_ends_the_call_for_it(begin: Begin) -> None:
    async def look_in() -> None:
        purchase = await purchases.reserve(request("enough"), CEILING, 600.0)
        async with aclosing(purchase), aclosing(purchase.images()) as events:
            await anext(events)

    async with scripted_cloud("d" * 64) as cloud:
        cloud.manner = "hang"
        purchases = begin(cloud.address)
        await asyncio.wait_for(look_in(), 30.0)
        await until(lambda: cloud.cancelled == 1)


async def test_an_image_that_came_holds_no_place_however_slowly_it_is_read(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.purchase.MOST_UNDER_WAY", 1)
    async with scripted_cloud("d" * 64) as cloud:
        purchases = begin(cloud.address)
        first = await purchases.reserve(request("first"), CEILING, 60.0)
        with pytest.raises(QuotaExhausted, match="1 cloud calls are under way"):
            await purchases.reserve(request("second"), CEILING, 60.0)
        async with aclosing(first), aclosing(first.images()) as events:
            async for event in events:
                if isinstance(event, CloudImage):  # which nobody takes further
                    second = await purchases.reserve(request("second"), CEILING, 60.0)
                    await second.aclose()


async def test_nothing_is_kept_of_calls_that_have_come_to_their_end(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon runs for months."""
    monkeypatch.setattr("edge_agent.purchase.FIRST_RETRY_S", 0.01)
    failures = [CloudError("refused for now", never_ran=False)]
    async with scripted_cloud("d" * 64) as cloud:
        purchases = begin(cloud.address)
        assert purchases.cloud is not None
        lookup = purchases.cloud.lookup

        async def once_refused(key: str) -> Outcome:
            if failures:
                raise failures.pop()
            return await lookup(key)

        monkeypatch.setattr(purchases.cloud, "lookup", once_refused)
        async with aclosing(await purchases.reserve(request("made"), CEILING, 60.0)) as made:
            _ = [event async for event in made.images()]
        await (await purchases.reserve(request("never sent"), CEILING, 60.0)).aclose()
        await purchases.reserve(request("left to the resolver"), CEILING, 60.0)
        purchases.hand_over(purchases.key(request("left to the resolver")), sent=False)
        await purchases.start()
        await until(lambda: unresolved(purchases) == [])
        kept = (
            purchases._arrived_by,
            purchases._unsent,
            purchases._asked,
            purchases._told,
            purchases._under_way,
        )
        await until(lambda: not any(kept))


async def test_what_never_fits_and_what_a_clock_ahead_left_is_said_with_what_to_do(tmp_path: Path) -> None:
    now = 1_800_000_000.0
    budgets = (*DAY, Budget("day@kiosk", "day", CEILING - 1, "kiosk"), Budget("hour", "hour", CEILING))
    ledger = Ledger.open(tmp_path / "quota.sqlite3", budgets, clock=lambda: now)
    ledger.reserve("ahead", "default", CEILING, CloudClient("127.0.0.1:1").identity)
    purchases = Purchases(ledger, CloudClient("127.0.0.1:1"))
    (advice,) = await purchases.advice(CEILING)
    assert "'day@kiosk' is $0.009999" in advice and "--max-price" in advice
    now -= 86_400.0
    _, advice = await purchases.advice(CEILING)
    assert "1 cloud calls" in advice and "2027-01-15" in advice
    assert f"{tmp_path / 'quota.sqlite3'} away, with the -wal beside it" in advice
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
        purchases.hand_over(purchases.key(request("after")), sent=True)
        await purchases.start()
        await until(lambda: unresolved(purchases) == ["left"])
        assert cloud.lookups[0] == "left"


async def test_a_cloud_out_of_reach_is_asked_about_one_call_and_less_and_less_often(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.purchase.FIRST_RETRY_S", 1e4)
    monkeypatch.setattr("edge_agent.purchase.LONGEST_RETRY_S", 6e4)
    loop = asyncio.get_running_loop()
    call_at = loop.call_at
    asked: list[str] = []
    pauses: list[float] = []
    out_of_reach = [True] * 6 + [False] * 2 + [True]

    def sooner(when: float, callback: Any, *arguments: Any, **named: Any) -> Any:
        if "_resolve" not in callback.__qualname__:
            return call_at(when, callback, *arguments, **named)
        pauses.append(when - loop.time())
        return loop.call_soon(callback) if len(pauses) <= 6 else call_at(when, callback)

    async def lookup(key: str) -> Outcome:
        asked.append(key)
        if out_of_reach.pop(0):
            raise CloudError("nobody answers", never_ran=True)
        return Outcome(known=True, arrived=True, charged_micro_usd=0)

    purchases = begin("127.0.0.1:1")
    monkeypatch.setattr(purchases.cloud, "lookup", lookup)
    monkeypatch.setattr(loop, "call_at", sooner)

    async def leave_open(request_id: str) -> str:
        await purchases.reserve(request(request_id), CEILING, 0.0)
        purchases.hand_over(purchases.key(request(request_id)), sent=True)
        return purchases.key(request(request_id))

    after = await leave_open("after")
    await purchases.start()
    await until(lambda: unresolved(purchases) == [])
    assert asked == ["left"] * 7 + [after]
    next_ = await leave_open("next")
    await until(lambda: len(pauses) == 7)
    assert asked[8:] == [next_]
    assert pauses == pytest.approx([1e4, 2e4, 4e4, 6e4, 6e4, 6e4, 1e4], rel=0.01)


async def test_the_log_says_once_that_a_call_is_not_resolved(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked about for as long as the daemon runs."""
    monkeypatch.setattr("edge_agent.purchase.FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("edge_agent.purchase.LONGEST_RETRY_S", 0.01)
    purchases, asked = begin("127.0.0.1:1"), 0

    async def lookup(_key: str) -> Outcome:
        nonlocal asked
        asked += 1
        raise CloudError("refused for now" if asked < 4 else "refused for good", never_ran=False)

    monkeypatch.setattr(purchases.cloud, "lookup", lookup)
    await purchases.start()
    await until(lambda: asked >= 8)
    errors = [
        record.__dict__["fields"]["error"] for record in caplog.records if record.message == "unresolved"
    ]
    assert errors == ["refused for now", "refused for good"]


async def test_what_still_runs_in_the_cloud_stays_reserved_until_it_has_ended(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.purchase.FIRST_RETRY_S", 0.01)
    purchases, spent = begin("127.0.0.1:1"), list[int]()
    outcomes = [Outcome(False, True, None)] * 2 + [Outcome(True, True, ScriptedCloud.PRICE)]

    async def lookup(_key: str) -> Outcome:
        (day,) = purchases.ledger.states()
        spent.append(day.spent_micro_usd + day.reserved_micro_usd)
        return outcomes[len(spent) - 1]

    monkeypatch.setattr(purchases.cloud, "lookup", lookup)
    await purchases.start()
    await until(lambda: unresolved(purchases) == [])
    assert spent == [CEILING] * 3
    assert purchases.ledger.states()[0].spent_micro_usd == ScriptedCloud.PRICE


async def test_a_bug_in_asking_after_one_call_does_not_end_the_search(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    bugs = [KeyError("a bug")]
    async with scripted_cloud("d" * 64) as cloud:
        purchases = begin(cloud.address)
        assert purchases.cloud is not None
        lookup = purchases.cloud.lookup

        async def faulty(key: str) -> Outcome:
            if bugs:
                raise bugs.pop()
            return await lookup(key)

        monkeypatch.setattr(purchases.cloud, "lookup", faulty)
        await purchases.start()
        await until(lambda: unresolved(purchases) == [], timeout_s=20.0)
        assert (bugs, cloud.lookups) == ([], ["left"])


async def test_a_retry_under_the_same_id_does_not_make_the_resolver_forget_the_first_call(
    tmp_path: Path,
) -> None:
    written = threading.Event()

    class SlowLedger(Ledger):
        def reserve(self, *arguments: Any, **named: Any) -> Reservation:
            written.wait(30)  # as on a disk that is slow
            return super().reserve(*arguments, **named)

    async with scripted_cloud("d" * 64) as cloud:
        ledger = SlowLedger.open(tmp_path / "quota.sqlite3", DAY)
        purchases = Purchases(ledger, CloudClient(cloud.address))
        key = purchases.key(request("again"))
        Ledger.reserve(ledger, key, "default", CEILING, cloud.address)
        retry = asyncio.create_task(purchases.reserve(request("again"), CEILING, 60.0))
        await until(lambda: key in purchases._under_way)
        await purchases.start()
        await until(lambda: not purchases._wake.is_set())
        await asyncio.sleep(0.2)  # the resolver has looked, and passed over what is under way
        assert cloud.lookups == []
        written.set()
        with pytest.raises(DuplicateRequest, match="used before"):
            await retry
        await until(lambda: unresolved(purchases) == [])
        assert cloud.lookups == [key]
        await purchases.close()


async def test_devices_that_share_a_cloud_do_not_answer_for_each_others_ids(tmp_path: Path) -> None:
    async with scripted_cloud("d" * 64) as cloud:
        keys = []
        for device in ("one", "two", "one"):
            ledger = Ledger.open(tmp_path / device / "quota.sqlite3", DAY)
            purchases = Purchases(ledger, CloudClient(cloud.address))
            keys.append(purchases.key(request("frame-0")))
            if len(keys) < 3:
                purchase = await purchases.reserve(request("frame-0"), CEILING, 60.0)
                _ = [event async for event in purchase.images()]
                await purchase.aclose()
            assert purchases.ledger.states()[0].spent_micro_usd == ScriptedCloud.PRICE
            await purchases.close()
        assert keys[0] == keys[2] != keys[1], "a device keeps its own"
        assert set(cloud.charged) == set(keys)


async def test_what_was_reserved_anew_since_the_resolver_looked_is_not_judged_by_what_it_was(
    begin: Begin,
) -> None:
    answered: set[str] = set()
    async with scripted_cloud("d" * 64) as cloud:
        cloud.answerable = lambda asked: asked in answered or asked == key
        purchases = begin(cloud.address)
        key = purchases.key(request("again"))
        first = await purchases.reserve(request("again"), CEILING, 0.0)
        await purchases.start()
        await until(lambda: cloud.lookups == ["left"])  # both were open when the resolver looked
        await first.aclose()  # never sent, so it is released
        cloud.manner = "drop"
        await broken(await purchases.reserve(request("again"), CEILING, 60.0), cloud)
        answered.add("left")
        await until(lambda: key in cloud.lookups)
        await asyncio.sleep(0.2)
        assert unresolved(purchases) == [key], "for another minute it may still arrive"


async def test_a_clock_set_ahead_does_not_end_the_wait_for_a_call_that_may_still_arrive(
    tmp_path: Path,
) -> None:
    now = 1_800_000_000.0
    async with scripted_cloud("d" * 64) as cloud:
        purchases = await broken_off(tmp_path, cloud, "drop", lambda: now, timeout_s=60.0)
        now += 3_600.0
        await purchases.start()
        await until(lambda: len(cloud.lookups) == 2)
        assert len(unresolved(purchases)) == 1
        await purchases.close()


@pytest.mark.parametrize("restarted", [True, False])
async def test_a_clock_that_was_ahead_does_not_keep_what_the_cloud_never_heard_of_open_until_then(
    tmp_path: Path, restarted: bool
) -> None:
    now = 1_800_000_000.0
    async with scripted_cloud("d" * 64) as cloud:
        purchases = await broken_off(tmp_path, cloud, "drop", lambda: now, timeout_s=1.0)
        if restarted:
            await purchases.close()
            ledger = Ledger.open(tmp_path / "quota.sqlite3", DAY, clock=lambda: now)
            purchases = Purchases(ledger, CloudClient(cloud.address))
        now -= 86_400.0
        await purchases.start()
        await until(lambda: not unresolved(purchases))
        await purchases.close()


async def test_a_call_that_was_accepted_is_not_released_by_a_server_that_never_heard_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the second one behind a balancer has not, which keeps a journal of its own."""
    now = 1_800_000_000.0
    async with scripted_cloud("d" * 64) as cloud:
        purchases = await broken_off(tmp_path, cloud, "break", lambda: now, timeout_s=1.0)
        key = purchases.key(request("again"))
        now += 60.0
        await asyncio.sleep(1.0)  # by either clock it would have arrived by now
        await purchases.start()
        await until(lambda: len(cloud.lookups) == 2)
        await until(lambda: purchases._under_way == set())
        assert unresolved(purchases) == [key]
        assert "more than one cloud server" in caplog.records[-1].__dict__["fields"]["error"]
        cloud.charged[key] = ScriptedCloud.PRICE  # the first one answers again
        await until(lambda: unresolved(purchases) == [])
        assert purchases.ledger.states()[0].spent_micro_usd == ScriptedCloud.PRICE
        await purchases.close()


async def broken_off(
    folder: Path, cloud: ScriptedCloud, manner: str, clock: Callable[[], float], *, timeout_s: float
) -> Purchases:
    """With a ledger by `clock`, and one call that the cloud has broken off in this manner."""
    cloud.manner = manner
    purchases = Purchases(Ledger.open(folder / "quota.sqlite3", DAY, clock=clock), CloudClient(cloud.address))
    await broken(await purchases.reserve(request("again"), CEILING, timeout_s), cloud)
    return purchases


async def broken(purchase: Purchase, cloud: ScriptedCloud) -> None:
    """Sent, broken off, and forgotten by the cloud."""
    with pytest.raises(CloudError):
        _ = [event async for event in purchase.images()]
    cloud.received.clear()
    cloud.charged.clear()
    await purchase.aclose()
