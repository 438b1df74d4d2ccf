"""The daemon's life: start up, serve, drain, shut down. The only place where the parts are put together."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import logging
import os
import shutil
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
import onnxruntime as ort
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge_agent import memory
from edge_agent.address import split_address
from edge_agent.agent import Agent, Terms
from edge_agent.bundle import DECODER, MANIFEST, Bundle, Manifest
from edge_agent.cloud import CloudClient
from edge_agent.device import Device
from edge_agent.diffusion import providers
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.providers import Choice
from edge_agent.diffusion.sessions import Runtime, lacks_memory
from edge_agent.errors import (
    BundleError,
    DeviceNotReady,
    GenerationFailed,
    OutOfMemory,
    RehearsalEnded,
    RouteT2IError,
    StartRefused,
    Unfit,
)
from edge_agent.purchase import Purchases
from edge_agent.quota import Ledger, uptime
from edge_agent.reader import Reader
from edge_agent.request import Limits
from edge_agent.resident import Resident
from edge_agent.service import EdgeAgentService, HandOverMalformed
from edge_agent.settings import Settings, expanded
from routet2i.edge.v1 import edge_pb2, edge_pb2_grpc

log = logging.getLogger(__name__)

Found = TypeVar("Found")

SERVICE = edge_pb2.DESCRIPTOR.services_by_name["EdgeAgentService"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

CHANNEL_OPTIONS = (
    # Without it two daemons share a port in silence, each getting some of the calls.
    ("grpc.so_reuseport", 0),
    # Many apps ping to see that we are there. After a few pings in silence, as in the queue, gRPC would close the
    # connection and end its calls: for Node with RESOURCE_EXHAUSTED, "Bandwidth exhausted".
    ("grpc.http2.max_ping_strikes", 0),
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
CLOSE_S = 1.0
"""What handlers that were told to stop get to say so before their connections close."""

ROOM_BYTES = 256 * 1024
"""Of a request beside the longest prompt and negative prompt: enough for one that is too long to be told so by us."""

PRIVATE = 0o700
"""Mode of the socket's folder: only the user whose daemon it is gets in."""


