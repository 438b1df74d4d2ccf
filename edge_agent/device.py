"""The device this daemon runs on: makes one image at a time, and keeps a bounded queue before it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from edge_agent.diffusion.generator import Generator, Image
from edge_agent.diffusion.sessions import Stop
from edge_agent.diffusion.text_encoder import TextStates
from edge_agent.errors import Busy, Cancelled, DeadlinePassed
from edge_agent.image import PREVIEW_SIDE, Progress, encode_png

PROGRESS_EVERY_S = 0.05
"""Nobody watches more than twenty steps a second, and to tell one takes a hundredth of a small image's time. With
previews, which were asked for, every step is told."""

_GUESS_S = 1.0
"""How long an image takes, for the first caller who is told when to come back. From then on it is measured."""

_RECENT = 0.3
"""Weight of the newest image in the running mean of what an image takes."""


@dataclass(frozen=True)
class Job:
    """One image for this device."""

    generator: Generator
    states: TextStates
    negative_states: TextStates
    seed: int
    steps: int
    guidance_scale: float
    previews: bool
    deadline: float | None  # reading of time.monotonic()


@dataclass(frozen=True)
class Drawn:
    """A finished image: PNG, images that waited or were in the making when it came in, and what each stage took."""

    png: bytes
    queue_position: int
    timings_ms: Mapping[str, float]


class Device:
    """One worker thread, so that the local models, whichever they are, make one image at a time."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.images = 0  # waiting or in the making
        self._image_s: float | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="device")

    @property
    def waiting(self) -> int:
        """Images in the queue, without the one in the making."""
        return max(0, self.images - 1)

    def expected_s(self) -> float:
        """How long an image that came now would take, the queue before it included."""
        return (self._image_s or _GUESS_S) * (self.images + 1)

    async def draw(self, job: Job) -> AsyncGenerator[Progress | Drawn, None]:
        """Progress, at most every PROGRESS_EVERY_S, then the image. Closing the iterator stops the work at once.

        Raises Busy when the queue is full, DeadlinePassed, GenerationFailed, BundleError.
        """
        if self.images > self.max_queue:
            raise Busy(
                f"{self.waiting} images are waiting on this device, as many as its queue holds; try again later",
                retry_after_s=self._image_s or _GUESS_S,
            )
        position = self.images
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Progress | Drawn | Exception] = asyncio.Queue()

        def post(event: Progress | Drawn | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        deadline = None
        if job.deadline is not None:  # an event like the others: one timer an image, and none a step
            passed = DeadlinePassed(
                "the deadline passed while the image waited or was being made; allow more time"
            )
            deadline = loop.call_later(job.deadline - time.monotonic(), events.put_nowait, passed)
        stop = Stop()
        work = self._worker.submit(self._work, job, position, time.perf_counter(), stop, post)
        self.images += 1
        work.add_done_callback(lambda done: loop.call_soon_threadsafe(self._left, done))
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Drawn):
                    return
        finally:
            stop.set()
            work.cancel()
            if deadline is not None:
                deadline.cancel()

    async def close(self) -> None:
        """Wait until the worker has left the models. The callers have been told to go before."""
        await asyncio.to_thread(self._worker.shutdown)

    def _left(self, _: Future[None]) -> None:
        self.images -= 1

    def _work(
        self,
        job: Job,
        position: int,
        asked: float,
        stop: Stop,
        post: Callable[[Progress | Drawn | Exception], None],
    ) -> None:
        """In the worker thread: the whole image. Every outcome is posted; nothing is raised."""
        began = stepped = told = time.perf_counter()
        try:
            for event in job.generator.generate(
                job.states,
                job.negative_states,
                job.seed,
                job.steps,
                job.guidance_scale,
                previews=job.previews,
                stop=stop,
            ):
                if isinstance(event, Image):
                    decoded = time.perf_counter()
                    png = encode_png(event.pixels)
                    done = time.perf_counter()
                    self._image_s = _mean(self._image_s, done - began)
                    timings_ms = {
                        "queue": (began - asked) * 1e3,
                        "denoise": (stepped - began) * 1e3,
                        "decode": (decoded - stepped) * 1e3,
                        "png": (done - decoded) * 1e3,
                    }
                    post(Drawn(png, position, timings_ms))
                    continue
                preview = None
                if event.preview is not None:
                    preview = encode_png(event.preview, longest_side=PREVIEW_SIDE)
                stepped = time.perf_counter()
                if job.previews or stepped - told >= PROGRESS_EVERY_S:
                    post(Progress(event.k, event.n, preview))
                    told = stepped
        except Cancelled:
            pass  # whoever set the stop has gone
        except Exception as error:
            post(error)


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else (1 - _RECENT) * before + _RECENT * newest
