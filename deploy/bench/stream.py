"""A gRPC stream of an image's messages with nothing behind it: what nobody who streams an image can do without.

Its server is started as `python deploy/bench/stream.py ADDRESS` and ends with its input.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from grpc.experimental import ChannelOptions

SERVICE, METHOD = "bench.Stream", "Replay"
LOADED_S = 60.0

IN_CALLERS_THREAD = ((ChannelOptions.SingleThreadedUnaryStream, 1),)
"""As docs/examples/client.py asks: a stream is read in the caller's thread, 0.3 ms sooner than through gRPC's own."""

_PAUSED = struct.Struct("d")


@contextmanager
def running_stream() -> Iterator[Callable[[Sequence[int], float], float]]:
    """Of messages of so many bytes, with a pause of so many seconds after the first: the seconds beside the pause until
    the last one.
    """
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/stream.sock"
        command = [sys.executable, __file__, address]
        with (
            subprocess.Popen(command, stdin=subprocess.PIPE) as server,
            grpc.insecure_channel(address, options=IN_CALLERS_THREAD) as channel,
        ):
            grpc.channel_ready_future(channel).result(LOADED_S)
            call: Any = channel.unary_stream(f"/{SERVICE}/{METHOD}")

            def stream(sizes: Sequence[int], pause_s: float) -> float:
                began = time.perf_counter()
                messages = call(json.dumps([list(sizes), pause_s]).encode())
                *_, last = itertools.islice(messages, len(sizes))
                took = time.perf_counter() - began
                for _ in messages:  # no more, but its status
                    pass
                return took - float(_PAUSED.unpack_from(last)[0])

            yield stream
            server.communicate()


async def replay(request: bytes, context: Any) -> None:
    """The messages. The last one begins with how long the pause became."""
    (first, *between, last), pause_s = json.loads(request)
    await context.write(bytes(first))
    began = time.perf_counter()
    await asyncio.sleep(pause_s)
    paused = _PAUSED.pack(time.perf_counter() - began)
    for size in between:
        await context.write(bytes(size))
    await context.write(paused + bytes(max(0, last - len(paused))))


async def serve(address: str) -> None:
    """Until standard input ends."""
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(replay)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    server.add_insecure_port(address)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
