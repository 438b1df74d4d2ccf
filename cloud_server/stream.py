"""The way from a call to its caller, which must never hold up the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from cloud_server.errors import CallerGone
from routet2i.cloud.v1 import cloud_pb2

STALLED_READER_S = 30.0  # a caller that takes no message for so long is dropped, and its image given up
QUIET_S = 10.0  # who waits hears something after twice that: proxies end what is silent for a minute


class Stream:
    """The way to one caller, who takes a message at a time. `tell`, `check` and `send` raise CallerGone."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._telling: asyncio.Future[None] | None = None
        self._newest: cloud_pb2.GenerateResponse | None = None

    def tell(self, response: cloud_pb2.GenerateResponse) -> None:
        """Sends without waiting for the caller. While it takes one message only the newest of those after it waits."""
        if self._telling is not None and not self._telling.done():
            self._newest = response
            return
        self.check()
        self._telling = asyncio.ensure_future(self._tell(response))
        self._telling.add_done_callback(_see)

    def check(self) -> None:
        """Returns where the caller has taken what was told, or still may."""
        if self._telling is not None and self._telling.done():
            self._telling.result()

    @asynccontextmanager
    async def kept_open(self) -> AsyncIterator[None]:
        """Tells nothing, in a message without an event, whenever the block has told nothing for a while."""
        beating = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            beating.cancel()

    async def send(self, response: cloud_pb2.GenerateResponse) -> None:
        """Sends after what was told, and returns once the caller has taken it."""
        if self._telling is not None:
            await self._telling
        await self._write(response)

    def close(self) -> None:
        """Gives up what the caller has not taken."""
        if self._telling is not None:
            self._telling.cancel()

    async def _beat(self) -> None:
        while True:
            told = self._telling
            await asyncio.sleep(QUIET_S)
            if self._telling is told and (told is None or (told.done() and not told.exception())):
                self.tell(cloud_pb2.GenerateResponse())

    async def _tell(self, response: cloud_pb2.GenerateResponse) -> None:
        await self._write(response)
        while self._newest is not None:
            response, self._newest = self._newest, None
            await self._write(response)

    async def _write(self, response: cloud_pb2.GenerateResponse) -> None:
        # Not wait_for: before Python 3.12 it swallows a cancellation that meets the end of what it waits for.
        writing = asyncio.ensure_future(self._context.write(response))
        writing.add_done_callback(_see)
        try:
            await asyncio.wait([writing], timeout=STALLED_READER_S)
            if not writing.done():
                raise CallerGone(
                    f"the caller read nothing for {STALLED_READER_S:.0f} s; read the stream as it comes"
                )
            writing.result()
        except grpc.aio.InternalError as error:  # the write and the caller's leaving crossed
            raise CallerGone("the caller went away") from error
        finally:
            writing.cancel()


def _see(done: asyncio.Future[Any]) -> None:
    """Takes note of an error that nobody may be left to await: asyncio would log it."""
    if not done.cancelled():
        done.exception()
