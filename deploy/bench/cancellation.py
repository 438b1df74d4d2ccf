"""Cancellations at random moments, from the caller's leaving to the device's being free, and what memory they leave.

Its own process is started as `python deploy/bench/cancellation.py BUNDLE THREADS CANCELLATIONS PROVIDERS`.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np

from child import Reply, answer, asked, held_bytes
from edge_agent.daemon import Daemon
from edge_agent.diffusion.providers import CPU, State
from edge_agent.settings import resolve
from errors import BenchError
from estimate import Estimate, quantile
from overhead import pixels, same
from plan import PROMPTS, Plan
from routet2i.edge.v1 import edge_pb2
from routet2i.edge.v1.edge_pb2_grpc import EdgeAgentServiceStub
from routet2i.image.v1 import image_pb2
from row import Row

GROUP = "cancellation"
FREE_MS, GROWTH_MB = 300.0, 5.0  # targets; the second is what an allocator's own caches may come to
LOADING_EVERY = 10  # every tenth image finds the models unloaded, so that cancellations also meet loading
_POLL_S = 0.001


def rows(plan: Plan) -> list[Row]:
    """From cancelling to a free device, p99; memory after the last cancellation over memory after a quarter of them."""
    return measured(plan, GROUP, plan.bundle, plan.cancellations)


def measured(plan: Plan, group: str, bundle: Path, cancellations: int, prefix: str = "") -> list[Row]:
    """The same of a bundle, and of so many cancellations of its images."""
    found = asked(plan.threads, "cancellation.py", bundle, plan.threads, cancellations, plan.providers)
    free, memory = found["free_ms"], found["idle_mb"]
    few = -(-len(memory) // 8)  # one snapshot varies by as much as there may be
    before, after = quantile(memory[len(memory) // 4 :][:few]), quantile(memory[-few:])
    return [
        Row.at_most(
            group,
            f"{prefix}from cancelling to a free device, p99",
            quantile(free, 0.99),
            "ms",
            FREE_MS,
            note=f"p50 {quantile(free).value:.1f} ms, longest {max(free):.0f} ms, of the {len(free)} of "
            f"{cancellations} that found an image on the device; another image was the same after every 50th",
            details=found,
        ),
        Row.at_most(
            group,
            f"{prefix}memory grown by cancellations, models unloaded",
            Estimate.exact(after.value - before.value, few),
            "MB",
            GROWTH_MB,
            note=f"{before.value:.1f} MB after a quarter of them, {after.value:.1f} MB after all; medians of {few}",
        ),
    ]


async def measure(folder: Path, threads: int, cancellations: int, providers: str = CPU) -> Reply:
    """A daemon in this process on a real socket, and a caller who leaves at random moments."""
    draw = random.Random(0)
    found: Reply = {"free_ms": [], "idle_mb": []}
    with tempfile.TemporaryDirectory() as state:
        address = f"unix:{state}/agent.sock"
        flags = {"listen": address, "state": state, "bundle": str(folder), "threads": str(threads)}
        daemon = Daemon(resolve(flags | {"providers": providers}, {}))
        await daemon.startup()
        serving = asyncio.create_task(daemon.serve())
        await until(lambda: daemon.agent is not None or serving.done())
        if serving.done():
            await serving  # which raises what kept it from loading
        agent = daemon.agent
        assert agent is not None  # noqa: S101  # as was waited for
        await until(
            lambda: all(standing.state is not State.WARMING_UP for standing in agent.models.providers)
        )
        if (best := providers.split(",")[0]) != agent.models.providers[0].name:
            reasons = {standing.name: standing.reason for standing in agent.models.providers}
            raise BenchError(f"the daemon does not use {best}: {reasons[best]}")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = EdgeAgentServiceStub(channel)  # type: ignore[no-untyped-call]

            def call(seed: int) -> grpc.aio.UnaryStreamCall:
                prompt = PROMPTS[seed % len(PROMPTS)]
                image = image_pb2.ImageRequest(prompt=prompt, seed=seed)
                request = edge_pb2.GenerateRequest(
                    image=image, routing=edge_pb2.ROUTING_LOCAL_ONLY, preview=True
                )
                return stub.Generate(request)

            async def whole(seed: int) -> np.ndarray:
                return pixels(b"".join([response.image_chunk.data async for response in call(seed)]))

            async def whole_s() -> float:
                began = time.perf_counter()
                await whole(0)
                return 1.1 * (time.perf_counter() - began)  # so that some are cancelled when they are done

            expected = await whole(0)
            warm_s = await whole_s()
            await asyncio.to_thread(agent.models.unload)
            cold_s = await whole_s()
            for number in range(cancellations):
                longest_s = warm_s
                if number % LOADING_EVERY == 0:
                    await asyncio.to_thread(agent.models.unload)
                    found["idle_mb"].append(held_bytes() / 1e6)
                    longest_s = cold_s
                calling = call(number + 1)
                reading = asyncio.ensure_future(calling.read())
                await asyncio.sleep(draw.uniform(0, longest_s))
                drawing = agent.device.images > 0
                calling.cancel()
                began = time.perf_counter()
                await until(lambda: not agent.device.images)
                if drawing:
                    found["free_ms"].append((time.perf_counter() - began) * 1e3)
                await asyncio.gather(reading, return_exceptions=True)
                if number % 50 == 0 and not same(await whole(0), expected, providers):
                    raise BenchError(f"after {number + 1} cancellations an image is another than before")
        daemon.stop()
        await serving
        await daemon.shutdown()
    return found


async def until(holds: Callable[[], bool]) -> None:
    """Returns once it holds, to a millisecond."""
    while not holds():  # noqa: ASYNC110  # nobody sets an event for it
        await asyncio.sleep(_POLL_S)


if __name__ == "__main__":
    bundle_folder, thread_count, count, names = sys.argv[1:]
    answer(lambda: lambda: asyncio.run(measure(Path(bundle_folder), int(thread_count), int(count), names)))
