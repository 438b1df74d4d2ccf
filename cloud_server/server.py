"""The server's life: start up, serve, drain, shut down. The only place where the parts are put together."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cloud_server.admission import Admission
from cloud_server.credentials import Credentials
from cloud_server.errors import InvalidRequest, JournalError, StartRefused
from cloud_server.generator import Generator, usable_device
from cloud_server.health import Health
from cloud_server.journal import Journal
from cloud_server.log import events
from cloud_server.malformed import HandOverMalformed
from cloud_server.model import CARD_FILE, INDEX_FILE, open_model
from cloud_server.request import Wish, validate
from cloud_server.service import CloudServerService, Serving
from cloud_server.settings import Settings, split_address
from routet2i.cloud.v1 import cloud_pb2, cloud_pb2_grpc

log = events("cloud_server")

SERVICE = cloud_pb2.DESCRIPTOR.services_by_name["CloudServerService"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

CHANNEL_OPTIONS = (
    # Without it two servers share a port in silence, each getting some of the calls.
    ("grpc.so_reuseport", 0),
    # A dead link is noticed in 10 + 5 s; ping_timeout as well, or a stalled peer takes over a minute.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # Edges ping every 10 s, also between calls; without these two they are sent away with too_many_pings.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # Who connects and asks nothing takes a file descriptor from those who do.
    ("grpc.max_connection_idle_ms", 300_000),
    # Past a thousand calls that Python has not looked at yet, gRPC would cancel some by itself, with neither a line in
    # the log nor a word of when to come back. Who may wait is the queue's to say.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 200_000),
)
if sys.platform == "win32":
    # Ctrl-Break is what another program can send there: its SIGTERM would be the end at once.
    STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGBREAK)
    HANG_UP_SIGNALS: tuple[signal.Signals, ...] = ()
else:
    STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
    HANG_UP_SIGNALS = (signal.SIGHUP,)
ROOM_BYTES = 256 * 1024  # of a request beside the prompts, and for one too long to be told so by us
TIDY_EVERY_S = 5.0  # how long an image that is no longer kept may stay in the journal's file
TIDY_AGAIN_S = 300.0  # when that is tried again after a failure, which is a line of the log each time
STEP_S = 10.0  # what a denoising step gets to end once its caller is cut off; in a dead driver it never does
CLOSE_S = 1.0  # what handlers that were told to stop get to say so before their connections close


class Server:
    """One cloud server. `startup()`, then `serve()` until `stop()` is called, then `shutdown()`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.port = 0
        self._stop = asyncio.Event()
        self._told_to_stop = False
        self._hurry = asyncio.Event()
        self._health = Health(SERVICE)

    async def startup(self) -> None:
        """Opens the journal and the port; health says NOT_SERVING. Raises StartRefused."""
        settings = self.settings
        self._credentials = Credentials(settings)
        self._journal = Journal.open(settings.journal_file, keep_images_s=settings.keep_images_s)
        self._service = CloudServerService(
            price_micro_usd=settings.price_micro_usd,
            admission=Admission(settings.max_queue),
            journal=self._journal,
            credentials=self._credentials,
        )
        try:
            await self._listen()
        except BaseException:
            self._service.close()
            self._journal.close()
            raise
        self._keeping = [
            asyncio.create_task(self._credentials.keep_current()),
            asyncio.create_task(self._keep_tidy()),
        ]

    async def serve(self) -> None:
        """Loads the model and serves it until `stop()`.

        Raises StartRefused when the model cannot be loaded, and DeviceLost once its device is.
        """
        loading = self._load()
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((stopped, loading), return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                return
            serving = self._service.serving = loading.result()
            self._health.set(health_pb2.HealthCheckResponse.SERVING)
            generator, model = serving.generator, serving.generator.model
            device, dtype = generator.device, generator.dtype
            log.info("serving", model=model.name, digest=model.digest, device=device, dtype=dtype)
            lost = asyncio.wrap_future(generator.lost)
            await asyncio.wait((stopped, lost), return_when=asyncio.FIRST_COMPLETED)
            if not self._stop.is_set():
                log.error("device lost", device=device, error=lost.result().log_only)
                raise lost.result()
        finally:
            stopped.cancel()

    async def shutdown(self) -> None:
        """Drains: health NOT_SERVING, new requests refused, those in flight get the grace period to finish."""
        self._service.draining = True
        for task in self._keeping:
            task.cancel()
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        log.info("draining", in_flight=self._service.in_flight)
        idle = asyncio.ensure_future(self._service.idle())
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((idle, hurry), timeout=self.settings.grace_s, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurry.cancel()
        # A request that is cut off leaves the model at its next step, and amid one that hangs when it is cut off again.
        for _ in range(2):
            self._service.cut_off()
            await asyncio.wait([asyncio.ensure_future(self._service.idle())], timeout=STEP_S)
        self._health.end()
        await self._server.stop(CLOSE_S)
        self._service.close()
        self._journal.close()
        if self._service.serving is not None:
            self._service.serving.generator.close()
        log.info("stopped")

    def stop(self) -> None:
        """Asks for the shutdown. A second call cuts the grace period short."""
        if self._told_to_stop:
            self._hurry.set()
        self._told_to_stop = True
        self._stop.set()

    def drain(self) -> None:
        """Asks for the shutdown, however often: a terminal that closes may say so twice."""
        self._stop.set()

    async def _listen(self) -> None:
        # A character has at most four bytes.
        request_bytes = 4 * 2 * self.settings.max_prompt_characters + ROOM_BYTES
        self._server = grpc.aio.server(
            interceptors=(HandOverMalformed(),),
            options=(*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", min(request_bytes, 2**31 - 1))),
        )
        cloud_pb2_grpc.add_CloudServerServiceServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), self._server)
        self.port = self._bind()
        await self._server.start()
        log.info("listening", address=self.settings.listen, port=self.port, tls=self.settings.tls)

    async def _keep_tidy(self) -> None:
        """Does away with images that are no longer kept, for as long as it runs."""
        while True:
            await asyncio.sleep(TIDY_EVERY_S)
            try:
                while await asyncio.to_thread(self._journal.prune):
                    pass
            except (JournalError, RuntimeError):  # the journal says why; or no thread is to be had
                await asyncio.sleep(TIDY_AGAIN_S)

    def _bind(self) -> int:
        listen = self.settings.listen
        with suppress(RuntimeError, OSError, UnicodeError):
            if not _taken(listen) and (port := self._credentials.add_port(self._server, listen)):
                return port
        raise StartRefused(
            f"cannot listen on {listen}: the port is taken, or the address is not this machine's. Stop what uses it, "
            "or choose another with --listen"
        )

    def _load(self) -> asyncio.Future[Serving]:
        """Loads the model in a daemon thread, so that a server told to stop need not wait for it."""
        loading: concurrent.futures.Future[Serving] = concurrent.futures.Future()

        def load() -> None:
            try:
                loading.set_result(self._open_model())
            except BaseException as error:
                loading.set_exception(error)

        threading.Thread(target=load, name="loader", daemon=True).start()
        loaded = asyncio.wrap_future(loading)
        # Asked for its error also where the end was faster: asyncio warns of those that nobody asked for.
        loaded.add_done_callback(lambda done: done.cancelled() or done.exception())
        return loaded

    def _open_model(self) -> Serving:
        settings = self.settings
        device = usable_device(settings.device)  # before all of the model is read for its digest
        generator = Generator.load(open_model(settings.model), device, settings.dtype, settings.threads)
        limits = generator.limits(
            max_side=settings.max_side,
            max_steps=settings.max_steps,
            max_prompt_characters=settings.max_prompt_characters,
        )
        try:
            validate(Wish(request_id="default", app="", prompt="a"), limits, drawn_seed=0)
        except InvalidRequest as error:
            raise StartRefused(
                f"the model's own defaults are not served: {error.message}. Write others to {CARD_FILE} beside its "
                f"{INDEX_FILE}, or raise the setting that bounds them"
            ) from error
        return Serving(generator, limits)


async def run(settings: Settings) -> None:
    """Starts a server and serves until one of `STOP_SIGNALS`, a second one of which cuts the grace short, or SIGHUP.

    Raises StartRefused and DeviceLost.
    """
    server = Server(settings)
    loop = asyncio.get_running_loop()
    if sys.platform == "win32":  # whose loops know no signals
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(server.stop))
    else:
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, server.stop)
        for number in HANG_UP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                loop.add_signal_handler(number, server.drain)
    await server.startup()
    try:
        await server.serve()
    finally:
        await server.shutdown()
    # Another one, as the process ends, would make a failure of what has ended well.
    for number in (*STOP_SIGNALS, *HANG_UP_SIGNALS):
        if sys.platform != "win32":
            loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


def _taken(address: str) -> bool:
    """Whether somebody listens at one of the addresses of a name. gRPC is content where another one of them is free:
    both would then get some of the calls.
    """
    host, port = split_address(address)
    with suppress(socket.gaierror, UnicodeError):  # gRPC may know the name all the same
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return any(_in_use(family, place) for family, _, _, _, place in found)
    return False


def _in_use(family: int, place: Any) -> bool:
    try:
        with socket.socket(family) as probe:
            if os.name == "posix":  # as gRPC does; on Windows it would share the address
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False