class Daemon:
    """One edge agent. `startup()`, then `serve()` until `stop()` is called, then `shutdown()`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.address = settings.address  # with the port that was found, once it listens
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._health = health.aio.HealthServicer()
        self._working: list[asyncio.Future[Any]] = []  # of threads that nothing can interrupt
        self._warm_ups: set[asyncio.Task[None]] = set()
        self._warming = asyncio.Lock()  # two at a time would share a cache, which one may throw away
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[Agent]] = set()  # which end whether or not their callers stay
        self._doubts: asyncio.Task[None] | None = None
        self.lost: DeviceNotReady | None = None  # why it stopped by itself
        self.agent: Agent | None = None  # once the models are loaded

    async def startup(self) -> None:
        """Opens ledger and address; health says NOT_SERVING. Raises StartRefused or LedgerError."""
        settings = self.settings
        path = settings.address.removeprefix("unix:")
        socket_file = None if path == settings.address else Path(path)
        if socket_file is not None:
            _check_socket(socket_file)
        ledger = Ledger.open(settings.ledger_file, settings.budget, settings.rate, uptime=uptime)
        try:
            if socket_file is not None:
                # Now that the ledger is ours: of two that start at once only one comes here.
                _clear_socket(socket_file)
            self._purchases = Purchases(ledger, _cloud_client(settings))
            self._service = EdgeAgentService(self.reload, partial(_models_folder, settings), self._doubt)
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            await self._listen()
        except BaseException:
            ledger.close()
            raise

    async def serve(self) -> None:
        """Loads the bundle and serves it until `stop()`. Raises StartRefused, BundleError or LedgerError."""
        loading = self._load(self.settings)
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((stopped, loading), return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                return
            terms = Terms(self.settings.max_price, self.settings.cloud_timeout_s, self.settings.png_facts)
            device = Device(self.settings.max_queue)
            self.agent = Agent(loading.result(), device, self._purchases, terms)
            del loading  # it would keep these models also once others have succeeded them
            await self._purchases.start()
            self._service.agent = self.agent
            self.agent.models.rest()
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            await self._log_serving()
            self._begin_warm_up(self.agent.models)
            await stopped
        finally:
            stopped.cancel()

    async def reload(self, model: str = "") -> Agent:
        """Takes up the model of that name, or what the settings name now, and returns the agent that serves it.

        Both bundles' models are in memory until the requests that began with the old ones have ended. Raises
        BundleError, or what else `Settings.bundle_folder` does, when the new one is refused: then the old one goes on.

        A caller who goes away does not stop it: what is loaded by then must be served or given back.
        """
        reload = asyncio.create_task(self._reload(model))
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)
        try:
            return await asyncio.shield(reload)
        except asyncio.CancelledError:
            reload.add_done_callback(_log_refused)
            raise

    async def shutdown(self) -> None:
        """Drains: health NOT_SERVING, new requests refused, those in flight get the grace period to finish."""
        self._service.draining = True
        await self._health.enter_graceful_shutdown()
        log.info("draining", extra={"fields": {"in_flight": self._service.in_flight}})
        idle = asyncio.ensure_future(self._service.idle())
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((idle, hurry), timeout=self.settings.grace_s, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurry.cancel()
        self._service.cut_off()
        await self._server.stop(CLOSE_S)
        await self._service.idle()  # a cancelled image leaves the device at once
        tasks = [*self._reloads, *self._warm_ups, *([self._doubts] if self._doubts is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.agent is not None:
            self.agent.close()
            await self.agent.device.close()
        await self._purchases.close()
        log.info("stopped", extra={"fields": {}})

    def stop(self) -> None:
        """Asks for the shutdown. A second call cuts the grace period short."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def drain(self) -> None:
        """Asks for the shutdown, however often: a terminal that closes may say so twice."""
        self._stop.set()

    @property
    def still_working(self) -> bool:
        """Whether a thread loads models or warms them up, or an image's is in the midst of an operator that takes long:
        nothing can interrupt either.
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
        self.address = self._bind()
        await self._server.start()
        log.info("listening", extra={"fields": {"address": self.address}})

    def _bind(self) -> str:
        address = self.settings.address
        before = os.umask(0o177)  # a socket file that only its owner may connect to
        try:
            port = 0 if _taken(address) else self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        finally:
            os.umask(before)
        if port == 0:
            raise StartRefused(
                f"cannot listen on {address}: it is taken, or not this machine's. Stop what uses it, or choose "
                "another address with --listen"
            )
        if address.startswith("unix:"):
            return address
        host, _ = split_address(address)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _reload(self, model: str) -> Agent:
        async with self._reloading:
            # The thread ends by itself, also when we shut down.
            return await self._take_up(await asyncio.shield(self._load(self.settings, model)))

    async def _take_up(self, models: Resident) -> Agent:
        """Serve these models from now on."""
        assert self.agent is not None  # noqa: S101  # the service asks for it before
        self._service.agent = self.agent = self.agent.succeeded_by(models)
        models.rest()
        await self._log_serving()
        self._begin_warm_up(models)
        return self.agent

    def _load(self, settings: Settings, model: str = "") -> asyncio.Future[Resident]:
        standings = self.agent.models.providers if self.agent is not None else ()
        taken = {each.name for each in standings if each.state is providers.State.IN_USE}
        return self._in_thread("loader", lambda: _load_or_give_back(settings, taken, model))

    def _doubt(self) -> None:
        """An image or a decision failed on this device: it may have been lost."""
        if self._doubts is None or self._doubts.done():
            self._doubts = asyncio.create_task(self._look_at_device())

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
        log.warning("device lost", extra={"fields": {"provider": name, "error": failure}})
        served = replace(self.settings, bundle=str(models.reader.bundle.folder))
        try:
            async with self._reloading:
                if self.agent.models is models:  # nobody has taken up others meanwhile
                    await self._take_up(await asyncio.shield(self._load(served)))
        except Exception as error:  # whatever it is, nothing can be made here any more
            foreseen = isinstance(error, (RouteT2IError, OSError))
            fields = {"error": str(error)}
            log.warning("model refused", extra={"fields": fields}, exc_info=None if foreseen else error)
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

    def _begin_warm_up(self, models: Resident) -> None:
        warm_up = asyncio.create_task(self._warm_up(models))
        self._warm_ups.add(warm_up)
        warm_up.add_done_callback(self._warm_ups.discard)

    async def _warm_up(self, models: Resident) -> None:
        """Opens the models on better providers while they serve, and has them serve there once they can.

        One after another: what has begun cannot be interrupted. Of those that wait, the last models' alone is left.
        """
        async with self._warming:
            if models.open_better is not None and not models.succeeded:
                await self._open_better(models, models.open_better)

    async def _open_better(self, models: Resident, open_better: Callable[[], Generator]) -> None:
        began = time.monotonic()
        fields: dict[str, Any] = {"bundle": models.reader.bundle.folder}
        log.info("warming up", extra={"fields": fields | {"provider": models.warming}})
        try:
            better = await asyncio.shield(self._in_thread("warm-up", open_better))
        except Exception as error:  # whatever it is, the models that serve go on
            foreseen = isinstance(error, (RouteT2IError, OSError))
            failure = str(error) if foreseen else f"{type(error).__name__}: {error}"
            models.stay(f"it could not be opened: {failure}")
            log.warning(
                "warm-up failed", exc_info=not foreseen, extra={"fields": fields | {"error": failure}}
            )
        else:
            models.take_up(better)
            seconds = round(time.monotonic() - began, 1)
            log.info("warmed up", extra={"fields": fields | {"seconds": seconds}})

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
        self._working = [*(each for each in self._working if not each.done()), working]
        return working

    async def _log_serving(self) -> None:
        assert self.agent is not None  # noqa: S101  # which has been made
        bundle, named = self.agent.reader.bundle, self.settings.models and not self.settings.bundle
        fields: dict[str, Any] = {"bundle": bundle.folder, "digest": bundle.model_digest}
        log.info("serving", extra={"fields": fields | {"calibrated": self.agent.calibrated}})
        advice = await self.agent.advice()
        if named and not self.settings.store.there:  # it may be misspelt
            advice.append(
                f"the models folder {self.settings.store.folder} is not there, so the starter serves: get models with "
                "`edge-agent models pull`, or name another folder with --models"
            )
        for each in advice:
            log.warning("advice", extra={"fields": {"do": each}})

    async def _set_health(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)


def _log_refused(reload: asyncio.Task[Agent]) -> None:
    """Of a reload whose caller has gone away, so that nobody else hears of it."""
    if not reload.cancelled() and (error := reload.exception()) is not None:
        foreseen = isinstance(error, (RouteT2IError, OSError))
        log.warning(
            "model refused", extra={"fields": {"error": str(error)}}, exc_info=None if foreseen else error
        )


def _models_folder(settings: Settings) -> str:
    """Where the served model is chosen; empty where the settings name it."""
    return "" if settings.bundle else os.path.realpath(settings.store.folder)


async def run(settings: Settings) -> Daemon:
    """Starts a daemon and serves until one of `STOP_SIGNALS`, a second one of which cuts the grace short, or SIGHUP.

    Returns the stopped daemon. Raises StartRefused, BundleError or LedgerError.
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


