"""What a caller of CloudServerService sees, over a real socket."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
import time
import tracemalloc
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from cloud_server import generator, stream
from cloud_server.journal import Finished, Journal
from cloud_server.request import Spec
from cloud_server.service import MOST_SENT_AGAIN
from tests.cloud_server.conftest import PRICE, Client, Running, serve
from tests.miniature import miniature_pipeline
from tests.running import until

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one server serves all of these tests

LONG = 140  # denoising steps: more than a test waits for


def call_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of each call's line. It comes a moment after the caller has its answer."""
    return [record.__dict__["fields"] for record in caplog.records if record.message == "call"]


async def test_an_image_arrives_whole_and_is_what_diffusers_makes(running: Running) -> None:
    answer = await running.client.generate(
        width=256, height=128, steps=5, max_price_micro_usd=PRICE, app="demo"
    )

    assert answer.error is None
    assert list(dict.fromkeys(answer.order)) == ["accepted", "progress", "image_chunk", "result"]
    assert answer.accepted is not None
    assert (answer.accepted.queue_position, answer.accepted.charged_micro_usd) == (0, PRICE)
    told = [p.step for p in answer.progress]  # where two steps are done at once, the newest
    assert told == sorted(set(told))
    assert (told[-1], {p.steps for p in answer.progress}) == (5, {5})
    assert len(answer.chunks) > 1
    assert max(len(chunk.data) for chunk in answer.chunks) <= 65_536
    positions = np.cumsum([0, *(len(chunk.data) for chunk in answer.chunks)])
    assert [chunk.offset for chunk in answer.chunks] == positions[:-1].tolist()
    assert answer.result is not None
    info = answer.result.image
    assert info.sha256 == hashlib.sha256(answer.png).hexdigest()
    assert (info.total_bytes, info.media_type) == (len(answer.png), "image/png")
    assert (info.width, info.height, info.seed, info.steps, info.guidance_scale) == (256, 128, 7, 5, 3.0)
    assert info.model_digest == answer.accepted.model_digest
    assert answer.result.charged_micro_usd == PRICE
    assert {timing.stage for timing in answer.result.timings} == {"queue", "generate", "png", "total"}

    expected = miniature_pipeline()(
        "a cat on the beach",
        width=256,
        height=128,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.png))), np.asarray(expected))


async def test_what_a_request_leaves_out_the_model_chooses_and_the_result_tells(running: Running) -> None:
    answers = [await running.client.generate(seed=None) for _ in range(2)]
    infos = [answer.result.image for answer in answers if answer.result]
    assert [(i.width, i.height, i.steps, i.guidance_scale) for i in infos] == [(64, 64, 4, 3.0)] * 2
    assert infos[0].seed != infos[1].seed


async def test_a_negative_prompt_and_another_seed_change_the_image(running: Running) -> None:
    wishes: list[dict[str, Any]] = [{}, {"seed": 8}, {"negative_prompt": "red moon"}, {"guidance_scale": 1.0}]
    assert len({(await running.client.generate(**wish)).png for wish in wishes}) == len(wishes)


async def test_previews_come_with_the_progress_when_asked_for(running: Running) -> None:
    plain = await running.client.generate(width=256, height=256)
    assert not any(progress.HasField("preview") for progress in plain.progress)
    answer = await running.client.generate(width=256, height=256, preview=True)
    assert {Image.open(io.BytesIO(p.preview)).size for p in answer.progress} == {(128, 128)}
    assert answer.png == plain.png


