"""A prompt becomes an image: two real processes, and a decision that depends on the prompt."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from edge_agent.budget import Budget
from edge_agent.bundle import Bundle
from edge_agent.money import dollars
from edge_agent.quota import Ledger
from edge_agent.reader import Reader
from tests.end_to_end.conftest import CEILING, PRICE, Gate, StartEdge, World
from tests.routed import SLOW_STEPS
from tests.running import CLOUD, ROOT, SERVICE, App, process_environment, until

# Easy and hard ones for either world, so that both sides of alpha are there.
PROMPTS = (
    "a cat",
    "a red apple",
    "the moon",
    "two dogs on the beach",
    "a red cat and two dogs on the moon",
    "one owl",
    "an apple on a beach",
    "three owls left of a tiny guitar at night",
    "four small stars above two huge cats and a guitar in the snow",
    "a tiny key right of three big apples below two owls at night",
)


DAY = (Budget("day", "day", 1_000_000),)


@pytest.fixture(scope="module")
def prompts(world: World) -> tuple[str, str]:
    """The prompt that is most the edge's, and the one that is most the cloud's."""
    reader = Reader.open(Bundle.open(world.bundle), 0.5)
    assert reader.alpha is not None, reader.advice
    scored = sorted((reader.read(prompt).prs, prompt) for prompt in PROMPTS)
    assert scored[0][0] < reader.alpha <= scored[-1][0]
    return scored[-1][1], scored[0][1]


async def test_easy_prompts_stay_and_open_no_connection_and_hard_ones_go(
    world: World, start_edge: StartEdge, gate: Gate, prompts: tuple[str, str]
) -> None:
    easy, hard = prompts
    edge = start_edge("--cloud", gate.address)
    async with grpc.aio.insecure_channel(edge.address) as channel:
        app = App(channel)
        for seed in range(3):
            answer = await app.generate(easy, seed=seed)
            assert (answer.reason, answer.served_by, answer.result.cost_micro_usd) == (
                "pareto_edge",
                "edge",
                0,
            )
            assert answer.picture.text["route"] == "edge"
        assert gate.connections == 0
        answer = await app.generate(hard, seed=1, timeout=120)
        assert (answer.reason, answer.served_by) == ("pareto_cloud", "cloud"), answer.result
        assert (answer.result.cost_micro_usd, answer.result.fallback) == (PRICE, False)
        assert answer.picture.text["route"] == "cloud"
        stages = {timing.stage for timing in answer.result.timings}
        assert stages >= {"cloud", "cloud_queue", "cloud_generate", "cloud_png", "total"}
        assert answer.picture.size == (answer.result.image.width, answer.result.image.height)
        assert await app.budget() == (PRICE, 0)
        assert gate.connections > 0
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        listed = [answer async for answer in reflection.ServerReflectionInfo(iter([request]), timeout=30)]
        assert SERVICE in {service.name for service in listed[0].list_services_response.service}
        assert await app.health() == "SERVING"
    assert edge.process.stop() == 0
    assert edge.process.wait_for_nothing_bad(), edge.process.text
    # onnxruntime's own reports, which would go out under an id that lies in the user's cache, are off in both.
    for process in (edge.process, world.cloud):
        assert not list(process.folder.rglob("*onnxruntime*"))


async def test_who_would_not_pay_the_price_does_not_ask_for_it_each_time(
    world: World, start_edge: StartEdge, gate: Gate, prompts: tuple[str, str]
) -> None:
    edge = start_edge("--cloud", gate.address)
    async with grpc.aio.insecure_channel(edge.address) as channel:
        app = App(channel)
        asked = await app.generate(prompts[1], max_price_micro_usd=PRICE - 1)
        assert (asked.reason, asked.result.fallback, gate.connections) == ("pareto_cloud", True, 1)
        assert f"it asks {dollars(PRICE)} for an image" in asked.result.fallback_error
        assert not (await app.status()).advice  # it was the caller's own price
        again = await app.generate(prompts[1], max_price_micro_usd=PRICE - 1)
        assert (again.reason, again.result.fallback, gate.connections) == ("cloud_unavailable", False, 1)
        paid = await app.generate(prompts[1], max_price_micro_usd=PRICE, timeout=120)
        assert (paid.reason, paid.served_by) == ("pareto_cloud", "cloud"), paid.result
        assert await app.budget() == (PRICE, 0)


async def test_32_prompts_at_once_against_a_budget_for_5_images(
    world: World, start_edge: StartEdge, prompts: tuple[str, str]
) -> None:
    edge = start_edge(
        "--cloud", world.cloud_address, "--budget", f"{5 * PRICE / 1e6}", "--max-price", f"{PRICE / 1e6}",
    )  # fmt: skip
    async with grpc.aio.insecure_channel(edge.address) as channel:
        app, before = App(channel), sum(call["rpc"] == "Generate" for call in world.cloud.calls)
        answers = await asyncio.gather(*(app.generate(prompts[1], timeout=150) for _ in range(32)))
        served = [(answer.served_by, answer.reason) for answer in answers]
        assert served.count(("cloud", "pareto_cloud")) == 5
        assert served.count(("edge", "quota_exhausted")) == 27
        assert await app.budget() == (5 * PRICE, 0)
    made = world.cloud.wait_for_calls(before + 5, rpc="Generate")[before:]
    assert [call.get("charged_micro_usd") for call in made] == [PRICE] * 5, "nor has the cloud charged more"


async def test_a_daemon_killed_in_the_middle_of_a_cloud_call_learns_what_it_owes(
    world: World, start_edge: StartEdge, prompts: tuple[str, str]
) -> None:
    edge = start_edge("--cloud", world.cloud_address)
    async with grpc.aio.insecure_channel(edge.address) as channel:
        app = App(channel)
        how = {"steps": SLOW_STEPS} if world.name == "miniature" else {}
        call = app.call(prompts[1], timeout=150, request_id="cut-off", **how)
        assert (await app.read(call, until="progress")).route == "cloud"
        edge.process.kill()
    left = Ledger.open(edge.process.folder / "state" / "routet2i" / "edge-agent" / "quota.sqlite3", DAY)
    (open_call,) = left.unresolved()
    assert open_call.ceiling_micro_usd == CEILING
    assert left.states()[0].remaining_micro_usd == DAY[0].cap_micro_usd - CEILING, (
        "it counts as spent until then"
    )
    left.close()
    again = start_edge("--cloud", world.cloud_address)
    async with grpc.aio.insecure_channel(again.address) as channel:
        app = App(channel)

        async def resolved() -> bool:
            return (await app.status()).unresolved_reservations == 0

        await until(resolved)
        spent, reserved = await app.budget()
        assert reserved == 0
        told = world.cloud.wait_for_calls(2, request_id=open_call.request_id)
        assert {call["rpc"] for call in told} == {"Generate", "LookupGeneration"}
        # As the image was finished or not when the connection broke: the cloud's books decide.
        assert spent == sum(call.get("charged_micro_usd", 0) for call in told)


async def test_an_image_that_was_paid_for_comes_again_from_a_daemon_that_was_killed(
    world: World, start_edge: StartEdge, prompts: tuple[str, str]
) -> None:
    one = f"{PRICE / 1e6}"
    how = ("--cloud", world.cloud_address, "--budget", one, "--max-price", one)
    pictures, ids = [], []
    for reason in ("pareto_cloud", "already_paid"):
        edge = start_edge(*how)
        async with grpc.aio.insecure_channel(edge.address) as channel:
            app = App(channel)
            answer = await app.generate(prompts[1], request_id="once", timeout=150)
            assert (answer.reason, answer.served_by) == (reason, "cloud"), answer.result
            assert (answer.result.cost_micro_usd, await app.budget()) == (PRICE, (PRICE, 0))
            pictures.append(answer.picture.tobytes())
        edge.process.kill()
        ids += [call["purchase"] for call in edge.process.calls if "purchase" in call]
    assert pictures[0] == pictures[1]
    assert len(ids) == 2 and ids[0] == ids[1]
    made = world.cloud.wait_for_calls(2, request_id=ids[0])
    assert [call.get("charged_micro_usd") for call in made] == [PRICE, None]


def test_the_clients_twenty_lines_work_as_they_stand(
    world: World, start_edge: StartEdge, tmp_path: Path
) -> None:
    example = ROOT / "docs" / "examples" / "client.py"
    assert len(example.read_text().splitlines()) <= 20
    edge = start_edge()
    finished = subprocess.run(
        [sys.executable, example, PROMPTS[0], tmp_path / "cat.png"],
        capture_output=True,
        text=True,
        timeout=60,
        env=process_environment(tmp_path, EDGE_AGENT_ADDRESS=edge.address),
    )
    assert finished.returncode == 0, finished.stderr
    assert "made by: ROUTE_EDGE for 0 micro-dollars" in finished.stdout
    with Image.open(tmp_path / "cat.png") as image:
        assert image.text["prompt"] == PROMPTS[0]


def test_the_readme_shows_the_client_as_it_stands() -> None:
    example = (ROOT / "docs" / "examples" / "client.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_command_routes_and_generates_through_both(
    world: World, start_edge: StartEdge, prompts: tuple[str, str], tmp_path: Path
) -> None:
    edge = start_edge("--cloud", world.cloud_address)

    def run(*arguments: str) -> list[dict[str, object]]:
        finished = subprocess.run(
            [sys.executable, "-m", "edge_agent", *arguments, "--json", "--agent", edge.address],
            capture_output=True,
            text=True,
            timeout=150,
            cwd=tmp_path,
            env=process_environment(tmp_path),
        )
        assert finished.returncode == 0, finished.stderr
        return [json.loads(line) for line in finished.stdout.splitlines()]

    assert [facts["route"] for facts in run("route", *prompts)] == ["edge", "cloud"]
    (facts,) = run("generate", prompts[1], "-o", "out.png")
    assert (facts["served_by"], facts["cost_micro_usd"], facts["fallback"]) == ("cloud", PRICE, None)
    assert (tmp_path / "out.png").is_file()
    (budget,) = run("quota")
    assert budget["spent_micro_usd"] == PRICE


async def test_every_prompt_is_answered_when_the_cloud_server_is_killed_and_its_books_decide_when_it_is_back(
    world: World, start_edge: StartEdge, prompts: tuple[str, str]
) -> None:
    """The last test of this module: the next ones would wait for the cloud server to load again."""
    edge = start_edge("--cloud", world.cloud_address)
    async with grpc.aio.insecure_channel(edge.address) as channel:
        app = App(channel)
        how = {"steps": SLOW_STEPS} if world.name == "miniature" else {}  # the starter takes long enough
        call = app.call(prompts[1], timeout=150, **how)
        # The cloud has accepted it: what may still be on its way stays open until its time is over, two minutes.
        begun = await app.read(call, until="progress")
        world.cloud.kill()
        answer = await app.read(call)
        assert (begun.route, answer.served_by, answer.result.fallback) == ("cloud", "edge", True)

        async def left_alone() -> (
            bool
        ):  # for a second, then two, ...: a slow machine's image may outlast the first
            after = await app.generate(prompts[1])
            assert after.served_by == "edge"
            return after.reason == "cloud_unavailable"

        await until(left_alone)
        assert (await app.generate(routing=CLOUD)).code == "UNAVAILABLE"
        _, reserved = await app.budget()
        assert reserved in (0, CEILING)  # as the call had been sent or not; nobody can say what it came to
        if world.name == "miniature":  # torch takes its seconds to load
            world.start_cloud(world.cloud_address)

            async def resolved() -> bool:
                return (await app.status()).unresolved_reservations == 0

            await until(resolved, timeout_s=90)
            assert await app.budget() == (0, 0), "what was cut off was not charged"
            assert (await app.generate(routing=CLOUD, timeout=150)).served_by == "cloud"
