"""The device makes one image at a time, and keeps nothing of those that nobody waits for."""

from __future__ import annotations

import asyncio
import gc
import io
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from edge_agent.bundle import Bundle
from edge_agent.device import PROGRESS_EVERY_S, Device, Drawn, Job, _Pace
from edge_agent.diffusion.generator import Generator, Image, Step
from edge_agent.diffusion.sessions import Runtime, Stop
from edge_agent.errors import Busy
from edge_agent.image import PREVIEW_SIDE, Progress
from edge_agent.settings import STARTER


async def test_an_image_goes_with_whoever_asked_for_it() -> None:
    """At once, not when Python next looks for cycles."""
    generator = Generator(Bundle.open(STARTER), Runtime(threads=1))
    _, states = generator.encode("a cat")
    device = Device(max_queue=0)
    gc.collect()
    gc.disable()
    try:
        an_hour_on = time.monotonic() + 3600  # whose timer is not to wait until then
        drawing = device.begin(
            Job(generator, states, states, 1, 4, 1.0, (64, 64), previews=False, deadline=an_hour_on)
        )
        async with aclosing(drawing.events()) as events:
            *_, drawn = [event async for event in events]
        assert isinstance(drawn, Drawn)
        kept = weakref.ref(drawn), weakref.ref(drawing), weakref.ref(drawing._events)
        del drawn, drawing, events
        await device.close()  # whose worker holds what it did last until then
        await asyncio.sleep(0)
        assert [each() for each in kept] == [None] * 3
    finally:
        gc.enable()


async def test_what_was_cancelled_in_the_queue_holds_no_token_states_until_its_turn_comes() -> None:
    generator = Generator(Bundle.open(STARTER), Runtime(threads=1))
    device = Device(max_queue=8)

    def job() -> Job:
        _, states = generator.encode("a cat")
        return Job(generator, states, states, 1, 16, 1.0, (64, 64), previews=False, deadline=None)

    first = device.begin(job())
    waiting = device.begin(job())
    assert waiting.job is not None
    states = weakref.ref(waiting.job.states.tokens)
    assert states() is not None
    waiting.close()
    gc.collect()
    assert states() is None
    async with aclosing(first.events()) as events:
        *_, last = [event async for event in events]
    assert isinstance(last, Drawn)
    await device.close()