BAD_INPUT: list[tuple[dict[str, Any], str, str]] = [
    ({"request_id": ""}, "request_id", "unique"),
    ({"request_id": "x" * 129}, "request_id", "at most 128"),
    ({"request_id": "a b"}, "request_id", "only"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": " \t\n"}, "prompt", "empty"),
    ({"prompt": "\u200d\u00ad\ufe0f"}, "prompt", "nothing of it can be seen"),
    ({"prompt": "x" * 2_001}, "prompt", "at most 2000"),
    ({"prompt": "a\x00cat"}, "prompt", "U+0000 at character 2"),
    ({"prompt": "cat\x1b[2J"}, "prompt", "U+001B at character 4"),
    ({"negative_prompt": "\x7f"}, "negative_prompt", "U+007F"),
    ({"negative_prompt": "x" * 2_001}, "negative_prompt", "at most 2000"),
    ({"app": "a\nb"}, "app", "U+000A"),
    ({"app": "a" * 129}, "app", "at most 128"),
    ({"width": 0}, "width", "multiples of 8"),
    ({"width": 63}, "width", "multiples of 8"),
    ({"height": 2_048}, "height", "up to 1024"),
    ({"steps": 0}, "steps", "1 to 150"),
    ({"steps": 151}, "steps", "1 to 150"),
    ({"guidance_scale": -1.0}, "guidance_scale", "between 0"),
    ({"guidance_scale": float("nan")}, "guidance_scale", "between 0"),
    ({"guidance_scale": float("inf")}, "guidance_scale", "between 0"),
    ({"media_type": "image/jpeg"}, "media_type", "image/png"),
    ({"privacy": "PRIVACY_LOCAL_ONLY"}, "privacy", "local-only"),
    ({"privacy": 3}, "privacy", "does not know"),
    ({"max_price_micro_usd": -1}, "max_price_micro_usd", "negative"),
    ({"resume_offset": -1}, "resume_offset", "negative"),
]


async def test_bad_input_is_refused_by_the_name_of_its_field_and_nothing_runs(running: Running) -> None:
    for wish, field, words in BAD_INPUT:
        answer = await running.client.generate(**wish)
        assert answer.error is not None, wish
        assert answer.error.code == "INVALID_ARGUMENT", wish
        assert answer.error.field == field, wish
        assert words in answer.error.message, (wish, answer.error.message)
        assert answer.order == [], wish
    assert running.passes == [0]


@pytest.mark.parametrize("prompt", ["🐱🏖️ e\u0301 猫 ‏שלום", "line one\n\tline two", "x" * 2_000])
async def test_any_text_that_is_text_is_served(running: Running, prompt: str) -> None:
    answer = await running.client.generate(prompt=prompt, steps=1)
    assert answer.error is None


async def test_a_prompt_as_long_as_the_setting_allows_is_served(tmp_path: Path, model_folder: Path) -> None:
    """Whatever it is written in."""
    async with serve(tmp_path / "state", model_folder, max_prompt_characters=100_000) as running:
        prompts = {"prompt": "🐈" * 100_000, "negative_prompt": "🐈" * 100_000}
        assert (await running.client.generate(**prompts, steps=1)).error is None


async def test_bytes_that_are_no_request_end_the_call_and_not_the_server(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    generate = running.client.channel.unary_stream("/routet2i.cloud.v1.CloudServerService/Generate")
    half_a_surrogate = b"\x0a\x04\x1a\x02\xed\xa0"  # in the prompt
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        [_ async for _ in generate(half_a_surrogate, timeout=10)]
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in failed.value.details()
    lookup = running.client.channel.unary_unary("/routet2i.cloud.v1.CloudServerService/LookupGeneration")
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await lookup(b"\x0a\x02\xff\xfe", timeout=10)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not [record for record in caplog.records if record.exc_info]
    assert (await running.client.generate(steps=1)).error is None


async def test_a_price_above_the_ceiling_is_refused_before_anything_runs(running: Running) -> None:
    answer = await running.client.generate(request_id="dear", max_price_micro_usd=PRICE - 1)
    assert answer.error is not None
    assert answer.error.code == "FAILED_PRECONDITION"
    assert str(PRICE) in answer.error.message
    assert answer.error.details["ErrorInfo"].metadata["price_micro_usd"] == str(PRICE)
    assert answer.order == []
    assert running.passes == [0]
    assert await running.client.state("dear") == "UNKNOWN"


async def begun(client: Client, **wish: Any) -> Any:
    """A call that has reached its first denoising step."""
    # On a busy machine such a call, and who waits behind it, is expected to take longer than the usual minute.
    call = client.call(timeout=600, **({"steps": LONG, "width": 256, "height": 256} | wish))
    async for response in call:
        if response.WhichOneof("event") == "progress":
            return call
    raise AssertionError("the stream ended")


async def test_a_cancelled_call_stops_at_the_next_step_and_is_not_charged(running: Running) -> None:
    call = await begun(running.client, request_id="gone")
    assert await running.client.state("gone") == "RUNNING"
    call.cancel()
    await running.idle()
    made = running.passes[0]
    assert made < LONG  # it stopped early,
    await asyncio.sleep(0.3)
    assert running.passes[0] == made  # and for good
    lookup = await running.client.lookup("gone")
    assert (lookup.charged, lookup.charged_micro_usd) == (False, 0)
    assert await running.client.state("gone") == "CANCELLED"

    again = await running.client.generate(request_id="gone", steps=2)
    assert again.error is None, "a cancelled request may be made again under its id"
    assert (await running.client.lookup("gone")).charged_micro_usd == PRICE


async def test_a_call_past_its_deadline_stops_at_the_next_step_and_is_not_charged(running: Running) -> None:
    answer = await running.client.generate(request_id="late", timeout=1.0, steps=LONG, width=512, height=512)
    assert answer.error is not None
    assert answer.error.code == "DEADLINE_EXCEEDED"
    await running.idle()
    assert running.passes[0] < LONG
    assert await running.client.state("late") == "CANCELLED"


async def test_a_caller_that_vanishes_frees_the_model(running: Running) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.server.port}") as channel:
        await begun(Client(channel), request_id="vanished")
    await running.idle()
    assert running.passes[0] < LONG
    assert await running.client.state("vanished") == "CANCELLED"


@asynccontextmanager
async def narrow(running: Running) -> AsyncIterator[Client]:
    """A caller whose window a few previews fill: what it does not read soon stands in the server."""
    window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    window += [("grpc.use_local_subchannel_pool", 1)]  # each one has a connection of its own
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.server.port}", options=window) as channel:
        yield Client(channel, running.client.metadata)


