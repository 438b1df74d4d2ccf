"""The wire of a real daemon on a real socket: what an app gets, and what it is told when it asks for the impossible."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from edge_agent import device, service, version
from edge_agent.bundle import Bundle
from edge_agent.daemon import Daemon
from edge_agent.diffusion.generator import Image
from edge_agent.diffusion.text_encoder import TextStates
from edge_agent.errors import Cancelled, GenerationFailed, NotLoaded, OutOfMemory, RouteT2IError
from edge_agent.image import PREVIEW_SIDE
from edge_agent.log import Lines
from edge_agent.policy import Decision
from edge_agent.request import ImageRequest
from edge_agent.settings import resolve
from edge_agent.superiority import METRICS
from edge_agent.tokens import Tokens
from routet2i.edge.v1 import edge_pb2
from routet2i.image.v1 import image_pb2
from tests.routed import SLOW_STEPS
from tests.running import (
    CLOUD,
    CLOUD_PROMPT,
    EDGE_PROMPT,
    LOCAL,
    SERVICE,
    App,
    Here,
    daemon_here,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_QUEUE = 3
SETTINGS, PING, GOAWAY = 4, 6, 7  # of HTTP/2's frames
STAGES = {"tokenize", "encode", "predict", "decide", "total"}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory, routed_bundle: Path) -> AsyncIterator[Here]:
    state = tmp_path_factory.mktemp("state")
    async with daemon_here(
        routed_bundle, state, max_queue=MAX_QUEUE, budget="1,0.5/month@kiosk", rate="9/60"
    ) as here:
        yield here


@pytest_asyncio.fixture(loop_scope="module")
async def here(shared: Here) -> AsyncIterator[Here]:
    """The module's daemon, which has no cloud, with nothing in flight."""
    yield shared
    await shared.restless()


@pytest_asyncio.fixture(loop_scope="module")
async def app(here: Here) -> App:
    return here.app


async def test_an_image_comes_as_decision_progress_chunks_and_result(
    app: App, routed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "PROGRESS_EVERY_S", 0)
    answer = await app.generate(EDGE_PROMPT, seed=7, request_id="mine", guidance_scale=3.0)
    assert answer.order == ["decision"] + ["progress"] * len(answer.progress) + ["image_chunk", "result"]
    steps = answer.progress[0].steps
    assert [progress.step for progress in answer.progress] == list(range(1, steps + 1))
    assert not any(progress.HasField("preview") for progress in answer.progress)
    result, info = answer.result, answer.result.image
    assert (result.request_id, answer.served_by, result.fallback, result.cost_micro_usd) == (
        "mine",
        "edge",
        False,
        0,
    )
    assert (info.width, info.height, info.seed, info.steps, info.guidance_scale) == (64, 64, 7, 4, 3.0)
    assert info.model_digest == result.edge_model_digest == Bundle.open(routed_bundle).model_digest
    assert info.total_bytes == len(answer.png)
    assert answer.picture.size == (64, 64)
    assert STAGES | {"queue", "denoise", "decode", "png"} <= {timing.stage for timing in result.timings}


async def test_the_image_carries_the_facts_of_its_making(app: App, routed_bundle: Path) -> None:
    answer = await app.generate("a cat, 猫 🐈", seed=3, negative_prompt="a dog")
    text = answer.picture.text
    assert text["prompt"] == "a cat, 猫 🐈"
    assert (text["negative_prompt"], text["seed"], text["steps"], text["route"]) == (
        "a dog",
        "3",
        "4",
        "edge",
    )
    assert (text["guidance_scale"], text["Software"]) == ("5", f"edge-agent {version()}")
    assert (text["reason"], text["model_digest"]) == (answer.reason, Bundle.open(routed_bundle).model_digest)
    assert text["prs"] == f"{answer.decision.prs:.6f}"