async def test_what_was_cancelled_in_the_queue_frees_its_place_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not when its turn comes."""
    generator = Generator(Bundle.open(STARTER), Runtime(threads=1))
    _, states = generator.encode("a cat")
    job = Job(generator, states, states, 1, 4, 1.0, (64, 64), previews=False, deadline=None)
    device, over = Device(max_queue=0), threading.Event()
    device._worker.submit(over.wait, 60)  # as with an image that takes long
    alone_s = device.expected_s((64, 64), 4)
    waiting = device.begin(job)
    assert device.expected_s((64, 64), 4) == 2 * alone_s
    with pytest.raises(Busy):
        device.begin(job)
    waiting.close()
    await asyncio.sleep(0)
    assert device.expected_s((64, 64), 4) == alone_s
    assert not caplog.records, "that nobody waits for it is no fault"
    drawing = device.begin(job)
    over.set()
    async with aclosing(drawing.events()) as events:
        *_, drawn = [event async for event in events]
    assert isinstance(drawn, Drawn)
    await device.close()


async def test_what_an_image_takes_is_forgotten_with_the_models_that_took_it() -> None:
    """Also by an image of theirs that ends later."""
    generator = Generator(Bundle.open(STARTER), Runtime(threads=1))
    _, states = generator.encode("a cat")
    device = Device(max_queue=0)
    guess = device.expected_s((64, 64), 4)

    async def draw() -> None:
        drawing = device.begin(
            Job(generator, states, states, 1, 4, 1.0, (64, 64), previews=False, deadline=None)
        )
        async with aclosing(drawing.events()) as events:
            async for _ in events:
                pass

    await draw()
    assert device.expected_s((64, 64), 4) != guess
    late = asyncio.create_task(draw())
    await asyncio.sleep(0)  # it has begun
    device.measure_anew()
    await late
    assert device.expected_s((64, 64), 4) == guess
    await device.close()


async def test_the_mean_of_what_an_image_takes_begins_anew_with_the_first_of_another_generator() -> None:
    slow, quick = (Generator(Bundle.open(STARTER), Runtime(threads=1)) for _ in range(2))
    _, states = slow.encode("a cat")
    device = Device(max_queue=0)

    async def draw(generator: Generator, steps: int) -> float:
        drawing = device.begin(
            Job(generator, states, states, 1, steps, 1.0, (64, 64), previews=False, deadline=None)
        )
        async with aclosing(drawing.events()) as events:
            *_, drawn = [event async for event in events]
        assert isinstance(drawn, Drawn)
        return sum(drawn.timings_ms[stage] for stage in ("denoise", "decode", "png")) / 1e3

    await draw(slow, 16)
    first = await draw(quick, 4)
    assert device.expected_s((64, 64), 4) == pytest.approx(first)
    second = await draw(quick, 4)
    assert device.expected_s((64, 64), 4) == pytest.approx(0.7 * first + 0.3 * second)
    await device.close()


def test_what_an_image_takes_is_known_by_its_size_and_guessed_by_its_pixels() -> None:
    """A large one must not be taken for as quick as a small one: what a slow cloud leaves of a deadline hangs on it."""

    class Maker:
        pass

    pace, maker = _Pace(), Maker()
    pace.measure(2.0, (64, 64), 4, maker)  # type: ignore[arg-type]
    assert [pace.image_s(size, 4) for size in ((64, 64), (64, 128), (32, 32))] == [2.0, 4.0, 2.0]
    pace.measure(3.0, (64, 128), 4, maker)  # type: ignore[arg-type]
    assert [pace.image_s(size, 4) for size in ((64, 64), (64, 128))] == [2.0, 3.0]


def test_what_an_image_takes_is_told_while_the_first_of_other_sizes_are_made() -> None:
    """By the device's thread; the event loop asks."""

    class Maker:
        pass

    pace, maker = _Pace(), Maker()

    def measure() -> None:
        for width in range(1, 3_000):
            pace.measure(1.0, (width, 1), 1, maker)  # type: ignore[arg-type]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as worker:
            measuring = worker.submit(measure)
            while not measuring.done():
                assert pace.image_s((1, 2), 1) >= 1.0
            measuring.result()
    finally:
        sys.setswitchinterval(before)


def test_what_an_image_takes_goes_by_its_steps() -> None:
    """Else quick ones would let a slow cloud use up what one of many steps needs of a deadline."""

    class Maker:
        pass

    pace, maker = _Pace(), Maker()
    pace.measure(1.0, (64, 64), 4, maker)  # type: ignore[arg-type]
    assert (pace.image_s((64, 64), 4), pace.image_s((64, 64), 16)) == (1.0, 4.0)
    pace.measure(4.0, (64, 64), 16, maker)  # type: ignore[arg-type]
    assert pace.image_s((64, 64), 4) == pytest.approx(1.0)


async def test_an_image_whose_turn_comes_as_its_caller_leaves_is_not_begun() -> None:
    """The worker has taken it, so that it cannot be cancelled any more, and has not yet looked at it."""
    device = Device(max_queue=0)
    drawing = device.begin(Job(None, None, None, 1, 4, 1.0, (64, 64), previews=False, deadline=None))  # type: ignore[arg-type]
    drawing.close()
    assert device._work(drawing, _Pace(), time.perf_counter()) is None
    await device.close()