async def test_a_caller_that_stops_reading_does_not_hold_the_model(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, "STALLED_READER_S", 0.5)
    caplog.set_level("INFO", logger="cloud_server")
    async with narrow(running) as client:
        call = client.call(request_id="stalled", steps=149, width=128, height=128, preview=True)
        await anext(aiter(call))
        assert (await running.client.generate(request_id="next", steps=1)).result is not None
        assert await running.client.state("stalled") == "CANCELLED"
        assert running.passes[0] < 149
        await running.idle()  # though the status stands behind a message that nobody reads
        assert not call.done()
    lines = call_lines(caplog)
    assert [line["outcome"] for line in lines if line["rpc"] == "Generate"] == ["OK", "CANCELLED"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_caller_that_reads_slowly_does_not_hold_the_model_and_gets_its_image(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STALLED_READER_S", 600.0)  # however busy the machine is, it is only slow
    steps = 20
    async with narrow(running) as client:
        call = client.call(request_id="slow", steps=steps, width=128, height=128, preview=True)
        await anext(aiter(call))
        assert (await running.client.generate(steps=1)).result is not None
        lookup = await running.client.lookup("slow")
        assert (lookup.charged, lookup.charged_micro_usd) == (True, PRICE)

        answer = await client.read(call)
        assert answer.result is not None
        assert answer.result.image.sha256 == lookup.sha256 == hashlib.sha256(answer.png).hexdigest()
        told = [p.step for p in answer.progress]
        assert told == sorted(set(told))
        assert told[-1] == steps
        assert len(told) < steps, "while it read nothing, newer steps took the place of older ones"


async def test_a_call_cancelled_at_any_moment_leaves_nothing_running(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"moment-{number}" for number in range(40)]
    for number, name in enumerate(names):
        call = running.client.call(request_id=name, steps=3)
        await asyncio.sleep(number * 0.002)
        call.cancel()
    await asyncio.sleep(0.2)  # the last call may not have reached the server yet
    await running.idle()
    states = {name: await running.client.state(name) for name in names}
    assert set(states.values()) <= {"UNKNOWN", "CANCELLED", "FINISHED"}, states
    charged = [name for name in names if (await running.client.lookup(name)).charged]
    assert charged == [name for name, state in states.items() if state == "FINISHED"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert (await running.client.generate(steps=1)).error is None


async def test_the_queue_holds_what_it_may_and_refuses_the_rest_at_once(running: Running) -> None:
    first = await begun(running.client)
    second = running.client.call(timeout=600, request_id="second", steps=2)
    assert (await anext(aiter(second))).accepted.queue_position == 1

    third = await running.client.generate(request_id="third")
    assert third.error is not None
    assert third.error.code == "RESOURCE_EXHAUSTED"
    assert third.error.details["RetryInfo"].retry_delay.ToMilliseconds() > 0
    assert await running.client.state("third") == "UNKNOWN"

    first.cancel()
    answer = await running.client.read(second)
    assert answer.result is not None, "who waited is served when the model is free"
    assert (await running.client.generate(steps=1)).error is None


async def test_who_waits_in_the_queue_hears_something_all_the_while(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a proxy would end the call, as HAProxy does after a minute of silence."""
    monkeypatch.setattr(stream, "QUIET_S", 0.01)
    first = await begun(running.client)
    kinds = []
    async for response in running.client.call(timeout=600, steps=2):
        kinds.append(response.WhichOneof("event"))
        if len(kinds) == 4:
            first.cancel()
    assert kinds[:4] == ["accepted", None, None, None]
    assert kinds[-1] == "result"
    at = kinds.index("image_chunk")
    assert None not in kinds[at:]


async def test_thousands_of_calls_at_once_are_all_served_or_told_when_to_come_back(running: Running) -> None:
    answers = await asyncio.gather(*(running.client.generate(steps=1) for _ in range(3_000)))
    refused = [answer.error for answer in answers if answer.error is not None]
    assert len(refused) < len(answers)
    assert {(error.code, "RetryInfo" in error.details) for error in refused} == {("RESOURCE_EXHAUSTED", True)}


async def test_a_waiting_call_that_is_cancelled_never_runs(running: Running) -> None:
    first = await begun(running.client)
    second = running.client.call(timeout=600, request_id="impatient", steps=2)
    await anext(aiter(second))
    second.cancel()
    first.cancel()
    await running.idle()
    assert await running.client.state("impatient") == "CANCELLED"
    assert running.passes[0] < LONG


async def test_a_call_whose_deadline_would_pass_is_refused_before_it_runs(running: Running) -> None:
    await running.client.generate(steps=3, width=512, height=512)  # the server learns its pace
    made = running.passes[0]
    answer = await running.client.generate(
        request_id="hopeless", timeout=2.0, steps=150, width=512, height=512
    )
    assert answer.error is not None
    assert answer.error.code == "DEADLINE_EXCEEDED"
    assert "allow more time" in answer.error.message
    assert running.passes[0] == made
    assert await running.client.state("hopeless") == "UNKNOWN"


async def test_who_wants_previews_does_not_make_an_image_without_them_seem_slow(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: Any) -> None:
        time.sleep(1.0)

    monkeypatch.setattr(generator, "_preview", slow)
    wish = {"width": 96, "height": 96}
    assert (await running.client.generate(**wish, steps=2, preview=True)).error is None
    assert (await running.client.generate(**wish, steps=8, timeout=5.0)).error is None


async def test_a_request_id_is_charged_once_and_its_image_is_sent_again(running: Running) -> None:
    wish: dict[str, Any] = {"request_id": "twice", "width": 256, "height": 256}
    first = await running.client.generate(**wish)
    made = running.passes[0]
    assert first.result is not None
    again = await running.client.generate(**wish, max_price_micro_usd=0)
    assert again.result is not None
    assert again.png == first.png
    assert again.result.image == first.result.image
    assert again.progress == []

    rest = await running.client.generate(**wish, resume_offset=1_000)
    assert rest.png == first.png[1_000:]
    assert rest.chunks[0].offset == 1_000
    assert rest.result is not None
    assert rest.result.image.sha256 == hashlib.sha256(first.png).hexdigest()
    end = await running.client.generate(**wish, resume_offset=len(first.png))
    assert end.order == ["accepted", "result"]
    past = await running.client.generate(**wish, resume_offset=len(first.png) + 1)
    assert past.error is not None
    assert past.error.code == "OUT_OF_RANGE"

    others: list[dict[str, Any]] = [{"prompt": "two dogs"}, {"negative_prompt": "red moon"}, {"seed": 8}]
    others += [{"width": 64}, {"height": 64}, {"steps": 5}, {"guidance_scale": 1.0}]
    for change in others:
        other = await running.client.generate(**(wish | change))
        assert other.error is not None, change
        assert other.error.code == "ALREADY_EXISTS"
        assert other.error.details["ErrorInfo"].metadata["charged_micro_usd"] == str(PRICE)
    assert running.passes[0] == made, "nothing ran again"
    assert (await running.client.lookup("twice")).charged_micro_usd == PRICE


async def test_a_tenant_has_few_kept_images_in_memory_at_a_time_and_keeps_no_other_from_its_own(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("acme acme-token-0123456789\nglobex globex-token-0123456789\n")
    async with (
        serve(tmp_path / "state", model_folder, tokens=str(tokens)) as running,
        AsyncExitStack() as stack,
    ):
        running.client.metadata = (("authorization", "Bearer acme-token-0123456789"),)
        other = Client(running.client.channel, (("authorization", "Bearer globex-token-0123456789"),))
        wish: dict[str, Any] = {"request_id": "large", "width": 256, "height": 256, "steps": 1}
        png = (await running.client.generate(**wish)).png
        assert len(png) > 2 * 65_536, "more than a window holds"
        assert (await other.generate(**wish)).png == png

        find, read = running.server._journal.find, list[str]()

        def counted(tenant: str, request_id: str, *, with_image: bool = True) -> Any:
            if with_image:
                read.append(tenant)
            return find(tenant, request_id, with_image=with_image)

        monkeypatch.setattr(running.server._journal, "find", counted)
        clients = [await stack.enter_async_context(narrow(running)) for _ in range(MOST_SENT_AGAIN + 2)]
        calls = [client.call(**wish) for client in clients]
        for call in calls:
            assert (
                await anext(aiter(call))
            ).accepted.charged_micro_usd == PRICE  # at once, wherever it has to wait
        await until(lambda: len(read) >= MOST_SENT_AGAIN)
        assert (await other.generate(**wish)).png == png
        assert len(read) == MOST_SENT_AGAIN + 1

        answers = await asyncio.gather(*map(Client.read, clients, calls))
        assert {answer.png for answer in answers} == {png}


async def test_of_many_calls_with_one_request_id_one_runs(tmp_path: Path, model_folder: Path) -> None:
    async with serve(tmp_path, model_folder, max_queue=32) as running:
        calls = [running.client.generate(request_id="same", steps=10) for _ in range(16)]
        answers = await asyncio.gather(*calls)
        assert {a.error.code for a in answers if a.error} <= {"ALREADY_EXISTS"}
        assert len({a.png for a in answers if a.result}) == 1
        assert running.passes[0] == 11  # PNDM makes one pass more than steps
        assert (await running.client.lookup("same")).charged_micro_usd == PRICE


async def test_of_an_id_that_is_being_made_nobody_is_told_that_nothing_runs(
    tmp_path: Path, model_folder: Path
) -> None:
    """As a full queue or the price would tell, for which an edge takes its money back."""
    async with serve(tmp_path, model_folder, max_queue=0) as running:
        first = running.client.call(request_id="same", steps=30)
        await anext(aiter(first))
        for wish in ({"request_id": "same"}, {"request_id": "same", "max_price_micro_usd": 0}):
            again = await running.client.generate(**wish, steps=30)
            assert again.error is not None and again.error.code == "ALREADY_EXISTS"
        first.cancel()
        await running.idle()


async def test_a_server_that_drains_still_sends_what_is_made(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await running.client.generate(request_id="made", steps=1)
    monkeypatch.setattr(running.server._service, "draining", True)
    assert (await running.client.generate(request_id="made", steps=1)).png == made.png
    refused = await running.client.generate(steps=1)
    assert refused.error is not None and refused.error.code == "UNAVAILABLE"


async def test_the_journal_has_a_thread_of_its_own(running: Running) -> None:
    """Or a call that began could be left as running for good, and its money set aside, where no more can be had."""
    ended = threading.Event()
    others = [
        asyncio.create_task(asyncio.to_thread(ended.wait, 60.0)) for _ in range(32)
    ]  # as many as there may be
    assert await running.client.state("never") == "UNKNOWN"
    assert not ended.is_set() and not any(other.done() for other in others)
    ended.set()
    await asyncio.gather(*others)


async def test_the_rest_of_an_image_that_was_never_made_is_not_found(running: Running) -> None:
    answer = await running.client.generate(resume_offset=10)
    assert answer.error is not None
    assert answer.error.code == "NOT_FOUND"
    assert running.passes == [0]


async def test_a_lookup_does_not_read_the_image(running: Running) -> None:
    journal, size = running.server._journal, 32 << 20  # bytes
    spec = Spec(prompt="", negative_prompt="", seed=1, width=64, height=64, steps=4, guidance_scale=3.0)
    journal.begin("default", "large", "f")
    journal.finish("default", "large", Finished(PRICE, "ab", "cd", spec, bytes(size)))
    tracemalloc.start()
    try:
        lookup = await running.client.lookup("large")
        assert (lookup.charged_micro_usd, lookup.sha256) == (PRICE, "ab")
        assert tracemalloc.get_traced_memory()[1] < size / 8
    finally:
        tracemalloc.stop()


async def test_an_image_that_is_kept_needs_no_model(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a server that was just started still loads."""
    made = await running.client.generate(request_id="kept", steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(running.server._service, "serving", None)
        for offset in (0, 100):
            rest = await running.client.generate(request_id="kept", steps=1, resume_offset=offset)
            assert (rest.error, rest.png) == (None, made.png[offset:])
        refused = await running.client.generate(request_id="another", steps=1)
        assert refused.error is not None and refused.error.code == "UNAVAILABLE"


async def test_a_call_that_cannot_be_written_down_has_not_run_and_is_to_come_back_later(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tmp_path / "state", model_folder) as running:
        connection = running.server._service._journal._connection
        full = "BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
        connection.execute(f"CREATE TEMP TRIGGER full BEFORE INSERT ON generations {full}")
        for _ in range(2):
            refused = (await running.client.generate(request_id="r", steps=1)).error
            assert refused is not None and refused.code == "UNAVAILABLE"
            assert refused.details["RetryInfo"].retry_delay.seconds == 60
        assert running.passes == [0]
        assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["journal"]
        connection.execute("DROP TRIGGER full")
        assert (await running.client.generate(request_id="r", steps=1)).error is None


async def test_an_image_whose_charge_cannot_be_written_down_is_not_charged_nor_does_the_log_say_so(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="cloud_server")
    async with serve(tmp_path / "state", model_folder) as running:
        connection = running.server._service._journal._connection
        full = "WHEN NEW.charged_micro_usd > 0 BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
        connection.execute(f"CREATE TEMP TRIGGER full BEFORE UPDATE ON generations {full}")
        answer = await running.client.generate(request_id="r", steps=1)
        assert answer.error is not None and answer.result is None and answer.chunks == []
        await running.idle()
        (line,) = call_lines(caplog)
        assert "charged_micro_usd" not in line and line["outcome"] == answer.error.code
        assert not (await running.client.lookup("r")).charged
        assert await running.client.state("r") == "FAILED"


async def test_an_image_no_longer_kept_is_neither_made_nor_charged_again(
    tmp_path: Path, model_folder: Path
) -> None:
    async with serve(tmp_path, model_folder, keep_images_s=0.0) as running:
        wish: dict[str, Any] = {"request_id": "old", "steps": 1}
        first = await running.client.generate(**wish)
        made = running.passes[0]
        again = await running.client.generate(**wish)
        assert again.error is not None
        assert first.result is not None
        assert again.error.code == "ALREADY_EXISTS"
        assert again.error.details["ErrorInfo"].metadata["sha256"] == first.result.image.sha256
        rest = await running.client.generate(**wish, resume_offset=1)
        assert rest.error is not None
        assert rest.error.code == "NOT_FOUND"
        assert running.passes[0] == made


class Panic(BaseException):
    """What tokenizers written in Rust raise when they panic: no Exception."""


@pytest.mark.parametrize("failure", [RuntimeError, Panic])
async def test_a_pipeline_that_breaks_charges_nothing_and_the_next_call_is_served(
    running: Running, failure: type[BaseException]
) -> None:
    def break_down(*_: Any) -> None:
        raise failure("CUDA error: misaligned address")

    request_id = f"broken-{failure.__name__}"
    hook = running.pipeline.unet.register_forward_hook(break_down)
    answer = await running.client.generate(request_id=request_id)
    hook.remove()
    assert answer.error is not None
    assert answer.error.code == "INTERNAL"
    assert answer.error.message == "the pipeline failed: CUDA error: misaligned address"
    assert await running.client.state(request_id) == "FAILED"
    assert (await running.client.generate(request_id=request_id)).error is None


async def test_what_a_pipeline_says_is_told_also_where_it_is_no_text(running: Running) -> None:
    """As where it names a file whose name is not in UTF-8. gRPC would say UNKNOWN, and log a traceback."""

    def break_down(*_: Any) -> None:
        raise RuntimeError("cannot read caf\udce9.bin")

    hook = running.pipeline.unet.register_forward_hook(break_down)
    answer = await running.client.generate()
    hook.remove()
    assert answer.error is not None
    assert answer.error.code == "INTERNAL"
    assert answer.error.message == "the pipeline failed: cannot read caf?.bin"


async def test_an_image_that_memory_does_not_hold_is_not_asked_for_again_at_once_and_only_the_log_says_who_has_it(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. Process 4711 has 70.2 GiB memory in use."

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError(said)

    hook = running.pipeline.unet.register_forward_hook(full)
    with caplog.at_level("INFO", logger="cloud_server"):
        answer = await running.client.generate(request_id="too-large")
        await running.idle()
    hook.remove()
    assert answer.error is not None
    assert answer.error.code == "INTERNAL"
    assert answer.error.message.startswith(
        "the server has too little memory for this image; ask for a smaller"
    )
    assert "4711" not in str(answer.error)
    assert answer.error.details["RetryInfo"].retry_delay.seconds == 30
    (line,) = call_lines(caplog)
    assert line["cause"] == said
    assert await running.client.state("too-large") == "FAILED"
    assert (await running.client.generate(request_id="too-large")).error is None


async def test_an_image_that_the_safety_checker_blanked_is_neither_sent_nor_charged(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.pipeline, "run_safety_checker", lambda images, *_: (images, [True]))
    answer = await running.client.generate(request_id="withheld", steps=1)
    assert answer.error is not None and answer.chunks == []
    assert answer.error.code == "FAILED_PRECONDITION"
    told = answer.error.details["ErrorInfo"]
    assert (told.reason, told.metadata["charged_micro_usd"]) == ("IMAGE_WITHHELD", "0")
    assert not (await running.client.lookup("withheld")).charged
    assert await running.client.state("withheld") == "FAILED"


async def test_an_image_of_what_is_no_number_is_neither_sent_nor_charged(running: Running) -> None:
    """It would be black."""

    def overflow(_module: Any, _arguments: Any, output: Any) -> Any:
        return tuple(each * float("nan") for each in output)

    hook = running.pipeline.unet.register_forward_hook(overflow)
    answer = await running.client.generate(request_id="no-number")
    hook.remove()
    assert answer.error is not None
    assert answer.error.code == "INTERNAL"
    assert "not finite; try another seed, --dtype float32 or --device cpu" in answer.error.message
    assert await running.client.state("no-number") == "FAILED"
    assert not (await running.client.lookup("no-number")).charged
    assert (await running.client.generate(request_id="no-number")).error is None


async def test_get_model_says_what_is_served_and_for_how_much(running: Running) -> None:
    from routet2i.cloud.v1 import cloud_pb2

    model = await running.client.stub.GetModel(cloud_pb2.GetModelRequest(), timeout=10)
    assert (model.name, model.licence, model.price_micro_usd) == ("miniature", "Apache-2.0", PRICE)
    assert [(size.width, size.height) for size in model.sizes] == [(64, 64)]
    assert (model.default_steps, model.max_steps, model.default_guidance_scale) == (4, 150, 3.0)
    assert (model.queue_length, model.max_queue) == (0, 1)
    answer = await running.client.generate(steps=1)
    assert answer.accepted is not None
    assert model.model_digest == answer.accepted.model_digest


async def test_a_token_names_the_tenant_and_tenants_do_not_see_each_other(
    tmp_path: Path, model_folder: Path
) -> None:
    tokens = tmp_path / "tokens.txt"
    lines = (
        "acme acme-token-0123456789\nacme new-token-0123456789\n\n# others\nglobex globex-token-0123456789\n"
    )
    tokens.write_text(lines, "utf-8-sig")  # with a byte order mark, as editors of Windows do
    async with serve(tmp_path / "state", model_folder, tokens=str(tokens)) as running:
        for metadata in (
            (),
            (("authorization", "Bearer wrong"),),
            (("authorization", "acme-token-0123456789"),),
        ):
            stranger = Client(running.client.channel, metadata)
            answer = await stranger.generate()
            assert answer.error is not None
            assert answer.error.code == "UNAUTHENTICATED"
            with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                await stranger.lookup("mine")
        acme, renewed, globex = (
            Client(running.client.channel, (("authorization", f"Bearer {name}-token-0123456789"),))
            for name in ("acme", "new", "globex")
        )
        first = await acme.generate(request_id="mine", steps=1)
        assert first.result is not None
        assert await globex.state("mine") == "UNKNOWN"
        assert await renewed.state("mine") == "FINISHED"
        other = await globex.generate(request_id="mine", steps=1, prompt="two dogs")
        assert other.result is not None, "request ids are each tenant's own"
        assert other.png != first.png
        assert (await acme.lookup("mine")).sha256 == first.result.image.sha256


def on_disk(running: Running) -> bytes:
    """What all files of the state folder hold."""
    return b"".join(file.read_bytes() for file in Path(running.server.settings.state).iterdir())


async def test_one_log_line_a_request_and_no_prompt_in_it_or_in_a_file(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with caplog.at_level("INFO", logger="cloud_server"):
        name = uuid.uuid4().hex
        await running.client.generate(request_id=name, prompt="a secret cat", steps=1, traceparent=trace)
        await running.client.generate(steps=0)
        await running.idle()
    fields = call_lines(caplog)
    assert [line["outcome"] for line in fields] == ["OK", "INVALID_ARGUMENT"]
    assert fields[0] | {"request_id": name, "tenant": "default", "traceparent": trace} == fields[0]
    assert fields[0]["charged_micro_usd"] == PRICE
    assert "secret" not in str(fields)
    assert b"secret" not in on_disk(running)


async def test_the_log_says_what_a_caller_was_charged_who_leaves_at_that_moment(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    began, finish = threading.Event(), Journal.finish

    def slow(journal: Journal, *arguments: Any) -> None:
        began.set()
        time.sleep(0.3)
        finish(journal, *arguments)

    monkeypatch.setattr(Journal, "finish", slow)
    with caplog.at_level("INFO", logger="cloud_server"):
        call = asyncio.create_task(running.client.generate(request_id=(name := uuid.uuid4().hex), steps=1))
        await until(began.is_set)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await running.idle()
    (line,) = call_lines(caplog)
    assert (line["outcome"], line["charged_micro_usd"]) == ("CANCELLED", PRICE)
    assert (await running.client.lookup(name)).charged


async def test_no_caller_fills_the_log(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("acme acme-token-0123456789\n")
    long = "x" * 50_000
    async with serve(tmp_path / "state", model_folder, tokens=str(tokens)) as running:
        with caplog.at_level("INFO", logger="cloud_server"):
            for metadata in ((), (("authorization", "Bearer acme-token-0123456789"),)):
                caller = Client(running.client.channel, metadata)
                assert (await caller.generate(request_id=long, app=long, traceparent=long)).error is not None
                with pytest.raises(grpc.aio.AioRpcError):
                    await caller.lookup(long)
            await until(lambda: len(call_lines(caplog)) == 4)
    lines = call_lines(caplog)
    assert [line["outcome"] for line in lines] == ["UNAUTHENTICATED"] * 2 + ["INVALID_ARGUMENT"] * 2
    assert all("request_id" not in line for line in lines[:2])
    assert max(len(str(value)) for line in lines for value in line.values()) <= 128


async def test_a_caller_with_a_wrong_token_finds_its_call_in_the_log(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("acme acme-token-0123456789\n")
    async with serve(tmp_path / "state", model_folder, tokens=str(tokens)) as running:
        with caplog.at_level("INFO", logger="cloud_server"):
            assert (await running.client.generate(request_id="mine", app="kiosk")).error is not None
            for name in ("mine", "a = line of my own"):
                with pytest.raises(grpc.aio.AioRpcError):
                    await running.client.lookup(name)
            await until(lambda: len(call_lines(caplog)) == 3)
    lines = call_lines(caplog)
    assert [line["outcome"] for line in lines] == ["UNAUTHENTICATED"] * 3
    assert [line.get("request_id") for line in lines] == ["mine", "mine", None]
    assert all("app" not in line for line in lines)