async def test_the_states_that_were_read_for_the_decision_drive_the_image(
    here: Here, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = here.daemon.agent
    assert agent is not None
    encoder, read = agent.models.generator.text_encoder, []
    encode = encoder.encode

    def seen(tokens: Tokens, *arguments: Any) -> TextStates:
        read.append(tokens.texts)
        return encode(tokens, *arguments)

    await app.generate(guidance_scale=3.0)  # which reads the empty negative prompt, once and for all
    monkeypatch.setattr(encoder, "encode", seen)
    await app.generate("a dog", guidance_scale=3.0)
    assert [len(texts) > 0 for texts in read] == [True]
    await app.generate("a dog", guidance_scale=3.0, negative_prompt="a cat")
    assert read[0] == read[1] != read[2] and len(read) == 3
    await app.generate("a dog", guidance_scale=1.0, negative_prompt="a cat")
    assert read[3:] == read[:1], "what takes no part is not read"


async def test_the_image_is_what_the_models_make_of_all_that_was_asked(here: Here) -> None:
    assert here.daemon.agent is not None
    generator = here.daemon.agent.models.generator
    asked = {"seed": 3, "steps": 8, "guidance_scale": 4.0}
    answer = await here.app.generate("a cat", negative_prompt="a dog", **asked)
    _, states = generator.encode("a cat")
    *_, image = generator.generate(states, generator.encode_negative("a dog"), **asked)
    assert isinstance(image, Image)
    assert np.array_equal(np.asarray(answer.picture), image.pixels)


async def test_the_same_seed_gives_the_same_file_and_another_seed_another_image(app: App) -> None:
    once, again, other = [await app.generate(seed=seed) for seed in (5, 5, 6)]
    assert once.png == again.png
    assert np.any(np.asarray(once.picture) != np.asarray(other.picture))


async def test_a_seed_and_an_id_are_drawn_and_told(app: App) -> None:
    first, second = await app.generate(), await app.generate()
    assert first.result.image.seed != second.result.image.seed
    assert first.result.request_id != second.result.request_id != ""
    same = await app.generate(seed=first.result.image.seed)
    assert same.png == first.png


async def test_thousands_of_calls_at_once_are_all_answered(app: App) -> None:
    decisions = await asyncio.gather(*(app.route() for _ in range(3_000)))
    assert all(decision.route for decision in decisions)


async def test_a_decision_explains_itself(app: App, routed_bundle: Path) -> None:
    decision = await app.route("two dogs on the beach")
    calibration = Bundle.open(routed_bundle).calibration
    assert 0 < decision.prs < decision.alpha <= 0.5
    for qualities in (decision.edge_quality, decision.cloud_quality, decision.tokens[0].pull):
        assert tuple(quality.name for quality in qualities) == METRICS
    assert "".join(token.text for token in decision.tokens).replace(" ", "") == "twodogsonthebeach"
    assert {timing.stage for timing in decision.timings} == STAGES
    assert [budget.name for budget in decision.quota] == ["day"]
    assert decision.cloud_model_digest == calibration.cloud_digest
    assert (decision.calibration_id, decision.prompt_truncated) == (calibration.calibration_id, False)


@pytest.mark.parametrize("what", ["slow", "long", "ledger", "turns", "quick"])
async def test_only_a_quick_reading_is_done_in_the_event_loop(
    here: Here, app: App, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    agent = here.daemon.agent
    assert agent is not None
    threads: list[str] = []
    read = agent.reader.read

    def seen(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(*arguments, **options)

    await app.generate()  # every graph is loaded, and the account in memory
    monkeypatch.setattr(agent.reader, "read", seen)
    monkeypatch.setattr(agent, "_reading_ms", 50.0 if what == "slow" else 0.5)
    if what == "ledger":
        monkeypatch.setattr(agent.purchases.ledger, "_account", None)
    if what == "turns":  # as on DirectML: it may have to wait for the denoiser
        monkeypatch.setattr(agent.reader.sessions[0], "takes_turns", True)
    await app.route("a cat " * 200 if what == "long" else "a cat")
    (thread,) = threads
    assert thread.startswith("reading") == (what != "quick")


async def test_what_prs_would_be_without_a_token_is_what_it_is_without_it(app: App) -> None:
    assert not any(token.HasField("prs_without") for token in (await app.route("two dogs")).tokens)
    two, *_, beach = (await app.route("two dogs on the beach", explain=True)).tokens
    assert two.prs_without == pytest.approx((await app.route("dogs on the beach")).prs, abs=1e-6)
    assert beach.prs_without == pytest.approx((await app.route("two dogs on the")).prs, abs=1e-6)


async def test_a_shutdown_waits_for_an_explanation(
    here: Here, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = here.daemon.agent
    assert agent is not None
    without, begun, go_on = agent.reader.prs_without, threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> float | None:
        begun.set()
        assert go_on.wait(60)
        return without(*arguments, **options)

    monkeypatch.setattr(agent.reader, "prs_without", slow)
    asked = asyncio.create_task(app.route("two dogs", explain=True))
    assert await asyncio.to_thread(begun.wait, 60)
    idle = asyncio.create_task(here.daemon._service.idle())  # what a shutdown waits for
    await asyncio.sleep(0.05)
    assert not idle.done()
    go_on.set()
    assert (await asked).tokens[0].HasField("prs_without")
    await idle


async def test_a_prompt_longer_than_the_model_reads_is_said_to_be_cut(app: App) -> None:
    decision = await app.route("x" * 500)
    assert decision.prompt_truncated
    assert len(decision.tokens) <= 75


@pytest.mark.parametrize(
    ("prompt", "reason"), [(EDGE_PROMPT, "pareto_edge"), (CLOUD_PROMPT, "cloud_unavailable")]
)
async def test_the_prompts_are_what_their_names_say(app: App, prompt: str, reason: str) -> None:
    answer = await app.generate(prompt)
    assert (answer.reason, answer.route, answer.served_by) == (reason, "edge", "edge")


async def test_who_asks_for_the_edge_gets_it(app: App) -> None:
    assert (await app.generate(CLOUD_PROMPT, routing=LOCAL)).reason == "local_only"
    assert (await app.generate(CLOUD_PROMPT, privacy=image_pb2.PRIVACY_LOCAL_ONLY)).reason == "local_only"


async def test_who_asks_for_a_cloud_that_is_not_configured_is_told_what_to_do(app: App) -> None:
    answer = await app.generate(routing=CLOUD)
    assert answer.code == "FAILED_PRECONDITION" and "--cloud" in answer.message


async def test_of_a_quick_image_no_step_is_told_but_with_previews(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "PROGRESS_EVERY_S", 60)
    assert not (await app.generate()).progress
    told = (await app.generate(preview=True)).progress
    assert [progress.step for progress in told] == list(range(1, told[0].steps + 1))


async def test_previews_come_when_asked_for(app: App) -> None:
    answer = await app.generate(preview=True)
    previews = [progress.preview for progress in answer.progress if progress.HasField("preview")]
    assert len(previews) == len(answer.progress) - 1  # after the last step comes the image itself
    assert all(preview.startswith(b"\x89PNG") for preview in previews)
    assert PREVIEW_SIDE >= 64


@pytest.mark.parametrize(
    ("wish", "field", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": " \t\n"}, "prompt", "empty"),
        ({"prompt": "x" * 10_000}, "prompt", "10,000"),
        ({"prompt": "a\0b"}, "prompt", "U+0000"),
        ({"prompt": "a\x1bb"}, "prompt", "character 2"),
        ({"negative_prompt": "a\x07"}, "negative_prompt", "U+0007"),
        ({"width": 512}, "width", "64x64"),
        ({"height": 0}, "height", "64x64"),
        ({"steps": 5}, "steps", "4, 8"),
        ({"steps": 0}, "steps", "4, 8"),
        ({"guidance_scale": -1.0}, "guidance_scale", "between"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "between"),
        ({"guidance_scale": 50.00001}, "guidance_scale", "50.00001"),
        ({"resume_offset": -1}, "resume_offset", "between"),
        ({"media_type": "image/jpeg"}, "media_type", "image/png"),
        ({"media_type": "x" * 20_000}, "media_type", "xxx"),
        ({"media_type": "猫" * 20_000}, "media_type", "猫"),
        ({"request_id": "a b"}, "request_id", "letters"),
        ({"request_id": "x" * 129}, "request_id", "128"),
        ({"traceparent": "nonsense"}, "traceparent", "W3C"),
        ({"max_price_micro_usd": -1}, "max_price_micro_usd", "between"),
        ({"routing": 99}, "routing", "99"),
        ({"privacy": 99}, "privacy", "99"),
        ({"routing": CLOUD, "privacy": image_pb2.PRIVACY_LOCAL_ONLY}, "privacy", "exclude"),
    ],
)
async def test_a_bad_field_is_named(app: App, wish: dict[str, object], field: str, words: str) -> None:
    answer = await app.generate(**{"prompt": EDGE_PROMPT} | wish)
    assert (answer.code, answer.order) == ("INVALID_ARGUMENT", [])
    assert answer.field == field and words in answer.message


@pytest.mark.parametrize("field", ["request_id", "app", "traceparent", "media_type"])
async def test_a_long_field_makes_no_long_line_in_the_log(
    app: App, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    caplog.set_level(logging.INFO, "edge_agent")
    answer = await app.generate(**{field: "x" * 200_000})  # type: ignore[arg-type]
    assert answer.code == "INVALID_ARGUMENT"
    await until(lambda: bool(caplog.records))  # the line is written once the caller has its answer
    assert field == "media_type" or "x" * 128 in Lines(as_json=False).format(caplog.records[-1])
    assert len(Lines(as_json=False).format(caplog.records[-1])) < 5_000


@pytest.mark.parametrize("wish", [{"routing": 99}, {"privacy": 99}])
async def test_the_log_says_whose_request_was_bad(
    app: App, caplog: pytest.LogCaptureFixture, wish: dict[str, int]
) -> None:
    caplog.set_level(logging.INFO, "edge_agent")
    await app.generate(request_id="r-1", app="newer", **wish)  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AioRpcError):
        await app.route(request_id="r-1", app="newer", **wish)  # type: ignore[arg-type]
    await until(lambda: len(caplog.records) == 2)
    for record in caplog.records:
        assert "request_id=r-1 app=newer" in Lines(as_json=False).format(record)


@pytest.mark.parametrize("prompt", ["猫", "🐈‍⬛ and ʼn e\u0301", "a\tb\nc", "عربى", "x" * 2_000])
async def test_any_text_is_a_prompt(app: App, prompt: str) -> None:
    answer = await app.generate(prompt, seed=1)
    assert answer.picture.text["prompt"] == prompt


async def test_a_method_that_there_is_not_is_refused_as_such(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """As an app of a later version asks for."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await app.channel.unary_unary(f"/{SERVICE}/Upscale")(b"", timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not caplog.records


async def test_text_that_is_not_utf_8_is_refused(here: Here) -> None:
    image = b"\x1a\x02\xed\xa0"  # field 3, the prompt, holding the first half of a surrogate
    request = b"\x0a" + bytes([len(image)]) + image
    call = here.app.channel.unary_stream(f"/{SERVICE}/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        [_ async for _ in call(request, timeout=30)]
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in failed.value.details()
    assert (await here.app.health()) == "SERVING"


@pytest.mark.parametrize("where", ["reader", "generator"])
async def test_a_panic_in_a_native_library_ends_the_call_as_a_fault_of_the_daemon(
    here: Here, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class Panic(BaseException):  # as pyo3 has it
        pass

    def panics(*_: Any, **__: Any) -> Any:
        raise Panic("index out of bounds")

    agent = here.daemon.agent
    assert agent is not None
    part, name = (agent.reader, "read") if where == "reader" else (agent.models.generator, "generate")
    with monkeypatch.context() as broken:
        broken.setattr(part, name, panics)
        answer = await here.app.generate(timeout=20)
        assert answer.code == "INTERNAL" and "bounds" not in answer.message
    assert (await here.app.generate()).code == "OK"


async def test_python_s_own_want_of_memory_is_told_as_such(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    agent = here.daemon.agent
    assert agent is not None
    with monkeypatch.context() as broken:
        broken.setattr(agent.models.generator, "generate", full)
        answer = await here.app.generate()
        assert answer.code == "RESOURCE_EXHAUSTED" and "out of memory" in answer.message
    assert (await here.app.generate()).code == "OK"


async def test_the_rest_of_an_image_is_not_kept_here(app: App) -> None:
    answer = await app.generate(resume_offset=10)
    assert answer.code == "NOT_FOUND" and "resume_offset 0" in answer.message


async def test_a_deadline_that_is_past_or_passes_ends_the_work(here: Here) -> None:
    assert (await here.app.generate(timeout=0.0)).code == "DEADLINE_EXCEEDED"
    answer = await here.app.generate(steps=SLOW_STEPS, timeout=0.1)
    assert (answer.code, answer.result) == ("DEADLINE_EXCEEDED", None)
    await here.restless()  # which fails where the device goes on


async def test_a_caller_who_goes_away_frees_the_device_at_the_next_step(here: Here) -> None:
    calls = [here.app.call(steps=SLOW_STEPS) for _ in range(MAX_QUEUE + 1)]
    await asyncio.gather(*(here.app.read(call, until="decision") for call in calls))
    for call in calls:
        call.cancel()
    await here.restless()
    assert here.daemon.agent.device.waiting == 0
    assert (await here.app.generate()).code == "OK"


async def test_who_leaves_at_the_decision_leaves_no_image_behind(here: Here) -> None:
    agent, over = here.daemon.agent, threading.Event()
    assert agent is not None
    agent.device._worker.submit(over.wait, 60)  # as with an image that takes long
    async with aclosing(agent.generate(ImageRequest("r-1", EDGE_PROMPT))) as events:
        assert isinstance(await anext(events), Decision)
        assert agent.device.images == 1
    await asyncio.sleep(0)
    assert agent.device.images == 0
    over.set()


async def test_the_status_counts_the_images_that_wait_without_the_one_in_the_making(here: Here) -> None:
    over = threading.Event()
    assert here.daemon.agent is not None
    here.daemon.agent.device._worker.submit(over.wait, 60)  # as with an image that takes long
    calls = [here.app.call() for _ in range(3)]
    await asyncio.gather(*(here.app.read(call, until="decision") for call in calls))
    assert (await here.app.status()).queue_length == 2
    over.set()
    answers = await asyncio.gather(*map(here.app.read, calls))
    assert [answer.code for answer in answers] == ["OK"] * 3
    assert (await here.app.status()).queue_length == 0


@pytest.mark.parametrize(
    ("error", "doubted"),
    [
        (GenerationFailed("CUDA failure 700"), True),
        (NotLoaded("no device"), True),
        (OutOfMemory("full"), False),
    ],
)
async def test_what_may_come_of_a_lost_device_has_it_looked_at(
    here: Here, monkeypatch: pytest.MonkeyPatch, error: RouteT2IError, doubted: bool
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    doubts: list[None] = []
    assert here.daemon.agent is not None
    monkeypatch.setattr(here.daemon._service, "_doubt", lambda: doubts.append(None))
    monkeypatch.setattr(here.daemon.agent.models.generator, "generate", fails)
    assert (await here.app.generate()).message == error.message
    assert len(doubts) == doubted


async def test_a_message_that_was_taken_in_time_ends_nothing_later() -> None:
    """As where an image takes longer than a caller may take to read a message."""
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, later.set)
    with service._patience(0.05):
        await asyncio.sleep(0)
    await later.wait()
    with pytest.raises(TimeoutError), service._patience(0.05):
        await asyncio.sleep(60)


async def test_who_is_told_to_stop_while_a_message_waits_has_not_waited_in_vain() -> None:
    """Else the log would say of a daemon that ends that its callers read nothing."""

    async def wait() -> None:
        with service._patience(60):
            await asyncio.sleep(60)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_caller_whose_leaving_crosses_a_message_is_no_fault_of_the_daemon() -> None:
    async def crosses(*_: object) -> None:
        raise grpc.aio.InternalError("the call is over")

    context = SimpleNamespace(write=crosses, abort=crosses)
    with pytest.raises(Cancelled, match="went away"):
        await service._write(context, edge_pb2.GenerateResponse())
    with pytest.raises(asyncio.CancelledError):
        await service._abort(context, NotLoaded("no device"))


async def test_beyond_the_queue_callers_are_told_when_to_come_back(here: Here) -> None:
    answers = await asyncio.gather(*(here.app.generate(steps=SLOW_STEPS) for _ in range(MAX_QUEUE + 5)))
    refused = [answer for answer in answers if answer.code != "OK"]
    assert len(refused) == 4
    for answer in refused:
        assert answer.code == "RESOURCE_EXHAUSTED"
        assert answer.details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        assert "QuotaFailure" not in answer.details
    positions = sorted(answer.result.queue_position for answer in answers if answer.code == "OK")
    assert positions == list(range(MAX_QUEUE + 1))


async def test_a_decision_does_not_wait_for_the_images_before_it(here: Here) -> None:
    calls = [here.app.call(steps=SLOW_STEPS) for _ in range(MAX_QUEUE)]
    await asyncio.gather(*(here.app.read(call, until="progress") for call in calls[:1]))
    assert (await here.app.route()).route == edge_pb2.ROUTE_EDGE
    assert here.daemon.agent.device.images > 0
    for call in calls:
        call.cancel()


async def test_quota_tells_budgets_and_rates(app: App) -> None:
    everything, kiosk = await app.quota(), await app.quota("kiosk")
    assert [budget.name for budget in everything.budgets] == ["day", "month@kiosk"]
    assert [budget.app for budget in kiosk.budgets] == ["", "kiosk"]
    first = everything.budgets[0]
    assert (first.cap_micro_usd, first.spent_micro_usd, first.reserved_micro_usd) == (1_000_000, 0, 0)
    assert (everything.rates[0].max_calls, everything.rates[0].per_seconds) == (9, 60.0)


async def test_models_and_status_tell_what_runs(app: App, routed_bundle: Path) -> None:
    bundle = Bundle.open(routed_bundle)
    edge, cloud = (await app.stub.ListModels(edge_pb2.ListModelsRequest(), timeout=30)).models
    assert (edge.name, edge.licence, edge.digest) == ("miniature", "Apache-2.0", bundle.model_digest)
    assert (edge.width, edge.height, edge.default_steps) == (64, 64, 4)
    assert list(edge.steps) == [4, 8, SLOW_STEPS]
    assert (cloud.side, cloud.digest) == (edge_pb2.ROUTE_CLOUD, bundle.calibration.cloud_digest)
    status = await app.status()
    assert (status.calibrated, status.routing_rate, status.max_queue) == (True, 0.5, MAX_QUEUE)
    assert status.alpha == pytest.approx(bundle.calibration.alpha(0.5))
    assert status.cloud_health == edge_pb2.CLOUD_HEALTH_NOT_CONFIGURED
    assert any("--cloud" in advice for advice in status.advice)


async def test_reflection_lists_the_services_and_health_serves(app: App) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(app.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]), timeout=30)]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert await app.health() == await app.health("") == "SERVING"


async def test_an_app_may_ping_as_often_as_it_likes(here: Here) -> None:
    def frame(kind: int, payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind]) + bytes(5) + payload

    reader, writer = await asyncio.open_connection(*here.daemon.address.split(":"))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS))
    for number in range(20):
        ping, answer = number.to_bytes(8, "big"), b""
        writer.write(frame(PING, ping))
        while answer != ping:
            head = await asyncio.wait_for(reader.readexactly(9), 30)
            answer = await reader.readexactly(int.from_bytes(head[:3], "big"))
            assert head[3] != GOAWAY, answer
    writer.close()


async def test_health_serves_only_once_the_models_are_loaded(routed_bundle: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    daemon = Daemon(
        resolve({"listen": "127.0.0.1:0", "bundle": str(routed_bundle), "state": str(tmp_path)}, {})
    )
    await daemon.startup()
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        app = App(channel)
        assert await app.health() == "NOT_SERVING"
        early = await app.generate()
        assert early.code == "UNAVAILABLE" and "loading" in early.message and "RetryInfo" in early.details
        serving = asyncio.create_task(daemon.serve())
        await until(lambda: daemon._service.agent is not None)
        assert await app.health() == "SERVING"
        assert 0 < (await app.status()).uptime_seconds <= time.monotonic() - began
        daemon.stop()
        await serving
        await daemon.shutdown()


async def test_a_prompt_as_long_as_the_setting_allows_is_taken(routed_bundle: Path, tmp_path: Path) -> None:
    """Whatever it is written in."""
    async with daemon_here(routed_bundle, tmp_path, max_prompt_characters=100_000) as here:
        prompts = {"prompt": "🐈" * 100_000, "negative_prompt": "🐈" * 100_000}
        assert (await here.app.route(**prompts)).prompt_truncated
        with pytest.raises(grpc.aio.AioRpcError, match="100,001 characters") as refused:
            await here.app.route("🐈" * 100_001)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_only_the_apps_in_the_settings_may_call(routed_bundle: Path, tmp_path: Path) -> None:
    async with daemon_here(routed_bundle, tmp_path, apps="kiosk,camera", png_facts="off") as here:
        refused = await here.app.generate(app="stranger")
        assert refused.code == "PERMISSION_DENIED" and "stranger" in refused.message
        answer = await here.app.generate(app="kiosk")
        assert answer.picture.text == {}  # the setting turns the facts off


async def test_a_bundle_without_a_calibration_does_not_route(miniature_bundle: Path, tmp_path: Path) -> None:
    async with daemon_here(miniature_bundle, tmp_path, cloud="127.0.0.1:9") as here:
        answer = await here.app.generate(CLOUD_PROMPT)
        assert (answer.reason, answer.served_by, answer.decision.HasField("prs")) == (
            "uncalibrated",
            "edge",
            False,
        )
        assert "prs" not in answer.picture.text
        assert (
            await here.app.generate(routing=CLOUD)
        ).code == "UNAVAILABLE"  # it was asked, and nobody is there
        status = await here.app.status()
        assert not status.calibrated and "edge-export" in status.advice[0]
        await until(lambda: here.daemon.agent.device.images == 0)