def _load_or_give_back(settings: Settings, taken: Collection[str], model: str) -> Resident:
    """The models. Where one of them cannot be loaded those before it go at once: the error would hold on to them."""
    try:
        return _load_models(settings, taken, model)
    except BaseException as error:
        _let_go(error)
        raise


def _let_go(error: BaseException) -> None:
    """Give back what the frames hold that `error` came through."""
    held: BaseException | None = error
    while held is not None:
        traceback.clear_frames(held.__traceback__)
        held = held.__cause__
    memory.give_back()


def _load_models(settings: Settings, taken: Collection[str] = (), model: str = "") -> Resident:
    folder = settings.store.path(model) if model else settings.bundle_folder
    # The folder itself and no link to it: what the link leads to may change, and these graphs be loaded again.
    # Path.resolve would raise something of its own for a loop of links.
    bundle = Bundle.open(os.path.realpath(folder))
    generator, choice = _open(settings, bundle, taken)
    followed = settings.state_folder if settings.follow_prompts else None
    reader = Reader(bundle, generator.tokenizer, generator.text_encoder, settings.routing_rate, followed)
    manifest = bundle.manifest
    limits = Limits(
        sizes=manifest.sizes,
        steps=manifest.steps,
        max_prompt_chars=settings.max_prompt_characters,
        apps=frozenset(settings.apps) or None,
    )
    better = partial(_open_better, settings, generator, choice, bundle) if choice.better else None
    if not (bundle.folder / MANIFEST).exists():
        raise BundleError(f"{bundle.folder} was removed while it was loaded")
    return Resident(reader, generator, limits, choice, settings.keep_alive_s, better)