async def test_of_many_quick_steps_those_are_told_that_somebody_can_watch_and_each_stage_has_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    class Quick:
        def generate(self, *_: object, **__: object) -> Iterator[Step | Image]:
            nonlocal now
            for number in range(1, 11):
                now += 0.4 * PROGRESS_EVERY_S
                yield Step(number, 10, None)
            now += 1.0
            yield Image(np.zeros((64, 64, 3), np.float32))

    def encode(_pixels: object) -> bytes:
        nonlocal now
        now += 2.0
        return b"a PNG"

    clock = SimpleNamespace(perf_counter=lambda: now, monotonic=time.monotonic)
    monkeypatch.setattr("edge_agent.device.time", clock)
    monkeypatch.setattr("edge_agent.device.encode_png", encode)
    device, over = Device(max_queue=0), threading.Event()
    device._worker.submit(over.wait, 60)  # as with an image before it
    drawing = device.begin(Job(Quick(), None, None, 1, 4, 1.0, (64, 64), previews=False, deadline=None))  # type: ignore[arg-type]
    now += 4.0
    over.set()
    async with aclosing(drawing.events()) as events:
        *told, drawn = [event async for event in events]
    assert [event.step for event in told if isinstance(event, Progress)] == [3, 6, 9]
    assert isinstance(drawn, Drawn)
    denoise_ms = 10 * 0.4 * PROGRESS_EVERY_S * 1e3
    assert drawn.timings_ms == pytest.approx({"queue": 4e3, "denoise": denoise_ms, "decode": 1e3, "png": 2e3})
    await device.close()


async def test_a_preview_is_no_larger_than_somebody_looks_at() -> None:
    class Large:
        def generate(self, *_: object, **__: object) -> Iterator[Step | Image]:
            yield Step(1, 1, np.zeros((2 * PREVIEW_SIDE, 4 * PREVIEW_SIDE, 3), np.uint8))
            yield Image(np.zeros((64, 64, 3), np.float32))

    device = Device(max_queue=0)
    drawing = device.begin(Job(Large(), None, None, 1, 4, 1.0, (64, 64), previews=True, deadline=None))  # type: ignore[arg-type]
    async with aclosing(drawing.events()) as events:
        progress, _ = [event async for event in events]
    assert isinstance(progress, Progress) and progress.preview is not None
    with PIL.Image.open(io.BytesIO(progress.preview)) as preview:
        assert preview.size == (PREVIEW_SIDE, PREVIEW_SIDE // 2)
    await device.close()


async def test_an_image_in_the_making_is_stopped_when_whoever_asked_for_it_leaves() -> None:
    class Long(Generator):
        def generate(self, *_: object, stop: Stop, **__: object) -> Iterator[Step | Image]:
            for _ in range(1_000):
                time.sleep(0.01)
                stop.check()
                yield Step(1, 2, None)

    generator = Long(Bundle.open(STARTER), Runtime(threads=1))
    _, states = generator.encode("a cat")
    device = Device(max_queue=0)
    drawing = device.begin(Job(generator, states, states, 1, 4, 1.0, (64, 64), previews=False, deadline=None))
    async with aclosing(drawing.events()) as events:
        await anext(events)
    await asyncio.wait_for(device.close(), 30)
    assert device.images == 0


async def test_what_cannot_be_interrupted_does_not_keep_the_device_from_closing() -> None:
    began, over = threading.Event(), threading.Event()

    class Endless(Generator):
        def generate(self, *_: object, **__: object) -> Iterator[Step | Image]:
            began.set()
            assert over.wait(60)
            yield from ()

    generator = Endless(Bundle.open(STARTER), Runtime(threads=1))
    _, states = generator.encode("a cat")
    device = Device(max_queue=0)
    drawing = device.begin(Job(generator, states, states, 1, 4, 1.0, (64, 64), previews=False, deadline=None))
    await asyncio.to_thread(began.wait)
    drawing.close()
    await asyncio.wait_for(device.close(patience_s=0.05), 30)
    assert device.images == 1
    over.set()
    await asyncio.wait_for(device.close(), 30)
    assert device.images == 0
