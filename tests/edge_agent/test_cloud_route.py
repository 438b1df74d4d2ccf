"""What becomes of a prompt that is worth the cloud, and of the money, however the cloud behaves.

A real daemon on a real socket, and a cloud server that misbehaves as each test tells it to.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import ErrorInfo

from edge_agent import agent, purchase, service
from edge_agent.budget import Budget
from edge_agent.bundle import Bundle
from edge_agent.errors import CloudUnavailable
from edge_agent.quota import Ledger
from edge_agent.recent import Recent
from edge_agent.request import ImageRequest, Routing
from routet2i.cloud.v1 import cloud_pb2
from routet2i.edge.v1 import edge_pb2
from routet2i.image.v1 import image_pb2
from tests.edge_agent.test_cloud import Cloud, abort, accepted, chunks, png, result, stall
from tests.running import (
    CLOUD,
    CLOUD_PROMPT,
    EDGE_PROMPT,
    LOCAL,
    PREVIEWS,
    App,
    Here,
    ScriptedCloud,
    counted,
    daemon_here,
    scripted_cloud,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CEILING = 10_000  # micro-dollars: the default of --max-price


@pytest.fixture(scope="module")
def digest(routed_bundle: Path) -> str:
    """Of the cloud model that the bundle was calibrated for."""
    calibration = Bundle.open(routed_bundle).calibration
    assert calibration is not None
    return calibration.cloud_digest


@dataclass
class Both:
    cloud: ScriptedCloud
    here: Here

    @property
    def app(self) -> App:
        return self.here.app


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(
    tmp_path_factory: pytest.TempPathFactory, routed_bundle: Path, digest: str
) -> AsyncIterator[Both]:
    async with scripted_cloud(digest) as cloud:
        state = tmp_path_factory.mktemp("state")
        how = {"cloud": cloud.address, "budget": "1000", "cloud_timeout_s": "10"}
        async with daemon_here(routed_bundle, state, **how) as here:
            yield Both(cloud, here)


@pytest_asyncio.fixture(loop_scope="module")
async def both(shared: Both, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Both]:
    """The module's daemon and cloud, honest again, with all money resolved."""
    monkeypatch.setattr(purchase, "FIRST_RETRY_S", 0.1)
    shared.cloud.manner = "honest"
    for past in (shared.cloud.received, shared.cloud.metadata, shared.cloud.lookups):
        past.clear()
    yield shared
    shared.cloud.manner = "honest"
    await shared.here.restless()
    await until(lambda: nothing_reserved(shared.app))


async def nothing_reserved(app: App) -> bool:
    return (await app.budget())[1] == 0


