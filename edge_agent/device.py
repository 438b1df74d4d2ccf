"""The device this daemon runs on: makes one image at a time, and keeps a bounded queue before it."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from edge_agent.diffusion.generator import Generator, Image
from edge_agent.diffusion.sessions import Stop
from edge_agent.diffusion.text_encoder import TextStates
from edge_agent.errors import Busy, Cancelled, DeadlinePassed
from edge_agent.image import PREVIEW_SIDE, Progress, encode_png
from edge_agent.manifest import Size

PROGRESS_EVERY_S = 0.05
"""Nobody watches more than twenty steps a second, and to tell one takes a hundredth of a small image's time. With
previews, which were asked for, every step is told."""

_GUESS_S = 1.0
"""How long an image takes, until one has been made. From then on it is measured."""

LEAVE_S = 5.0
"""What an operator in the making gets to end before the device is closed without its worker."""

_RECENT = 0.3
"""Weight of the newest image in the running mean of what a step takes."""


@dataclass(frozen=True)
class Job:
    """One image for this device."""

    generator: Generator
    states: TextStates
    negative_states: TextStates
    seed: int
    steps: int
    guidance_scale: float
    size: Size
    previews: bool
    deadline: float | None  # reading of time.monotonic()


@dataclass(frozen=True)
class Drawn:
    """A finished image: PNG, images that waited or were in the making when it came in, and what each stage took."""

    job: Job
    png: bytes
    queue_position: int
    timings_ms: Mapping[str, float]


class Drawing:
    """An image that waits or is in the making. Whoever has begun it iterates over `events`, or calls `close`."""

    def __init__(self, job: Job, position: int) -> None:
        # None once it is stopped: the executor keeps what waited until its turn comes.
        self.job: Job | None = job
        self.position = position  # in the queue; 0 is drawn at once
        self.stopped = Stop()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Progress | Drawn | BaseException] = asyncio.Queue()
        self._work: Future[Drawn | None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        if job.deadline is not None:  # an event like the others: one timer an image, and none a step
            passed = DeadlinePassed(
                "the deadline passed while the image waited or was being made; allow more time"
            )
            left_s = job.deadline - time.monotonic()
            self._deadline = self._loop.call_later(left_s, self._events.put_nowait, passed)

    def start(self, work: Future[Drawn | None], left: Callable[[], None]) -> None:
        """It is the device's `work` now; `left` is called when that has ended, whichever way."""
        self._work = work
        # One message from thread to thread for all of it: each wakes the event loop.
        work.add_done_callback(lambda ended: self._loop.call_soon_threadsafe(self._ended, ended, left))

    def _ended(self, work: Future[Drawn | None], left: Callable[[], None]) -> None:
        left()
        if not work.cancelled() and (outcome := work.exception() or work.result()):
            self._events.put_nowait(outcome)

    def tell(self, progress: Progress) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, progress)

    async def events(self) -> AsyncGenerator[Progress | Drawn, None]:
        """Progress, at most every PROGRESS_EVERY_S, then the image. Closing the iterator stops the work at once.

        Raises DeadlinePassed, GenerationFailed, BundleError, and Busy (OutOfMemory among it).
        """
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Drawn):
                    return
        finally:
            self.close()

    def close(self) -> None:
        """End the work at once. Stopping what has ended does nothing."""
        self.stopped.set()
        self.job = None  # with its token states
        if self._work is not None:
            self._work.cancel()
            self._work = None  # it refers to this, and holds the image
        if self._deadline is not None:
            self._deadline.cancel()


