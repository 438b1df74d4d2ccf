"""The daemon's life: start up, serve, drain, shut down. The only place where the parts are put together."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge_agent import listening, loader
from edge_agent.agent import Agent, Terms
from edge_agent.cloud import CloudClient
from edge_agent.device import Device
from edge_agent.diffusion import providers
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.sessions import lacks_memory
from edge_agent.errors import DeviceNotReady, RouteT2IError, StartRefused
from edge_agent.health import Health
from edge_agent.log import events
from edge_agent.malformed import HandOverMalformed
from edge_agent.pacing import Pacing
from edge_agent.purchase import Purchases
from edge_agent.quota import Ledger, uptime
from edge_agent.resident import Resident
from edge_agent.service import EdgeAgentService
from edge_agent.settings import Settings, expanded
from routet2i.edge.v1 import edge_pb2, edge_pb2_grpc

log = events(__name__)

Found = TypeVar("Found")

SERVICE = edge_pb2.DESCRIPTOR.services_by_name["EdgeAgentService"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

CHANNEL_OPTIONS = (
    # Without it two daemons share a port in silence, each getting some of the calls.
    ("grpc.so_reuseport", 0),
    # Many apps ping to see that we are there. After a few pings in silence, as in the queue, gRPC would close the
    # connection and end its calls: for Node with RESOURCE_EXHAUSTED, "Bandwidth exhausted".
    ("grpc.http2.max_ping_strikes", 0),
    # An app that asks nothing connects anew when it does; until then it takes a file descriptor from the others.
    ("grpc.max_connection_idle_ms", 300_000),
    # Past a thousand calls that Python has not looked at yet, gRPC would cancel some by itself, with neither a line in
    # the log nor a word of when to come back. Who may wait is the device's to say.
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
WORKERS = 4
"""Threads that wait for the ledger's disk and look at the cloud's images, beside those that draw and read prompts."""

CLOSE_S = 1.0
"""What handlers that were told to stop get to say so before their connections close."""

ROOM_BYTES = 256 * 1024
"""Of a request beside the longest prompt and negative prompt: enough for one that is too long to be told so by us."""


class Daemon:
    """One edge agent. `startup()`, then `serve()` until `stop()` is called, then `shutdown()`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.address = settings.address  # with the port that was found, once it listens
        self._stop = asyncio.Event()
        self._told_to_stop = False
        self._hurry = asyncio.Event()
        self._health = Health(SERVICE)
        self._working: list[asyncio.Future[Any]] = []  # of threads that nothing can interrupt
        self._tasks: set[asyncio.Task[Any]] = set()  # that nobody need await; a shutdown ends them
        self._warming = asyncio.Lock()  # two at a time would share a cache, which one may throw away
        self._reloading = asyncio.Lock()
        self._doubts: asyncio.Task[None] | None = None
        self._folder: asyncio.Future[str] | None = None  # the models', as it was last looked for
        self.lost: DeviceNotReady | None = None  # why it stopped by itself
        self.agent: Agent | None = None  # once the models are loaded

    async def startup(self) -> None:
        """Opens ledger and address; health says NOT_SERVING. Raises StartRefused or LedgerError."""
        settings = self.settings
        listening.check(settings.address)
        asyncio.get_running_loop().set_default_executor(_workers())
        ledger = Ledger.open(settings.ledger_file, settings.budget, settings.rate, uptime=uptime)
        try:
            # Now that the ledger is ours: of two that start at once only one comes here.
            listening.clear(settings.address)
            self._purchases = Purchases(ledger, _cloud_client(settings))
            self._service = EdgeAgentService(self.reload, self._models_folder, self._doubt)
            await self._listen()
        except BaseException:
            ledger.close()
            raise

    async def serve(self) -> None:
        """Loads the bundle and serves it until `stop()`. Raises what `loader.load` does, and LedgerError."""
        loading = self._load(self.settings)
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((stopped, loading), return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                return
            terms = Terms(self.settings.max_price, self.settings.cloud_timeout_s, self.settings.png_facts)
            device = Device(self.settings.max_queue)
            pacing = None
            if self.settings.pace_budget:
                pacing = Pacing(self.settings.budget, self.settings.state_folder)
            self.agent = Agent(loading.result(), device, self._purchases, terms, pacing=pacing)
            del loading  # it would keep these models also once others have succeeded them
            await self._purchases.start()
            self._service.agent = self.agent
            self.agent.models.rest()
            self._health.set(health_pb2.HealthCheckResponse.SERVING)
            await self._log_serving()
            self._begin(self._warm_up(self.agent.models))
            await stopped
        finally:
            stopped.cancel()

    async def reload(self, model: str = "") -> Agent:
        """Takes up the model of that name, or what the settings name now, and returns the agent that serves it.

        Both bundles' models are in memory until the requests that began with the old ones have ended. Raises what
        `loader.load` does when the new one is refused: then the old one goes on.

        A caller who goes away does not stop it once it has begun: what is loaded by then must be served or given back.
        """
        await self._reloading.acquire()
        reload = self._begin(self._reload(model))
        reload.add_done_callback(lambda _: self._reloading.release())
        try:
            return await asyncio.shield(reload)
        except asyncio.CancelledError:
            reload.add_done_callback(_log_if_refused)
            raise

    async def shutdown(self) -> None:
        """Drains: health NOT_SERVING, new requests refused, those in flight get the grace period to finish."""
        self._service.draining = True
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
        log.info("draining", in_flight=self._service.in_flight)
        idle = asyncio.ensure_future(self._service.idle())
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((idle, hurry), timeout=self.settings.grace_s, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurry.cancel()
        self._service.cut_off()
        self._health.end()
        await self._server.stop(CLOSE_S)
        await self._service.idle()  # a cancelled image leaves the device at once
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.agent is not None:
            self.agent.close()
            await self.agent.device.close()
        await self._purchases.close()
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

    @property
    def still_working(self) -> bool:
        """Whether a thread loads models, warms them up or looks for their folder, or an image's is in the midst of an
        operator that takes long: nothing can interrupt either.
        """
        drawing = self.agent is not None and self.agent.device.images > 0
        return drawing or any(not working.done() for working in self._working)

    async def _listen(self) -> None:
        # A character has at most four bytes.
        request_bytes = 4 * 2 * self.settings.max_prompt_characters + ROOM_BYTES
        self._server = grpc.aio.server(
            interceptors=(HandOverMalformed(),),
            options=(*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", min(request_bytes, 2**31 - 1))),
        )
        edge_pb2_grpc.add_EdgeAgentServiceServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), self._server)
        self.address = listening.bind(self._server, self.settings.address)
        await self._server.start()
        log.info("listening", address=self.address)

    async def _reload(self, model: str) -> Agent:
        # The thread ends by itself, also when we shut down.
        return await self._take_up(await asyncio.shield(self._load(self.settings, model)))

    async def _take_up(self, models: Resident) -> Agent:
        """Serve these models from now on."""
        assert self.agent is not None  # noqa: S101  # the service asks for it before
        self._service.agent = self.agent = self.agent.succeeded_by(models)
        models.rest()
        await self._log_serving()
        self._begin(self._warm_up(models))
        return self.agent

    def _load(self, settings: Settings, model: str = "") -> asyncio.Future[Resident]:
        standings = self.agent.models.providers if self.agent is not None else ()
        taken = {each.name for each in standings if each.state is providers.State.IN_USE}
        return self._in_thread("loader", partial(loader.load, settings, taken, model))

    async def _models_folder(self) -> str:
        """Where the served model is chosen; empty where the settings name it. Its disk may hang: then all who ask wait
        for the one thread that looks, which none of those is that wait for the ledger.
        """
        if self.settings.bundle:
            return ""
        if self._folder is None or self._folder.done():
            look = partial(os.path.realpath, self.settings.store.folder)
            self._folder = self._in_thread("models folder", look)
        return await asyncio.shield(self._folder)

    def _doubt(self) -> None:
        """An image or a decision failed on this device: it may have been lost."""
        if self._doubts is None or self._doubts.done():
            self._doubts = self._begin(self._look_at_device())

    async def _look_at_device(self) -> None:
        """Where what the models run on no longer works, take them up anew on what does, or stop where the settings
        allow nothing else. A GPU that fell off the bus, or was suspended, is lost to a process until its end.
        """
        assert self.agent is not None  # noqa: S101  # which has failed
        models = self.agent.models
        lost = await self._lost_provider(models)
        if lost is None or self._stop.is_set():
            return
        name, failure = lost
        log.warning("device lost", provider=name, error=failure)
        served = replace(self.settings, bundle=str(models.reader.bundle.folder))
        try:
            async with self._reloading:
                if self.agent.models is models:  # nobody has taken up others meanwhile
                    await self._take_up(await asyncio.shield(self._load(served)))
        except Exception as error:  # whatever it is, nothing can be made here any more
            _log_refused(error)
            if not self._stop.is_set():
                again = f"{name} no longer works in this process: {failure}; start edge-agent again"
                self.lost = DeviceNotReady(again)
                self.drain()

    async def _lost_provider(self, models: Resident) -> tuple[str, str] | None:
        """The first of what they run on that no longer works, and why, other than for want of memory."""
        for each in models.providers:
            if each.state is providers.State.IN_USE and each.name != providers.CPU:
                probe = partial(providers.probe, each.name)
                failure = await asyncio.shield(self._in_thread("probe", probe))
                if failure and not lacks_memory(failure):
                    return each.name, failure
        return None

    async def _warm_up(self, models: Resident) -> None:
        """Opens the models on better providers while they serve, and has them serve there once they can.

        One after another: what has begun cannot be interrupted. Of those that wait, the last models' alone is left.
        """
        async with self._warming:
            if models.open_better is not None and not models.succeeded:
                await self._open_better(models, models.open_better)

    async def _open_better(self, models: Resident, open_better: Callable[[], Generator]) -> None:
        began = time.monotonic()
        bundle = models.reader.bundle.folder
        log.info("warming up", bundle=bundle, provider=models.warming)
        try:
            better = await asyncio.shield(self._in_thread("warm-up", open_better))
        except Exception as error:  # whatever it is, the models that serve go on
            foreseen = isinstance(error, (RouteT2IError, OSError))
            failure = str(error) if foreseen else f"{type(error).__name__}: {error}"
            models.stay(f"it could not be opened: {failure}")
            log.warning("warm-up failed", bundle=bundle, error=failure, exc_info=not foreseen)
        else:
            models.take_up(better)
            seconds = round(time.monotonic() - began, 1)
            log.info("warmed up", bundle=bundle, seconds=seconds)

    def _begin(self, work: Coroutine[Any, Any, Found]) -> asyncio.Task[Found]:
        """In a task that ends whether or not somebody awaits it, at the latest in a shutdown."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _in_thread(self, name: str, work: Callable[[], Found]) -> asyncio.Future[Found]:
        """What `work` returns. In a daemon thread, so that a daemon told to stop need not wait for it."""
        outcome: concurrent.futures.Future[Found] = concurrent.futures.Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, name=name, daemon=True).start()
        working = asyncio.wrap_future(outcome)
        # Asked for its error also where the end was faster: asyncio warns of those that nobody asked for.
        working.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._working = [*(each for each in self._working if not each.done()), working]
        return working

    async def _log_serving(self) -> None:
        assert self.agent is not None  # noqa: S101  # which has been made
        bundle, named = self.agent.reader.bundle, self.settings.models and not self.settings.bundle
        calibrated = self.agent.decider.calibrated
        log.info("serving", bundle=bundle.folder, digest=bundle.model_digest, calibrated=calibrated)
        advice = await self.agent.advice()
        if named and not self.settings.store.there:  # it may be misspelt
            advice.append(
                f"the models folder {self.settings.store.folder} is not there, so the starter serves: get models with "
                "`edge-agent models pull`, or name another folder with --models"
            )
        for each in advice:
            log.warning("advice", do=each)


def _workers() -> concurrent.futures.ThreadPoolExecutor:
    """All of them started now: later there may be none to be had, and an image would be lost that is paid for."""
    workers = concurrent.futures.ThreadPoolExecutor(WORKERS, thread_name_prefix="worker")
    all_there = threading.Barrier(WORKERS)
    for _ in range(WORKERS):
        workers.submit(all_there.wait, 1.0)  # each is taken until the last one has begun
    return workers


def _log_if_refused(reload: asyncio.Task[Agent]) -> None:
    """Of a reload whose caller has gone away, so that nobody else hears of it."""
    if not reload.cancelled() and (error := reload.exception()) is not None:
        _log_refused(error)


def _log_refused(error: BaseException) -> None:
    foreseen = isinstance(error, (RouteT2IError, OSError))
    log.warning("model refused", error=str(error), exc_info=None if foreseen else error)


async def run(settings: Settings) -> Daemon:
    """Starts a daemon and serves until one of `STOP_SIGNALS`, a second one of which cuts the grace short, or SIGHUP.

    Returns the stopped daemon. Raises what its `startup` and `serve` do.
    """
    daemon = Daemon(settings)
    loop = asyncio.get_running_loop()
    try:
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, daemon.stop)
        for number in HANG_UP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, and it stays so
                loop.add_signal_handler(number, daemon.drain)
    except NotImplementedError:  # on Windows
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(daemon.stop))
    await daemon.startup()
    try:
        await daemon.serve()
    finally:
        await daemon.shutdown()
    # Another one, as the interpreter ends, would make a failure of what has ended well.
    for number in (*STOP_SIGNALS, *HANG_UP_SIGNALS):
        with suppress(NotImplementedError):  # on Windows
            loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    return daemon


def _cloud_client(settings: Settings) -> CloudClient | None:
    if not settings.cloud:
        return None
    token = None
    if settings.cloud_token:
        try:
            text = expanded(settings.cloud_token).read_text(encoding="utf-8-sig")  # as Windows saves it, too
            token = text.strip()
        except (OSError, ValueError) as error:
            raise StartRefused(f"cannot read the token in {settings.cloud_token}: {error}") from error
        # As a line of the server's own list has it.
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise StartRefused(
                f"{settings.cloud_token} must hold one token of ASCII and nothing else, on one line"
            )
    ca_file = expanded(settings.cloud_ca) if settings.cloud_ca else None
    if ca_file is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
        except OSError as error:  # ssl's own among them
            raise StartRefused(
                f"--cloud-ca {ca_file} has no certificate that can be read: {error.strerror or error}; a PEM file is "
                "expected"
            ) from error
    return CloudClient(
        settings.cloud, ca_file=ca_file, token=token, connect_timeout_s=settings.cloud_connect_timeout_s
    )