async def test_images_are_paid_for_and_come_also_where_no_further_thread_is_to_be_had(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    await both.app.generate()  # so that the models are loaded
    spent, _ = await both.app.budget()
    monkeypatch.setattr(threading.Thread, "start", start)
    answers = await asyncio.gather(*(both.app.generate(CLOUD_PROMPT, routing=CLOUD) for _ in range(30)))
    assert [answer.code for answer in answers] == ["OK"] * 30
    assert await both.app.budget() == (spent + 30 * ScriptedCloud.PRICE, 0)


async def test_a_prompt_worth_it_comes_from_the_cloud_and_is_charged_once(both: Both, digest: str) -> None:
    spent, _ = await both.app.budget()
    answer = await both.app.generate(CLOUD_PROMPT, seed=9, traceparent=TRACE, request_id="worth-it")
    assert (answer.route, answer.reason, answer.served_by) == ("cloud", "pareto_cloud", "cloud")
    assert answer.result.cost_micro_usd == ScriptedCloud.PRICE
    assert await both.app.budget() == (spent + ScriptedCloud.PRICE, 0)
    assert answer.result.image.model_digest == answer.result.cloud_model_digest == digest
    (received,) = both.cloud.received
    wish = received.image
    assert (wish.prompt, wish.seed, wish.width, wish.height) == (CLOUD_PROMPT, 9, 64, 64)
    assert (wish.traceparent, wish.max_price_micro_usd) == (TRACE, CEILING)
    assert not wish.HasField("steps") and not wish.HasField("guidance_scale")  # the cloud model's own
    text = answer.picture.text
    assert (text["route"], text["reason"], text["model_digest"]) == ("cloud", "pareto_cloud", digest)
    assert len(answer.progress) == 3
    assert answer.result.queue_position == 2
    timings_ms = {timing.stage: timing.milliseconds for timing in answer.result.timings}
    assert timings_ms["cloud_generate"] == 12.5 and timings_ms["total"] >= timings_ms["cloud"]


async def test_the_decision_counts_its_own_reservation(both: Both) -> None:
    answer = await both.app.generate(CLOUD_PROMPT)
    (budget,) = answer.decision.quota
    assert budget.reserved_micro_usd == CEILING
    timings_ms = {timing.stage: timing.milliseconds for timing in answer.decision.timings}
    whole_ms = timings_ms.pop("total")
    assert "reserve" in timings_ms and whole_ms == pytest.approx(sum(timings_ms.values()))


async def test_the_line_of_a_call_says_what_it_cost_and_which_line_of_the_clouds_log_is_its(
    both: Both, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edge_agent")
    answers = []
    for manner in ("honest", "lie"):
        both.cloud.manner = manner
        answers.append(await both.app.generate(CLOUD_PROMPT, request_id=manner, traceparent=TRACE))

    def lines() -> list[dict[str, Any]]:
        calls = (record.__dict__["fields"] for record in caplog.records if record.getMessage() == "call")
        return [fields for fields in calls if fields["rpc"] == "Generate"]

    await until(lambda: len(lines()) == 2)  # they are written once the caller has its answer
    for line, answer, received in zip(lines(), answers, both.cloud.received, strict=True):
        assert line["purchase"] == received.image.request_id != line["request_id"]
        assert (line["traceparent"], line["served_by"]) == (TRACE, answer.served_by)
        assert line["cost_micro_usd"] == answer.result.cost_micro_usd
        assert line["day_left_micro_usd"] == answer.decision.quota[0].remaining_micro_usd
        assert line.get("fallback_error", "") == answer.result.fallback_error
        assert line["elapsed_ms"] >= line["total_ms"] - 0.1  # both are rounded


async def test_the_status_counts_who_made_the_images_and_how_often_the_edge_stepped_in(both: Both) -> None:
    before = await both.app.status()
    assert (await both.app.generate(CLOUD_PROMPT)).served_by == "cloud"
    both.cloud.manner = "lie"
    assert (await both.app.generate(CLOUD_PROMPT)).served_by == "edge"
    assert (await both.app.generate(CLOUD_PROMPT, routing=CLOUD)).code == "UNAVAILABLE"
    after = await both.app.status()
    assert after.served_by_cloud - before.served_by_cloud == 1
    assert after.served_by_edge - before.served_by_edge == 1
    assert after.fallbacks - before.fallbacks == 1


@pytest.mark.parametrize(
    ("left_s", "own_s", "routing", "given_s"),
    [
        (8.0, 1.0, Routing.AUTO, 6.0),  # twice what the edge would take is left to it
        (8.0, 3.0, Routing.AUTO, 4.0),
        (8.0, 0.1, Routing.AUTO, 7.2),
        (8.0, 3.0, Routing.CLOUD_ONLY, 8.0),  # it makes none
        (100.0, 1.0, Routing.AUTO, 10.0),  # by --cloud-timeout-s
        (100.0, 1.0, Routing.CLOUD_ONLY, 10.0),
    ],
)
async def test_the_cloud_gets_of_a_deadline_what_the_edge_does_not_need(
    both: Both,
    monkeypatch: pytest.MonkeyPatch,
    left_s: float,
    own_s: float,
    routing: Routing,
    given_s: float,
) -> None:
    straight = both.here.daemon.agent
    assert straight is not None
    monkeypatch.setattr(straight.device, "expected_s", lambda *_: own_s)
    monkeypatch.setattr(agent, "time", SimpleNamespace(monotonic=lambda: 100.0))
    request = ImageRequest("r-1", CLOUD_PROMPT, width=64, height=64, routing=routing, deadline=100.0 + left_s)
    assert straight._cloud_timeout_s(request) == pytest.approx(given_s)


async def test_the_pixels_are_the_clouds_and_large_images_come_in_small_chunks(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CHUNK_BYTES", 5_000)
    answer = await both.app.generate(CLOUD_PROMPT, seed=4)
    expected = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(answer.picture), expected)
    assert {len(chunk.data) for chunk in answer.chunks[:-1]} == {5_000}
    assert [chunk.offset for chunk in answer.chunks] == list(
        np.cumsum([0] + [len(chunk.data) for chunk in answer.chunks[:-1]])
    )


async def test_the_cloud_ends_the_call_for_an_image_unless_it_stays(both: Both) -> None:
    before = both.cloud.cancelled
    for manner, cancelled in (("linger", 0), ("stay", 1)):
        both.cloud.manner = manner
        assert (await both.app.generate(CLOUD_PROMPT)).served_by == "cloud"
        await asyncio.sleep(0.5)  # longer than it lingers
        assert both.cloud.cancelled - before == cancelled


async def test_route_answers_and_reserves_sends_and_draws_nothing(both: Both) -> None:
    before, connections = await both.app.budget(), both.cloud.connections
    decision = await both.app.route(CLOUD_PROMPT)
    assert decision.reason == edge_pb2.DECISION_REASON_PARETO_CLOUD
    assert decision.quota[0].reserved_micro_usd == 0
    assert await both.app.budget() == before
    assert both.cloud.connections == connections


@pytest.mark.parametrize("how", [{"routing": LOCAL}, {"privacy": image_pb2.PRIVACY_LOCAL_ONLY}])
async def test_what_is_local_only_never_leaves(both: Both, how: dict[str, int]) -> None:
    answer = await both.app.generate(CLOUD_PROMPT, **how)
    assert (answer.reason, answer.served_by) == ("local_only", "edge")
    assert both.cloud.received == []


async def test_who_asks_for_the_cloud_gets_it_for_any_prompt(both: Both) -> None:
    """And is none of the prompts of which the routing rate is a share."""
    straight = both.here.daemon.agent
    assert straight is not None and straight.reader.recent is not None
    before = len(straight.reader.recent._scores)
    answer = await both.app.generate(EDGE_PROMPT, routing=CLOUD)
    assert (answer.reason, answer.served_by) == ("cloud_only", "cloud")
    assert len(straight.reader.recent._scores) == before
    await both.app.generate(EDGE_PROMPT)
    assert len(straight.reader.recent._scores) == before + 1


@pytest.mark.parametrize(
    ("manner", "words", "charged"),
    [
        ("refuse", "too dear", 0),
        ("break", "broke", ScriptedCloud.PRICE),
        ("lie", "sha256", ScriptedCloud.PRICE),
        ("text", "not a PNG", ScriptedCloud.PRICE),
        ("large", "96x96", ScriptedCloud.PRICE),
    ],
)
async def test_when_the_cloud_fails_the_edge_steps_in_and_the_ledger_learns_the_truth(
    both: Both, manner: str, words: str, charged: int
) -> None:
    spent, _ = await both.app.budget()
    both.cloud.manner = manner
    answer = await both.app.generate(CLOUD_PROMPT, seed=2, preview=True)
    assert (answer.route, answer.reason, answer.served_by) == ("cloud", "pareto_cloud", "edge")
    assert answer.result.fallback and words in answer.result.fallback_error
    assert (answer.result.cost_micro_usd, answer.picture.size) == (0, (64, 64))
    assert answer.progress[-1].step == answer.progress[-1].steps
    assert answer.order.count("decision") == 1
    await until(lambda: nothing_reserved(both.app))
    assert await both.app.budget() == (spent + charged, 0)
    # A refusal is known to have cost nothing; for the rest, the cloud is asked, and before that whether it has an image
    # that broke off.
    assert len(both.cloud.lookups) == {"refuse": 0, "break": 2}.get(manner, 1)


async def test_what_a_failed_call_cost_is_known_before_the_edges_image_is_done(both: Both) -> None:
    both.cloud.manner = "lie"
    straight = both.here.daemon.agent
    assert straight is not None
    before = straight.tally.fallbacks
    request = ImageRequest(request_id="early", app="default", prompt=CLOUD_PROMPT, steps=200)
    async with aclosing(straight.generate(request)) as events:
        async for event in events:
            assert not isinstance(event, agent.Result)
            if straight.tally.fallbacks > before:
                break
        await until(lambda: nothing_reserved(both.app))


@pytest.mark.parametrize(
    ("manner", "code"),
    [("refuse", "FAILED_PRECONDITION"), ("break", "UNAVAILABLE"), ("lie", "UNAVAILABLE")],
)
async def test_who_asked_for_the_cloud_alone_gets_its_error(both: Both, manner: str, code: str) -> None:
    both.cloud.manner = manner
    answer = await both.app.generate(CLOUD_PROMPT, routing=CLOUD)
    assert (answer.code, answer.result) == (code, None)


@pytest.mark.parametrize("ceiling", [None, ScriptedCloud.PRICE])
async def test_the_status_tells_of_a_cloud_that_refuses_until_an_image_comes_from_it(
    both: Both, ceiling: int | None
) -> None:
    """Whatever the caller would have paid: that it is too little, the refusal would say."""
    both.cloud.manner = "refuse"
    await both.app.generate(CLOUD_PROMPT, max_price_micro_usd=ceiling)
    status = await both.app.status()
    assert status.cloud_health == edge_pb2.CLOUD_HEALTH_UNREACHABLE
    (advice,) = status.advice
    assert "too dear" in advice and "--max-price" in advice
    both.cloud.manner = "lie"  # which shows that it is there
    await both.app.generate(CLOUD_PROMPT)
    status = await both.app.status()
    assert status.cloud_health == edge_pb2.CLOUD_HEALTH_HEALTHY and "sha256" in status.advice[0]
    both.cloud.manner = "honest"
    await both.app.generate(CLOUD_PROMPT)
    status = await both.app.status()
    assert status.cloud_health == edge_pb2.CLOUD_HEALTH_HEALTHY and not status.advice


async def test_a_slow_cloud_leaves_the_edge_time_within_the_deadline(both: Both) -> None:
    both.cloud.manner = "hang"
    answer = await both.app.generate(CLOUD_PROMPT, timeout=4.0)
    assert (answer.code, answer.served_by) == ("OK", "edge")
    assert "not done within" in answer.result.fallback_error
    await until(lambda: both.cloud.cancelled)


async def test_a_caller_who_goes_away_stops_the_cloud_and_what_was_spent_is_found_out(both: Both) -> None:
    spent, _ = await both.app.budget()
    both.cloud.manner, cancelled = "hang", both.cloud.cancelled
    call = both.app.call(CLOUD_PROMPT)
    await both.app.read(call, until="progress")
    call.cancel()
    await until(lambda: both.cloud.cancelled == cancelled + 1)
    await until(lambda: nothing_reserved(both.app))
    assert await both.app.budget() == (spent, 0)


async def test_callers_who_go_away_at_any_moment_leave_no_reservation(both: Both) -> None:
    spent, _ = await both.app.budget()
    charged = sum(both.cloud.charged.values())
    calls = []
    for number in range(12):
        calls.append(both.app.call(CLOUD_PROMPT, request_id=f"hasty-{number}"))
        reading = asyncio.create_task(both.app.read(calls[-1]))
        await asyncio.sleep(0.004 * number)
        calls[-1].cancel()
        await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: nothing_reserved(both.app))
    assert await both.app.budget() == (spent + sum(both.cloud.charged.values()) - charged, 0)


async def test_a_request_id_is_paid_for_once(both: Both) -> None:
    first = await both.app.generate(CLOUD_PROMPT, request_id="twice")
    spent = await both.app.budget()
    second = await both.app.generate(CLOUD_PROMPT, request_id="twice")
    assert [(answer.served_by, answer.reason) for answer in (first, second)] == [
        ("cloud", "pareto_cloud"),
        ("cloud", "already_paid"),
    ]
    assert second.result.image.seed == first.result.image.seed, "what is repeated is the same image"
    assert second.picture.tobytes() == first.picture.tobytes()
    assert (second.result.cost_micro_usd, await both.app.budget()) == (ScriptedCloud.PRICE, spent)
    once, again = (received.image for received in both.cloud.received)
    assert (once.max_price_micro_usd, again.max_price_micro_usd) == (CEILING, 0), "nothing is offered again"
    again.max_price_micro_usd = CEILING
    assert again == once
    tally = both.here.daemon.agent.tally
    tally.price_micro_usd = ScriptedCloud.PRICE - 1  # of an image since then
    assert (await both.app.generate(CLOUD_PROMPT, request_id="twice")).served_by == "cloud"
    assert tally.price_micro_usd == ScriptedCloud.PRICE - 1, "which budgets are paced by"
    both.cloud.received.clear()
    together = await asyncio.gather(
        *(both.app.generate(CLOUD_PROMPT, request_id="at-once") for _ in range(4))
    )
    assert sorted(answer.code for answer in together) == ["ALREADY_EXISTS"] * 3 + ["OK"]
    assert len(both.cloud.received) == 1


async def test_an_image_that_its_app_has_lost_comes_again_also_once_the_budget_is_used_up(
    routed_bundle: Path, digest: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"budget": "0.01"}  # for one call
    async with scripted_cloud(digest) as cloud:
        async with daemon_here(routed_bundle, tmp_path, cloud=cloud.address, **how) as here:
            cloud.manner = "break"  # when it was made
            assert (await here.app.generate(CLOUD_PROMPT, request_id="lost")).result.fallback
            await until(lambda: nothing_reserved(here.app))
        cloud.manner = "honest"
        async with daemon_here(routed_bundle, tmp_path, cloud=cloud.address, **how) as here:  # started anew
            assert (await here.app.generate(CLOUD_PROMPT, request_id="another")).reason == "quota_exhausted"
            assert (await here.app.status()).cloud_health == edge_pb2.CLOUD_HEALTH_UNTRIED
            for routing in (edge_pb2.ROUTING_AUTO, CLOUD):
                answer = await here.app.generate(CLOUD_PROMPT, request_id="lost", routing=routing)
                assert (answer.served_by, answer.reason) == ("cloud", "already_paid")
            assert (await here.app.status()).cloud_health == edge_pb2.CLOUD_HEALTH_HEALTHY
            answer = await here.app.generate(CLOUD_PROMPT, request_id="lost", routing=LOCAL)
            assert (answer.served_by, answer.reason) == ("edge", "local_only")
            here.daemon._purchases.cloud.record.leave_alone(60.0)
            answer = await here.app.generate(CLOUD_PROMPT, request_id="lost")
            assert (answer.served_by, answer.reason) == ("edge", "cloud_unavailable")
            assert await here.app.budget() == (ScriptedCloud.PRICE, 0)


async def test_a_budget_of_nothing_keeps_also_what_was_paid_for_from_the_cloud(
    routed_bundle: Path, digest: str, tmp_path: Path
) -> None:
    wish = {"request_id": "paid"}
    async with scripted_cloud(digest) as cloud:
        async with daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here:
            assert (await here.app.generate(CLOUD_PROMPT, **wish)).served_by == "cloud"
        for budget, reason in (("1,0@default", "quota_exhausted"), ("1,0@other", "already_paid")):
            cloud.received.clear()
            async with daemon_here(routed_bundle, tmp_path, cloud=cloud.address, budget=budget) as here:
                assert (await here.app.generate(CLOUD_PROMPT, **wish)).reason == reason
                assert bool(cloud.received) is (reason == "already_paid")


@pytest.mark.parametrize(
    ("refusal", "why"),
    [
        (
            abort(grpc.StatusCode.ALREADY_EXISTS, "which is no longer kept", detail=ErrorInfo()),
            "no longer kept",
        ),
        (
            abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "too dear",
                detail=ErrorInfo(reason="PRICE_ABOVE_CEILING", metadata={"price_micro_usd": "5000"}),
            ),
            "its journal deleted",  # it would make the image, and charge for it, a second time
        ),
    ],
)
async def test_where_the_image_that_was_paid_for_is_gone_the_edge_makes_one(
    refusal: Any, why: str, routed_bundle: Path, digest: str, tmp_path: Path
) -> None:
    def honest(request: cloud_pb2.GenerateRequest) -> list[Any]:
        wish = request.image
        image = png(wish.width, wish.height)
        facts: dict[str, Any] = {"request_id": wish.request_id, "seed": wish.seed, "side": wish.width}
        return [
            accepted(CEILING, digest),
            *chunks(image),
            result(image, charged=CEILING, digest=digest, **facts),
        ]

    async with (
        counted(Cloud(honest)) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        wish = {"request_id": "gone"}
        assert (await here.app.generate(CLOUD_PROMPT, **wish)).served_by == "cloud"
        cloud.script = [refusal]
        answer = await here.app.generate(CLOUD_PROMPT, **wish)
        assert (answer.served_by, answer.reason) == ("edge", "already_paid")
        assert why in answer.result.fallback_error
        answer = await here.app.generate(CLOUD_PROMPT, routing=CLOUD, **wish)
        assert answer.code == "ALREADY_EXISTS" and why in answer.message
        status = await here.app.status()
        assert status.cloud_health == edge_pb2.CLOUD_HEALTH_HEALTHY and not any(
            "cloud" in a for a in status.advice
        )
        assert await here.app.budget() == (CEILING, 0)


async def test_an_image_that_is_sent_again_says_nothing_of_the_model_that_the_cloud_has_now(
    routed_bundle: Path, digest: str, tmp_path: Path
) -> None:
    async with (
        scripted_cloud("ab" * 32) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        for cloud.digest, request_id in (("ab" * 32, "old"), (digest, "new"), ("ab" * 32, "old")):
            answer = await here.app.generate(routing=CLOUD, request_id=request_id)
            assert answer.result.cloud_model_digest == cloud.digest
        assert (answer.reason, (await here.app.status()).calibrated) == ("already_paid", True)


async def test_what_was_paid_for_counts_once_among_the_prompts_that_alpha_follows(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[float] = []
    monkeypatch.setattr(Recent, "add", lambda _, prs: learnt.append(prs))
    for reason in ("pareto_cloud", "already_paid", "already_paid"):
        assert (await both.app.generate(CLOUD_PROMPT, request_id="counted")).reason == reason
    assert len(learnt) == 1
    await both.app.generate(CLOUD_PROMPT, request_id="counted-too")
    assert len(learnt) == 2


async def test_a_cloud_that_refuses_for_now_to_send_an_image_again_costs_nobody_its_id(both: Both) -> None:
    """As where its operator has mistaken a token: the image is still there, and a new id would be paid for."""
    assert (await both.app.generate(CLOUD_PROMPT, request_id="kept")).served_by == "cloud"
    both.cloud.manner = "refuse"
    answer = await both.app.generate(CLOUD_PROMPT, routing=CLOUD, request_id="kept")
    assert (answer.reason, answer.code) == ("already_paid", "FAILED_PRECONDITION")
    assert "use a new one" not in answer.message
    (advice,) = (await both.app.status()).advice
    assert "too dear" in advice and "--cloud-token" in advice
    both.cloud.manner = "honest"
    answer = await both.app.generate(CLOUD_PROMPT, routing=CLOUD, request_id="kept")
    assert (answer.reason, answer.served_by) == ("already_paid", "cloud")


async def test_an_id_that_was_paid_for_is_not_another_prompts(both: Both) -> None:
    assert (await both.app.generate(CLOUD_PROMPT, request_id="taken")).served_by == "cloud"
    both.cloud.received.clear()
    answer = await both.app.generate(f"{CLOUD_PROMPT} ", request_id="taken")
    assert answer.code == "ALREADY_EXISTS" and "use a new one" in answer.message
    assert (await both.app.generate(EDGE_PROMPT, request_id="taken")).reason == "pareto_edge"
    assert both.cloud.received == [], "neither was sent there"


async def test_two_apps_may_choose_the_same_id(both: Both) -> None:
    answers = [await both.app.generate(CLOUD_PROMPT, request_id="one", app=app) for app in ("a", "b")]
    assert [answer.served_by for answer in answers] == ["cloud", "cloud"]
    assert [answer.result.request_id for answer in answers] == ["one", "one"]
    assert len({received.image.request_id for received in both.cloud.received}) == 2


async def test_a_callers_own_ceiling_is_what_is_offered_to_the_cloud(both: Both) -> None:
    await both.app.generate(CLOUD_PROMPT, max_price_micro_usd=7_000)
    await both.app.generate(CLOUD_PROMPT, max_price_micro_usd=7_000_000)
    offered = [received.image.max_price_micro_usd for received in both.cloud.received]
    assert offered == [7_000, CEILING]


async def test_32_at_once_against_a_budget_for_5(routed_bundle: Path, digest: str, tmp_path: Path) -> None:
    async with (
        scripted_cloud(digest) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address, budget="0.05") as here,
    ):
        cloud.PRICE = CEILING
        answers = await asyncio.gather(*(here.app.generate(CLOUD_PROMPT) for _ in range(32)))
        by_cloud = [answer for answer in answers if answer.served_by == "cloud"]
        by_edge = [answer for answer in answers if answer.served_by == "edge"]
        assert (len(by_cloud), len(by_edge)) == (5, 27)
        assert {answer.reason for answer in by_cloud} == {"pareto_cloud"}
        assert {answer.reason for answer in by_edge} == {"quota_exhausted"}
        assert sum(cloud.charged.values()) == 5 * CEILING
        assert await here.app.budget() == (5 * CEILING, 0)
        assert all(answer.picture.size == (64, 64) for answer in answers)
        refused = await here.app.generate(CLOUD_PROMPT, routing=CLOUD)
        assert refused.code == "RESOURCE_EXHAUSTED"
        assert refused.details["QuotaFailure"].violations[0].subject == "day"
        assert (await here.app.route(CLOUD_PROMPT)).reason == edge_pb2.DECISION_REASON_QUOTA_EXHAUSTED


async def test_no_app_takes_up_more_connections_to_the_cloud_than_there_may_be(
    routed_bundle: Path, digest: str, tmp_path: Path
) -> None:
    """However little its calls may cost: beyond some number of them no file is left to the daemon for other apps."""
    async with (
        scripted_cloud(digest) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address, budget="1000") as here,
    ):
        cloud.manner = "hang"
        calls = [here.app.call(CLOUD_PROMPT, routing=CLOUD) for _ in range(purchase.MOST_UNDER_WAY)]
        await until(lambda: len(cloud.received) == len(calls))
        refused = await here.app.generate(CLOUD_PROMPT, routing=CLOUD)
        assert refused.code == "RESOURCE_EXHAUSTED"
        assert refused.details["QuotaFailure"].violations[0].subject == "calls under way"
        assert "RetryInfo" in refused.details
        answer = await here.app.generate(CLOUD_PROMPT)
        assert (answer.served_by, answer.reason) == ("edge", "quota_exhausted")
        assert (await here.app.route(CLOUD_PROMPT)).reason == edge_pb2.DECISION_REASON_QUOTA_EXHAUSTED
        cloud.manner = "honest"
        for call in calls:
            call.cancel()
        await here.restless()
        assert (await here.app.generate(CLOUD_PROMPT)).served_by == "cloud"


async def test_edge_prompts_open_no_connection(routed_bundle: Path, digest: str, tmp_path: Path) -> None:
    async with (
        scripted_cloud(digest) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        for _ in range(3):
            assert (await here.app.generate(EDGE_PROMPT)).reason == "pareto_edge"
        await here.app.generate(CLOUD_PROMPT, routing=LOCAL)
        await here.app.route(CLOUD_PROMPT)
        assert (await here.app.status()).cloud_health == edge_pb2.CLOUD_HEALTH_UNTRIED
        assert cloud.connections == 0
        assert (await here.app.generate(CLOUD_PROMPT)).served_by == "cloud"
        assert cloud.connections == 1  # which shows that the listener counts
        assert (await here.app.status()).cloud_health == edge_pb2.CLOUD_HEALTH_HEALTHY


async def test_another_cloud_model_than_the_calibrations_is_noticed(
    routed_bundle: Path, tmp_path: Path
) -> None:
    async with (
        scripted_cloud("f" * 64) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        cloud.manner = "hang"  # after it has accepted
        answer = await here.app.generate(CLOUD_PROMPT)  # until then nobody could know
        assert (answer.reason, answer.served_by, answer.result.fallback) == ("pareto_cloud", "edge", True)
        assert "runs model ffffffffffffffff, for which the calibration" in answer.result.fallback_error
        await until(lambda: not here.daemon._purchases.ledger.unresolved())
        await until(lambda: cloud.cancelled == 1)
        assert await here.app.budget() == (0, 0)
        answer = await here.app.generate(CLOUD_PROMPT)
        assert (answer.reason, answer.served_by) == ("uncalibrated", "edge")
        assert len(cloud.received) == 1
        explained = await here.app.route(CLOUD_PROMPT, explain=True)
        assert not explained.HasField("prs") and not explained.HasField("alpha")
        assert not any(token.HasField("prs_without") for token in explained.tokens)
        status = await here.app.status()
        assert not status.calibrated
        take_up = "`edge-agent models pull BUNDLE --name NEW --use`"
        (advice,) = status.advice
        assert re.search(rf"`edge-export label`.*`edge-export calibrate` for that model, .*{take_up}", advice)


@pytest.mark.parametrize("how", ["cloud_only", "asking"])
async def test_a_cloud_that_has_the_right_model_again_is_noticed(
    routed_bundle: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(agent, "ASK_AGAIN_S", 3600.0 if how == "cloud_only" else 0.0)
    async with (
        scripted_cloud("f" * 64) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        await here.app.generate(CLOUD_PROMPT)
        assert (await here.app.generate(CLOUD_PROMPT)).reason == "uncalibrated"
        await until(lambda: cloud.asked == 1)
        if how == "cloud_only":
            assert (await here.app.generate(CLOUD_PROMPT)).reason == "uncalibrated"
            assert (await here.app.generate(routing=CLOUD)).served_by == "cloud"
            assert not (await here.app.status()).calibrated
            assert cloud.asked == 1, "it was asked a moment ago"
        cloud.digest = digest
        if how == "cloud_only":
            assert (await here.app.generate(routing=CLOUD)).served_by == "cloud"
        else:
            assert (await here.app.generate(CLOUD_PROMPT)).reason == "uncalibrated"
            await until(lambda: here.daemon.agent is not None and here.daemon.agent.decider.calibrated)
        assert (await here.app.generate(CLOUD_PROMPT)).reason == "pareto_cloud"


async def test_a_cloud_that_does_not_say_which_model_it_has_changes_nothing(both: Both) -> None:
    async def refuses() -> str:
        raise CloudUnavailable("not reached", never_ran=True)

    straight = both.here.daemon.agent
    assert straight is not None
    before = straight.tally.cloud_digest
    await straight._learn_model(SimpleNamespace(model_digest=refuses))  # type: ignore[arg-type]
    assert straight.tally.cloud_digest == before


async def test_that_a_devices_prompts_are_unlike_the_calibrations_is_said_where_they_are_routed(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = both.here.daemon.agent
    assert straight is not None
    monkeypatch.setattr(Recent, "advice", "they are unlike")
    assert "they are unlike" in await straight.advice()
    monkeypatch.setattr(straight.tally, "cloud_digest", "f" * 64)
    assert "they are unlike" not in await straight.advice()


@pytest.mark.parametrize("where", ["a closed port", "a name that does not resolve"])
async def test_a_cloud_out_of_reach_is_left_alone_for_a_while_and_the_status_says_so(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        if where != "a closed port":
            address = "no-such-host.invalid:443"
        async with daemon_here(routed_bundle, tmp_path, cloud=address, cloud_connect_timeout_s="3") as here:
            first = await here.app.generate(CLOUD_PROMPT)
            assert (first.reason, first.served_by, first.result.fallback) == ("pareto_cloud", "edge", True)
            assert address in first.result.fallback_error
            assert await here.app.budget() == (0, 0)
            second = await here.app.generate(CLOUD_PROMPT)
            assert (second.reason, second.result.fallback) == ("cloud_unavailable", False)
            monkeypatch.setattr(here.daemon._purchases.cloud.record, "_retry_at", 0.0)  # the next try is due
            status = await here.app.status()
            assert status.cloud_health == edge_pb2.CLOUD_HEALTH_UNREACHABLE
            (advice,) = status.advice
            assert address in advice and "whether the cloud server runs" in advice
            assert (await here.app.generate(routing=CLOUD)).code == "UNAVAILABLE"


@pytest.mark.parametrize(("charged", "spent"), [(True, ScriptedCloud.PRICE), (False, 0)])
async def test_what_a_crash_left_is_resolved_at_the_next_start(
    routed_bundle: Path, digest: str, tmp_path: Path, charged: bool, spent: int
) -> None:
    async with scripted_cloud(digest) as cloud:
        leave_reserved(tmp_path, cloud.address)
        if charged:
            cloud.charged["left"] = ScriptedCloud.PRICE
        async with daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here:
            await until(lambda: nothing_reserved(here.app))
            assert await here.app.budget() == (spent, 0)
            assert cloud.lookups == ["left"]


async def test_a_daemon_told_to_stop_during_a_cloud_call_leaves_nothing_spent_that_was_not_charged(
    routed_bundle: Path, digest: str, tmp_path: Path
) -> None:
    async with scripted_cloud(digest) as cloud:
        cloud.manner = "hang"
        how = {"cloud": cloud.address, "grace_s": "0.2"}
        async with daemon_here(routed_bundle, tmp_path, **how) as here:
            call = here.app.call(CLOUD_PROMPT, request_id="stopped")
            assert (await here.app.read(call, until="progress")).route == "cloud"
            here.daemon.stop()
            await here.daemon.shutdown()
            answer = await here.app.read(call)
            assert answer.result is None and answer.code in ("CANCELLED", "UNAVAILABLE")
        await until(lambda: cloud.cancelled == 1)
        async with daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here:
            await until(lambda: nothing_reserved(here.app))
            assert await here.app.budget() == (0, 0)
            # The first daemon may just have asked, too.
            assert set(cloud.lookups) == {cloud.received[0].image.request_id}


async def test_without_a_cloud_what_a_crash_left_stays_spent_and_the_status_says_so(
    routed_bundle: Path, tmp_path: Path
) -> None:
    leave_reserved(tmp_path, "images.example.com:443")
    async with daemon_here(routed_bundle, tmp_path) as here:
        assert await here.app.budget() == (0, CEILING)
        status = await here.app.status()
        assert status.unresolved_reservations == 1
        assert any("images.example.com:443" in advice for advice in status.advice)


@pytest.mark.parametrize("other", ["another server", "another tenant"])
async def test_what_another_cloud_may_have_charged_stays_spent_and_the_status_names_that_cloud(
    routed_bundle: Path, digest: str, tmp_path: Path, other: str
) -> None:
    (tmp_path / "token").write_text("a-tenant-of-many\n")
    async with scripted_cloud(digest) as cloud:
        left_at = "images.example.com:443" if other == "another server" else cloud.address
        token = str(tmp_path / "token") if other == "another tenant" else ""
        leave_reserved(tmp_path, left_at)
        async with daemon_here(routed_bundle, tmp_path, cloud=cloud.address, cloud_token=token) as here:
            assert (await here.app.generate(CLOUD_PROMPT)).served_by == "cloud"
            assert cloud.metadata[0].get("authorization") == ("Bearer a-tenant-of-many" if token else None)
            assert await here.app.budget() == (ScriptedCloud.PRICE, CEILING)
            status = await here.app.status()
            assert status.unresolved_reservations == 1
            assert any(f"({left_at})" in advice for advice in status.advice)
            assert cloud.lookups == []


async def test_a_call_that_may_still_arrive_stays_spent_until_it_cannot_any_more(
    routed_bundle: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purchase, "FIRST_RETRY_S", 0.1)
    async with scripted_cloud(digest) as cloud:
        leave_reserved(tmp_path, cloud.address, timeout_s=3600.0)
        async with daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here:
            await until(lambda: len(cloud.lookups) >= 2)
            assert await here.app.budget() == (0, CEILING)
            ledger = here.daemon._purchases.ledger
            monkeypatch.setattr(ledger, "clock", lambda: time.time() + 3600.0)
            await until(lambda: not ledger.unresolved())


def leave_reserved(state: Path, cloud: str, timeout_s: float = 0.0) -> None:
    """What a daemon leaves that is killed in the middle of a call of `cloud`."""
    ledger = Ledger.open(state / "quota.sqlite3", (Budget("day", "day", 1_000_000),))
    ledger.reserve("left", "default", CEILING, cloud, timeout_s)
    ledger.close()


async def test_a_ledger_that_breaks_keeps_prompts_on_the_edge_and_is_logged_once(
    routed_bundle: Path, digest: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        scripted_cloud(digest) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        ledger = here.daemon._purchases.ledger
        with ledger._lock:  # which a look at what an earlier daemon left may hold: sqlite3 crashes without
            ledger._connection.close()
        answer = await here.app.generate(CLOUD_PROMPT)
        assert (answer.reason, answer.served_by) == ("quota_exhausted", "edge")
        assert (await here.app.route(CLOUD_PROMPT)).reason == edge_pb2.DECISION_REASON_QUOTA_EXHAUSTED
        assert (await here.app.generate(EDGE_PROMPT)).served_by == "edge"
        refused = await here.app.generate(routing=CLOUD)
        assert (refused.code, cloud.connections) == ("FAILED_PRECONDITION", 0)
        (advice,) = (await here.app.status()).advice
        assert refused.message in advice and "quota_exhausted" in advice
        assert [record.getMessage() for record in caplog.records].count("ledger") == 1


async def test_a_ledger_that_cannot_be_written_is_in_the_status_until_it_is_written_again(
    routed_bundle: Path, digest: str, tmp_path: Path
) -> None:
    async with (
        scripted_cloud(digest) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        ledger = here.daemon._purchases.ledger
        ledger._connection.execute("PRAGMA query_only = 1")
        assert (await here.app.generate(CLOUD_PROMPT)).reason == "quota_exhausted"
        (advice,) = (await here.app.status()).advice
        assert "cannot be written" in advice
        ledger._connection.execute("PRAGMA query_only = 0")
        (advice,) = (await here.app.status()).advice  # reading it says nothing of writing
        assert (await here.app.generate(CLOUD_PROMPT)).served_by == "cloud"
        assert not (await here.app.status()).advice


async def say_nothing(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """On a connection that stays open: from Python 3.13 on, one whose writer nobody holds is closed."""
    await asyncio.sleep(3600)


async def test_a_caller_who_leaves_before_the_connection_stands_locks_no_money(
    routed_bundle: Path, tmp_path: Path
) -> None:
    """Nothing was sent, so there is nothing to be asked about: also while the cloud stays away."""
    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with daemon_here(routed_bundle, tmp_path, cloud=address) as here:
        call = here.app.call(CLOUD_PROMPT)
        await call.read()  # the decision
        assert await here.app.budget() == (0, CEILING)
        call.cancel()
        await until(lambda: not here.daemon._purchases.ledger.unresolved())
        assert await here.app.budget() == (0, 0)
    silent.close()


async def test_the_log_says_once_that_the_cloud_fails_and_once_that_it_delivers_again(
    both: Both, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "edge_agent"):
        for manner in ("lie", "text", "refuse", "refuse", "honest", "honest", "lie", "honest"):
            both.cloud.manner = manner
            await both.app.generate(CLOUD_PROMPT, routing=CLOUD)
    told = [record for record in caplog.records if record.getMessage().startswith("cloud ")]
    assert [record.getMessage() for record in told] == [
        *("cloud failing", "cloud failing", "cloud delivers again"),  # refused is another cause
        *("cloud failing", "cloud delivers again"),
    ]
    assert [record.levelname for record in told[1:3]] == ["WARNING", "INFO"]
    fields = told[1].__dict__["fields"]
    assert "too dear" in fields["error"] and "--max-price" in fields["check"]


async def test_a_callers_own_haste_says_nothing_of_the_cloud(routed_bundle: Path, tmp_path: Path) -> None:
    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with daemon_here(routed_bundle, tmp_path, cloud=address) as here:
        assert (await here.app.generate(CLOUD_PROMPT, timeout=1.0)).result.fallback
        status = await here.app.status()
        assert status.cloud_health == edge_pb2.CLOUD_HEALTH_UNTRIED and not status.advice
    silent.close()


async def test_a_cloud_that_has_too_little_time_is_reached_and_may_have_too_much_to_do(
    routed_bundle: Path, tmp_path: Path
) -> None:
    late = abort(grpc.StatusCode.DEADLINE_EXCEEDED, "it would take 90 s")
    async with (
        counted(Cloud([late])) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        for script in ([late], [accepted(CEILING), stall]):
            cloud.script = script
            assert (await here.app.generate(CLOUD_PROMPT, timeout=3)).result.fallback
            status = await here.app.status()
            assert status.cloud_health != edge_pb2.CLOUD_HEALTH_UNREACHABLE
            advice = "\n".join(status.advice)
            assert "whether more is asked of it than it can do" in advice and "--cloud-ca" not in advice


@pytest.mark.parametrize(("price", "own"), [(CEILING, True), (CEILING + 1, False)])
async def test_a_price_that_only_the_caller_does_not_pay_says_nothing_of_the_cloud(
    routed_bundle: Path, tmp_path: Path, price: int, own: bool
) -> None:
    refusal = ErrorInfo(reason="PRICE_ABOVE_CEILING", metadata={"price_micro_usd": str(price)})
    async with (
        counted(Cloud([abort(grpc.StatusCode.FAILED_PRECONDITION, "too dear", detail=refusal)])) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        assert (await here.app.generate(CLOUD_PROMPT, max_price_micro_usd=7_000)).result.fallback
        status = await here.app.status()
        assert (status.cloud_health == edge_pb2.CLOUD_HEALTH_UNTRIED) is own
        assert (not status.advice) is own


async def test_a_cloud_that_wants_to_be_left_alone_for_ever_spoils_no_answer_and_no_line_of_the_log(
    routed_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edge_agent")
    never = abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "never again", retry_after_s=2**63 - 1)
    async with (
        counted(Cloud([never])) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        answer = await here.app.generate(routing=CLOUD)
        assert (answer.code, answer.details["RetryInfo"].retry_delay.ToSeconds()) == ("UNAVAILABLE", 60)

        def outcomes() -> list[str]:
            calls = [record for record in caplog.records if record.getMessage() == "call"]
            return [call.__dict__["fields"]["outcome"] for call in calls]

        await until(outcomes)  # the line is written once the caller has its answer
        assert outcomes() == ["UNAVAILABLE"]


async def test_a_failure_of_the_cloud_keeps_nothing_of_the_call_that_failed(
    routed_bundle: Path, digest: str, tmp_path: Path
) -> None:
    """Its error's traceback would, up to the models, also once others have succeeded them."""
    async with (
        scripted_cloud(digest) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        cloud.manner = "lie"
        assert (await here.app.generate(CLOUD_PROMPT)).result.fallback
        former = weakref.ref(here.daemon.agent)
        await here.daemon.reload()

        def gone() -> bool:
            gc.collect()
            return former() is None

        await until(gone)
        assert "sha256" in (await here.app.status()).advice[0]


async def test_a_caller_who_leaves_while_the_account_is_read_locks_no_money(
    routed_bundle: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read anew once the money is set aside, and then nothing is sent."""
    async with (
        scripted_cloud(digest) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        ledger, go_on = here.daemon._purchases.ledger, threading.Event()
        states = ledger.states
        asked = 0

        def slow(app: str | None) -> Any:
            nonlocal asked
            asked += 1
            if asked == 2:
                assert go_on.wait(60)
            return states(app)

        monkeypatch.setattr(ledger, "states", slow)
        monkeypatch.setattr(Ledger, "at_hand", False)  # as where a window has just begun
        call = here.app.call(CLOUD_PROMPT)
        await until(lambda: asked == 2)
        assert len(ledger.unresolved()) == 1
        call.cancel()
        await until(lambda: not ledger.unresolved())
        go_on.set()
        assert (await here.app.budget(), cloud.connections) == ((0, 0), 0)


async def test_a_call_whose_money_is_set_aside_does_not_wait_for_prompts_to_be_read(both: Both) -> None:
    straight, go_on = both.here.daemon.agent, threading.Event()
    assert straight is not None
    assert (await both.app.generate(CLOUD_PROMPT)).served_by == "cloud"
    straight._reading_ms = 0.0  # the next one is read at once
    straight._reading.submit(go_on.wait, 60)
    answer = await both.app.generate(CLOUD_PROMPT)
    assert answer.served_by == "cloud" and not go_on.is_set()
    go_on.set()


async def test_one_call_finds_out_whether_the_cloud_is_back_and_the_others_stay_on_the_edge(
    routed_bundle: Path, tmp_path: Path
) -> None:
    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with daemon_here(routed_bundle, tmp_path, cloud=address, cloud_connect_timeout_s="1") as here:
        cloud = here.daemon._purchases.cloud
        assert cloud is not None
        assert (await here.app.generate(CLOUD_PROMPT)).result.fallback
        await until(lambda: cloud.record.healthy)  # the time it was left alone is over
        answers = await asyncio.gather(*(here.app.generate(CLOUD_PROMPT) for _ in range(6)))
        assert sorted(answer.reason for answer in answers) == ["cloud_unavailable"] * 5 + ["pareto_cloud"]
        assert (await here.app.budget())[1] == 0
    silent.close()


async def test_what_was_never_sent_is_given_back_once(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time is a write to the disk."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with daemon_here(routed_bundle, tmp_path, cloud=address) as here:
            ledger, released = here.daemon._purchases.ledger, list[str]()
            release = ledger.release
            monkeypatch.setattr(ledger, "release", lambda key: (released.append(key), release(key)))
            assert (await here.app.generate(CLOUD_PROMPT)).result.fallback
            assert (len(released), await here.app.budget()) == (1, (0, 0))


async def test_an_image_that_cost_nothing_was_made_all_the_same(
    routed_bundle: Path, digest: str, tmp_path: Path
) -> None:
    """So its id is used up, and it counts in the rates."""

    class Free(ScriptedCloud):
        PRICE = 0

    async with (
        counted(Free(digest)) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address, rate="1/3600") as here,
    ):
        cloud.manner = "lie"
        assert (await here.app.generate(CLOUD_PROMPT, request_id="free")).result.fallback
        await until(lambda: not here.daemon._purchases.ledger.unresolved())
        cloud.manner = "honest"
        assert (await here.app.generate(CLOUD_PROMPT, request_id="free")).reason == "already_paid"
        assert (await here.app.generate(CLOUD_PROMPT)).reason == "quota_exhausted"


async def test_an_image_that_a_safety_checker_withheld_costs_nothing_and_says_nothing_of_the_cloud(
    routed_bundle: Path, digest: str, tmp_path: Path
) -> None:
    why = ErrorInfo(reason="IMAGE_WITHHELD")
    withheld = abort(grpc.StatusCode.FAILED_PRECONDITION, "the safety checker withheld it", detail=why)
    async with (
        counted(Cloud([accepted(CEILING, digest), withheld])) as cloud,
        daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here,
    ):
        answer = await here.app.generate(CLOUD_PROMPT)
        assert answer.served_by == "edge" and "safety checker" in answer.result.fallback_error
        assert await here.app.budget() == (0, 0)
        assert not (await here.app.status()).advice
        assert (await here.app.generate(routing=CLOUD)).code == "FAILED_PRECONDITION"


async def test_a_stalled_connection_to_the_cloud_ends_at_the_connection_timeout(
    routed_bundle: Path, tmp_path: Path
) -> None:
    """Something that accepts and never speaks, as a stopped process does."""
    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with daemon_here(routed_bundle, tmp_path, cloud=address, cloud_connect_timeout_s="1") as here:
        cloud = here.daemon._purchases.cloud
        assert cloud is not None and cloud._connect_timeout_s == 1.0
        answer = await here.app.generate(CLOUD_PROMPT)
        assert (answer.served_by, answer.result.fallback) == ("edge", True)
        assert await here.app.budget() == (0, 0)
    silent.close()


async def test_a_caller_who_reads_nothing_is_dropped_and_holds_up_no_shutdown(
    routed_bundle: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "STALLED_READER_S", 0.5)
    async with scripted_cloud(digest) as cloud:
        cloud.manner = "flood"
        async with daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here:
            call = here.app.call(CLOUD_PROMPT, preview=True)
            await call.read()
            # Though the status waits behind what is unread, the call is over.
            await until(lambda: not here.daemon._service.in_flight, timeout_s=10)
            assert not call.done()
            call.cancel()


async def test_a_caller_who_reads_slowly_does_not_hold_up_the_image_that_is_paid_for(
    routed_bundle: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "STALLED_READER_S", 600.0)  # however busy the machine is, it is only slow
    async with scripted_cloud(digest) as cloud:
        cloud.manner = "previews"
        async with daemon_here(routed_bundle, tmp_path, cloud=cloud.address) as here:
            call = here.app.call(CLOUD_PROMPT, preview=True)
            await here.app.read(call, until="decision")
            await until(lambda: cloud.charged)
            answer = await here.app.read(call)
            assert answer.picture and answer.served_by == "cloud"
            assert len(answer.progress) < PREVIEWS  # the newest is news enough