class _Pace:
    """How long the images of one bundle's models take, by their size, in proportion to their steps."""

    def __init__(self) -> None:
        # The running mean of a step's share of an image, s, and what made the last, which this does not keep in memory.
        # Replaced as a whole: the event loop asks while the device's thread measures.
        self._known: Mapping[Size, tuple[float, weakref.ref[Generator]]] = {}

    def image_s(self, size: Size, steps: int) -> float:
        """Of an image of that size and so many steps. By its pixels, while none of its size has been made: rather too
        long than too short.
        """
        if size in self._known:
            return steps * self._known[size][0]
        pixels = size[0] * size[1]
        known = [step_s * max(1.0, pixels / (w * h)) for (w, h), (step_s, _) in self._known.items()]
        return steps * max(known) if known else _GUESS_S

    def measure(self, image_s: float, size: Size, steps: int, generator: Generator) -> None:
        """Count an image of `generator` in. With the first one of another, which runs the models elsewhere, the mean
        begins anew; until then the one before, of slower images, leaves callers time enough.
        """
        step_s = image_s / steps
        mean_s, by = self._known.get(size, (0.0, None))
        if by is not None and by() is generator:
            step_s = (1 - _RECENT) * mean_s + _RECENT * step_s
        self._known = {**self._known, size: (step_s, weakref.ref(generator))}


class Device:
    """One worker thread, so that the local models, whichever they are, make one image at a time."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.images = 0  # waiting or in the making
        self._free = asyncio.Event()  # set while there are none
        self._free.set()
        self._pace = _Pace()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._worker.submit(int)  # which starts its thread now: later there may be none to be had

    @property
    def waiting(self) -> int:
        """Images in the queue, without the one in the making."""
        return max(0, self.images - 1)

    def expected_s(self, size: Size, steps: int) -> float:
        """How long an image of that size and so many steps would take that came now, the queue before it included, as
        if of its kind.
        """
        return self._pace.image_s(size, steps) * (self.images + 1)

    def measure_anew(self) -> None:
        """Other models make the images that come from now on: what those before took says nothing of theirs."""
        self._pace = _Pace()

    def begin(self, job: Job) -> Drawing:
        """Take the job into the queue. Needs a running event loop. Raises Busy when the queue is full."""
        if self.images > self.max_queue:
            raise Busy(
                f"{self.waiting} images are waiting on this device, as many as its queue holds; try again later",
                retry_after_s=self._pace.image_s(job.size, job.steps),
            )
        drawing = Drawing(job, self.images)
        work = self._worker.submit(self._work, drawing, self._pace, time.perf_counter())
        self.images += 1
        self._free.clear()
        drawing.start(work, self._left)
        return drawing

    async def close(self, patience_s: float = LEAVE_S) -> None:
        """Wait until the worker has left the models, which it does between two of a graph's operators. The callers have
        been told to go before. After `patience_s` seconds `images` says whether it has.
        """
        self._worker.shutdown(wait=False, cancel_futures=True)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._free.wait(), patience_s)
            await asyncio.to_thread(self._worker.shutdown)  # it lets go of what it did last

    def _left(self) -> None:
        self.images -= 1
        if not self.images:
            self._free.set()

    def _work(self, drawing: Drawing, pace: _Pace, asked: float) -> Drawn | None:
        """In the worker thread: the whole image, or None when whoever has begun it has gone.

        What it raises reaches them too, a panic in a native library included.
        """
        job = drawing.job
        if job is None:
            return None
        began = stepped = told = time.perf_counter()
        with suppress(Cancelled):
            for event in job.generator.generate(
                job.states,
                job.negative_states,
                job.seed,
                job.steps,
                job.guidance_scale,
                previews=job.previews,
                stop=drawing.stopped,
                size=job.size,
            ):
                if isinstance(event, Image):
                    decoded = time.perf_counter()
                    png = encode_png(event.pixels)
                    done = time.perf_counter()
                    pace.measure(done - began, job.size, job.steps, job.generator)
                    timings_ms = {
                        "queue": (began - asked) * 1e3,
                        "denoise": (stepped - began) * 1e3,
                        "decode": (decoded - stepped) * 1e3,
                        "png": (done - decoded) * 1e3,
                    }
                    return Drawn(job, png, drawing.position, timings_ms)
                preview = None
                if event.preview is not None:
                    preview = encode_png(event.preview, longest_side=PREVIEW_SIDE)
                stepped = time.perf_counter()
                if job.previews or stepped - told >= PROGRESS_EVERY_S:
                    drawing.tell(Progress(event.k, event.n, preview))
                    told = stepped
        return None