def _open(settings: Settings, bundle: Bundle, taken: Collection[str]) -> tuple[Generator, Choice]:
    """The models on the best provider that opens and runs them, unless the settings name which: that does or nothing.
    What has no room for them is passed over, too, unless it is `taken`: the models on it may be about to go.
    """
    unfit = _unfit(bundle.manifest)
    while True:
        choice = providers.find(settings.providers, unfit)
        best, serving = choice.serving[0], tuple(map(providers.full_name, choice.serving))
        try:
            return _tried(bundle, Runtime(threads=settings.threads or None, providers=serving)), choice
        except (BundleError, OutOfMemory, GenerationFailed) as error:  # a GPU may be smaller than the machine
            in_the_way = isinstance(error, OutOfMemory) and best in taken
            if settings.providers and isinstance(error, GenerationFailed):
                said = f"--providers names {best}, which does not run this model: {error}"
                raise providers.refusal(error.message)(said) from error
            if settings.providers or best == providers.CPU or in_the_way:
                raise
            unfit[best] = f"it does not run this model: {error.message}"
            _let_go(error)  # before the next provider takes as much


def _tried(bundle: Bundle, runtime: Runtime) -> Generator:
    """The models, opened there, and run once where that is not the CPU."""
    generator = Generator(bundle, runtime)
    if not runtime.on_cpu:
        generator.tried()
    return generator


def _unfit(manifest: Manifest) -> dict[str, str]:
    """Providers that would take long over such models to run them badly, and why."""
    if "int8" not in map(manifest.dtype, (manifest.denoiser, DECODER)):
        return {}
    return {
        "tensorrt": "it takes graphs in eight bits in hundreds of pieces, with an engine for each; the form for a GPU "
        "is fp16"
    }


def _open_better(settings: Settings, generator: Generator, choice: Choice, bundle: Bundle) -> Generator:
    """The generator on the better providers, with what they compile kept for the next start.

    What was kept may be of another driver or half written: where it cannot be used it goes, and is made anew. Not where
    memory ran out, or we are stopped, or nothing kept is to blame. Raises BundleError, GenerationFailed, OSError.
    """
    cache = settings.cache_folder.absolute() / "engines" / f"{bundle.model_digest[:16]}-{ort.__version__}"
    kept = cache.is_dir() and any(cache.iterdir())

    def runtime(graph: str) -> Runtime:
        half = bundle.manifest.dtype(graph) == "fp16"
        return Runtime(
            threads=settings.threads or None,
            providers=tuple(map(providers.full_name, choice.better)),
            provider_options=providers.options(choice.better, cache, half=half),
        )

    def opened() -> Generator:
        return generator.on(runtime(bundle.manifest.denoiser), runtime(DECODER))

    try:
        return opened()
    except (RehearsalEnded, Unfit, OutOfMemory):
        raise
    except RouteT2IError:
        if not kept:
            raise
        shutil.rmtree(cache)
        return opened()


def _cloud_client(settings: Settings) -> CloudClient | None:
    if not settings.cloud:
        return None
    token = None
    if settings.cloud_token:
        try:
            token = (
                expanded(settings.cloud_token).read_text(encoding="utf-8-sig").strip()
            )  # as Windows saves it, too
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


def _taken(address: str) -> bool:
    """Whether somebody listens at one of the addresses of a name. gRPC is content where another one of them is free:
    both would then get some of the calls.
    """
    if address.startswith("unix:"):
        return False
    host, port = split_address(address)
    with suppress(socket.gaierror):  # gRPC may know the name all the same
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


def _check_socket(path: Path) -> None:
    """Make the socket's folder. What lies at `path` afterwards, if anything, is the socket of a daemon that was killed.

    Raises StartRefused when a daemon answers there, or something else lies there.
    """
    try:
        path.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        if not path.exists():
            return
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise StartRefused(f"{path} is there and is no socket; choose another with --listen unix:PATH")
        if _answers(path):
            raise StartRefused(
                f"an edge-agent is already running at {path}; use that one, stop it, or choose another --listen"
            )
    except OSError as error:
        raise StartRefused(
            f"cannot make the socket {path}: {error.strerror}; choose another with --listen unix:PATH"
        ) from error


def _clear_socket(path: Path) -> None:
    """Take away the socket of a daemon that was killed. Raises what `_check_socket` does."""
    _check_socket(path)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StartRefused(f"cannot remove the old socket {path}: {error.strerror}") from error


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        refused = probe.connect_ex(str(path))
    # A socket whose process is gone refuses. One that does not take us in (full backlog) is somebody's, and refuses on
    # macOS alone: there the lock on the ledger tells, unless that lies elsewhere.
    return refused not in (errno.ECONNREFUSED, errno.ENOENT)
