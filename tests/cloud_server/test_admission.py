"""Admission serves in order, never more than one at a time, and keeps its word about places."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from cloud_server.admission import Admission
from cloud_server.errors import DeadlineTooShort, QueueFull


async def test_places_are_served_in_order_and_one_at_a_time() -> None:
    admission = Admission(max_queue=9)
    served: list[int] = []
    at_once = 0

    async def request(number: int) -> None:
        nonlocal at_once
        async with admission.enter("t", "small", 1, None) as ticket:
            await ticket.turn.wait()
            at_once += 1
            assert (at_once, ticket.position) == (1, number)
            served.append(number)
            await asyncio.sleep(0)
            at_once -= 1

    await asyncio.gather(*(request(number) for number in range(10)))
    assert served == list(range(10))
    assert admission.waiting == 0


async def test_who_leaves_the_queue_makes_room_and_lets_the_others_move_up() -> None:
    admission = Admission(max_queue=2)
    async with admission.enter("t", "small", 1, None) as first:
        async with admission.enter("t", "small", 1, None), admission.enter("t", "small", 1, None) as third:
            with pytest.raises(QueueFull) as refusal:
                await admission.enter("t", "small", 1, None).__aenter__()
            assert refusal.value.retry_after_s
        async with admission.enter("t", "small", 1, None) as later:
            assert (later.position, admission.waiting) == (1, 1)
            assert first.turn.is_set()
            assert not later.turn.is_set()
            assert not third.turn.is_set()


async def test_the_estimate_counts_all_steps_of_known_pace_that_are_left() -> None:
    admission = Admission(max_queue=9)
    async with admission.enter("t", "large", 100, 0.001):
        pass  # nothing is known yet, so nothing is refused
    admission.record("large", step_s=2.0)
    async with admission.enter("t", "large", 5, None) as running, admission.enter("t", "small", 100, None):
        running.steps_left = 3
        with pytest.raises(DeadlineTooShort, match=r"10\.0 s or more, with 2 requests before it"):
            await admission.enter("t", "large", 2, 9.9).__aenter__()
        async with admission.enter("t", "large", 2, 10.1) as third:
            assert third.position == 2


async def test_the_pace_follows_the_machine() -> None:
    admission = Admission(max_queue=0)
    for step_s in [4.0] + [1.0] * 20:
        admission.record("large", step_s)
    async with admission.enter("t", "large", 1, 1.1):
        pass


async def test_a_full_queue_says_when_the_running_image_should_be_done() -> None:
    admission = Admission(max_queue=0)
    admission.record("large", step_s=2.0)
    async with admission.enter("t", "large", 5, None) as running:
        running.steps_left = 4
        with pytest.raises(QueueFull) as refusal:
            await admission.enter("t", "large", 1, None).__aenter__()
    assert refusal.value.retry_after_s == 8.0


async def test_a_pace_learnt_while_the_machine_slept_does_not_turn_callers_away_for_good() -> None:
    admission = Admission(max_queue=9)
    admission.record("large", step_s=1_000.0)

    async def let_in() -> bool:
        try:
            async with admission.enter("t", "large", 25, 60.0):
                return True
        except DeadlineTooShort:
            return False

    async with admission.enter("t", "large", 1, None):
        assert not any([await let_in() for _ in range(40)]), "a busy server keeps its word"
    assert not await let_in()
    assert any([await let_in() for _ in range(40)])


async def test_tenants_take_turns_and_each_ones_requests_keep_their_order() -> None:
    admission = Admission(max_queue=9)
    served: list[str] = []

    async def request(tenant: str, name: str) -> None:
        async with admission.enter(tenant, "small", 1, None) as ticket:
            await ticket.turn.wait()
            served.append(name)
            await asyncio.sleep(0)

    names = [f"a{number}" for number in range(5)] + ["b0", "c0", "b1"]
    await asyncio.gather(*(request(name[0], name) for name in names))
    assert served == ["a0", "b0", "c0", "a1", "b1", "a2", "a3", "a4"]
    served.clear()
    # Whose last turn is the longest ago comes first, also after a while.
    await asyncio.gather(*(request(name[0], name) for name in ("c1", "a5", "a6", "b2", "c2")))
    assert served == ["c1", "b2", "a5", "c2", "a6"]


async def test_a_tenant_that_fills_the_queue_keeps_no_other_out() -> None:
    admission = Admission(max_queue=2)
    async with AsyncExitStack() as open_:
        for _ in range(3):
            await open_.enter_async_context(admission.enter("greedy", "small", 1, None))
        with pytest.raises(QueueFull):
            await admission.enter("greedy", "small", 1, None).__aenter__()
        other = await open_.enter_async_context(admission.enter("other", "small", 1, None))
        assert (other.position, admission.waiting) == (1, 3)
        with pytest.raises(QueueFull):
            await admission.enter("other", "small", 1, None).__aenter__()
    assert admission.waiting == 0


async def test_a_deadline_counts_who_comes_before_and_not_who_came_before() -> None:
    admission = Admission(max_queue=9)
    admission.record("large", step_s=1.0)
    async with AsyncExitStack() as open_:
        for _ in range(5):
            await open_.enter_async_context(admission.enter("greedy", "large", 10, None))
        with pytest.raises(DeadlineTooShort, match=r"12\.0 s or more, with 1 requests before it"):
            await admission.enter("other", "large", 2, 11.9).__aenter__()
        await open_.enter_async_context(admission.enter("other", "large", 2, 12.1))


async def test_where_nobody_may_wait_other_tenants_may_not_either() -> None:
    admission = Admission(max_queue=0)
    async with admission.enter("one", "small", 1, None):
        with pytest.raises(QueueFull):
            await admission.enter("other", "small", 1, None).__aenter__()
    async with admission.enter("other", "small", 1, None) as ticket:
        assert ticket.turn.is_set()


async def test_a_place_counts_the_turns_that_tenants_take() -> None:
    admission = Admission(max_queue=9)
    async with AsyncExitStack() as open_:
        tickets = [
            await open_.enter_async_context(admission.enter(tenant, "small", 1, None)) for tenant in "aaaabb"
        ]
        assert [ticket.position for ticket in tickets] == [0, 1, 2, 3, 1, 3]
