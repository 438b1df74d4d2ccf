"""Admission serves in order, never more than one at a time, and keeps its word about places."""

from __future__ import annotations

import asyncio

import pytest

from cloud_server.admission import Admission
from cloud_server.errors import DeadlineTooShort, QueueFull


async def test_places_are_served_in_order_and_one_at_a_time() -> None:
    admission = Admission(max_queue=9)
    served: list[int] = []
    at_once = 0

    async def request(number: int) -> None:
        nonlocal at_once
        async with admission.enter("small", 1, None) as ticket:
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
    async with admission.enter("small", 1, None) as first:
        async with admission.enter("small", 1, None), admission.enter("small", 1, None) as third:
            with pytest.raises(QueueFull) as refusal:
                await admission.enter("small", 1, None).__aenter__()
            assert refusal.value.retry_after_s
        async with admission.enter("small", 1, None) as later:
            assert (later.position, admission.waiting) == (1, 1)
            assert first.turn.is_set()
            assert not later.turn.is_set()
            assert not third.turn.is_set()


async def test_the_estimate_counts_all_steps_of_known_pace_that_are_left() -> None:
    admission = Admission(max_queue=9)
    async with admission.enter("large", 100, 0.001):
        pass  # nothing is known yet, so nothing is refused
    admission.record("large", step_s=2.0)
    async with admission.enter("large", 5, None) as running, admission.enter("small", 100, None):
        running.steps_left = 3
        with pytest.raises(DeadlineTooShort, match=r"10\.0 s or more, with 2 requests before it"):
            await admission.enter("large", 2, 9.9).__aenter__()
        async with admission.enter("large", 2, 10.1) as third:
            assert third.position == 2


async def test_the_pace_follows_the_machine() -> None:
    admission = Admission(max_queue=0)
    for step_s in [4.0] + [1.0] * 20:
        admission.record("large", step_s)
    async with admission.enter("large", 1, 1.1):
        pass


async def test_a_full_queue_says_when_the_running_image_should_be_done() -> None:
    admission = Admission(max_queue=0)
    admission.record("large", step_s=2.0)
    async with admission.enter("large", 5, None) as running:
        running.steps_left = 4
        with pytest.raises(QueueFull) as refusal:
            await admission.enter("large", 1, None).__aenter__()
    assert refusal.value.retry_after_s == 8.0


async def test_a_pace_learnt_while_the_machine_slept_does_not_turn_callers_away_for_good() -> None:
    admission = Admission(max_queue=9)
    admission.record("large", step_s=1_000.0)

    async def let_in() -> bool:
        try:
            async with admission.enter("large", 25, 60.0):
                return True
        except DeadlineTooShort:
            return False

    async with admission.enter("large", 1, None):
        assert not any([await let_in() for _ in range(40)]), "a busy server keeps its word"
    assert not await let_in()
    assert any([await let_in() for _ in range(40)])
