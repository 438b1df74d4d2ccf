"""A better set of sessions gets ready while another serves, and takes over between two images.

The better ones here are sessions of one fixed size that also name a second provider of onnxruntime's CPU build. It
takes no operator, and rehearsals are told that it did; all else is as with one that does.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import pytest_asyncio

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion import generator as generator_module
from edge_agent.diffusion import plugins, providers, rehearsal
from edge_agent.diffusion.generator import Generator, Image
from edge_agent.diffusion.sessions import Runtime, Session
from edge_agent.errors import BundleError, OutOfMemory, ProcessEnded, Unfit
from edge_agent.loader import load
from edge_agent.manifest import DECODER, DENOISER, FUSED, Size
from edge_agent.settings import resolve
from routet2i.edge.v1 import edge_pb2
from tests.routed import SLOW_STEPS
from tests.running import LOCAL, Answer, Here, daemon_here, until

SECOND = "azure"
BETTER = Runtime(threads=1, providers=("AzureExecutionProvider", "CPUExecutionProvider"))
IN_USE, WARMING_UP, PASSED_OVER = (
    edge_pb2.ProviderState.Value(f"PROVIDER_STATE_{name}") for name in ("IN_USE", "WARMING_UP", "PASSED_OVER")
)


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second provider passes for one that runs some of the graph."""

    def rehearse(*what: Any) -> frozenset[str]:
        return rehearsal.rehearse(*what) | {BETTER.providers[0]}

    monkeypatch.setattr("edge_agent.diffusion.generator.rehearse", rehearse)


class Gate:
    """Holds warm-ups back until it is opened. What then happens is the real thing, or `failure`."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.failure: Exception | None = None
        self.begun = self.running = self.most = 0  # warm-ups, in all, now and at once


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    on = Generator.on

    def held(generator: Generator, *runtimes: Runtime) -> Generator:
        made.begun += 1
        made.running += 1
        made.most = max(made.most, made.running)
        try:
            assert made.open.wait(60)
            if made.failure is not None:
                generator.encode("")  # to compare with, it runs what serves
                raise made.failure
            return on(generator, *runtimes)
        finally:
            made.running -= 1

    monkeypatch.setattr(Generator, "on", held)
    return made


@pytest_asyncio.fixture
async def here(gate: Gate, routed_bundle: Path, tmp_path: Path) -> AsyncIterator[Here]:
    async with daemon_here(
        routed_bundle, tmp_path / "state", providers=f"{SECOND},cpu", cache=tmp_path / "cache"
    ) as here:
        yield here
        gate.open.set()


async def standings(here: Here) -> dict[str, Any]:
    return {each.name: each for each in (await here.app.status()).providers}


def made_s(answer: Answer) -> float:
    """What the device took for the image."""
    assert answer.result is not None
    timings_ms = {timing.stage: timing.milliseconds for timing in answer.result.timings}
    return sum(timings_ms[stage] for stage in ("denoise", "decode", "png")) / 1e3


async def test_it_serves_while_it_warms_up_and_changes_over_between_images(here: Here, gate: Gate) -> None:
    found = await standings(here)
    assert (found["cpu"].state, found[SECOND].state) == (IN_USE, WARMING_UP)
    assert "cpu serves meanwhile" in found[SECOND].reason
    first = weakref.ref(here.daemon.agent.models.generator.denoiser.session)
    before = await here.app.generate(routing=LOCAL, seed=5)

    call = here.app.call(routing=LOCAL, seed=6, steps=SLOW_STEPS, preview=True)
    await here.app.read(call, until="progress")
    gate.open.set()

    async def changed() -> bool:
        return bool((await standings(here))[SECOND].state == IN_USE)

    await until(changed)
    assert here.daemon.agent.models.generator.denoiser.session is not first()
    rest = await here.app.read(call)
    assert rest.result is not None and rest.progress[-1].step == rest.progress[-1].steps
    await here.restless()

    def gone() -> bool:
        gc.collect()
        return first() is None

    await until(gone)  # with the memory of its weights
    device = here.daemon.agent.device
    assert before.result is not None
    steps = before.result.image.steps
    mean_s = 0.7 * made_s(before) + 0.3 * made_s(rest) * steps / SLOW_STEPS
    assert device.expected_s((64, 64), steps) == pytest.approx(mean_s, rel=1e-4), (
        "nothing better is known yet"
    )
    after = await here.app.generate(routing=LOCAL, seed=5)
    assert device.expected_s((64, 64), steps) == pytest.approx(made_s(after), rel=1e-4)
    difference = np.asarray(after.picture, int) - np.asarray(before.picture, int)
    assert np.abs(difference).max() <= 1
    assert [each.name for each in (await here.app.status()).providers][:2] == [SECOND, "cpu"]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (BundleError("unet/model.onnx: out of memory"), "unet/model.onnx: out of memory"),
        (
            MemoryError("no room"),
            "MemoryError: no room",
        ),  # what nobody foresaw must not look like a warm-up for ever
    ],
)
async def test_what_cannot_be_opened_is_passed_over_with_the_reason(
    here: Here, gate: Gate, caplog: pytest.LogCaptureFixture, failure: Exception, reason: str
) -> None:
    gate.failure = failure
    gate.open.set()

    async def gave_up() -> bool:
        return bool((await standings(here))[SECOND].state == PASSED_OVER)

    await until(gave_up)
    assert (await standings(here))[SECOND].reason == f"it could not be opened: {reason}"
    (told,) = (record for record in caplog.records if record.message == "warm-up failed")
    assert bool(told.exc_info) is isinstance(failure, MemoryError), "where is asked of a bug alone"
    assert (await here.app.generate(routing=LOCAL)).result is not None


async def test_what_a_warm_up_that_failed_has_loaded_is_unloaded_again(
    gate: Gate, routed_bundle: Path, tmp_path: Path
) -> None:
    """It runs what serves, to compare with, and that may have been unloaded since."""
    gate.failure = BundleError("unet/model.onnx: out of memory")
    settings = {"providers": f"{SECOND},cpu", "cache": tmp_path / "cache", "keep_alive_s": 0.2}
    async with daemon_here(routed_bundle, tmp_path / "state", **settings) as here:
        assert here.daemon.agent is not None
        models = here.daemon.agent.models

        def down() -> bool:
            return not any(session.loaded_at for session in models._sessions)

        await until(down)
        gate.open.set()
        await until(lambda: models._failure)
        await until(down)


@pytest.mark.parametrize("in_use", [False, True])
async def test_what_only_other_sizes_take_is_unloaded_once_it_has_warmed_up(
    gate: Gate, sized_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_use: bool
) -> None:
    settings = {"providers": f"{SECOND},cpu", "cache": tmp_path / "cache"}
    async with daemon_here(sized_bundle, tmp_path / "state", **settings) as here:
        assert here.daemon.agent is not None
        models = here.daemon.agent.models
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))  # what unloads, too
        before = [await here.app.generate(routing=LOCAL, seed=5, width=width) for width in (64, 96)]
        call = here.app.call(routing=LOCAL, steps=SLOW_STEPS, preview=True) if in_use else None
        if call is not None:
            await here.app.read(call, until="progress")
        gate.open.set()
        await until(lambda: models.generator.spare_sessions)
        if call is not None:
            assert (await here.app.read(call)).result is not None

        def loaded() -> set[bool]:
            return {session.loaded_at is not None for session in models.generator.spare_sessions}

        await until(lambda: loaded() == {False})
        after = [await here.app.generate(routing=LOCAL, seed=5, width=width) for width in (64, 96)]
        assert [answer.picture.size for answer in after] == [(64, 64), (96, 64)]
        for one, other in zip(before, after, strict=True):
            assert np.abs(np.asarray(one.picture, int) - np.asarray(other.picture, int)).max() <= 1
        await here.restless()
        await asyncio.to_thread(lambda: None)
        assert loaded() == {True}, "once they have been asked for they stay"
        models.unload()
        assert loaded() == {False}
        gone = property(lambda session: "gone" if session in models.generator.spare_sessions else "")
        with monkeypatch.context() as moved_away:
            moved_away.setattr(Session, "fault", gone)
            assert "gone" in (await here.app.status()).advice


async def test_warm_ups_come_one_after_another_and_those_that_were_overtaken_not_at_all(
    here: Here, gate: Gate
) -> None:
    """Two of one model share what they compile, and one may throw it away."""
    await until(lambda: gate.running)
    for _ in range(2):
        await here.daemon.reload()
    gate.open.set()

    async def changed() -> bool:
        return bool((await standings(here))[SECOND].state == IN_USE)

    await until(changed)
    assert (gate.begun, gate.most) == (2, 1)


async def test_a_daemon_that_is_stopped_does_not_wait_for_its_warm_up(here: Here, gate: Gate) -> None:
    await until(lambda: gate.running)
    here.daemon.stop()
    await asyncio.wait_for(here.daemon.shutdown(), 30)
    assert here.daemon.still_working, "the command leaves without the thread"
    gate.open.set()
    await until(lambda: not here.daemon.still_working)


def drawn(generator: Generator, size: Size | None = None) -> np.ndarray[Any, Any]:
    _, states = generator.encode("a cat")
    nothing = generator.encode_negative("")
    *_, image = generator.generate(states, nothing, 3, 4, 5.0, previews=True, size=size)
    assert isinstance(image, Image)
    return image.colours


def test_the_better_generator_has_one_size_the_same_encoder_and_draws_the_same(
    routed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(routed_bundle)
    generator = Generator(bundle, Runtime(threads=1))
    rehearsed: list[Path] = []
    rehearse = generator_module.rehearse

    def watched(graph: Path, *how: Any) -> frozenset[str]:
        rehearsed.append(graph)
        return rehearse(graph, *how)

    monkeypatch.setattr("edge_agent.diffusion.generator.rehearse", watched)
    better = generator.on(BETTER, BETTER)
    # A provider that may not know onnxruntime's own operators gets the graph as it was traced.
    assert generator.denoiser.session.path == routed_bundle / "unet" / FUSED
    assert better.denoiser.session.path == routed_bundle / DENOISER
    assert rehearsed == [routed_bundle / DENOISER, routed_bundle / DECODER]
    assert better.text_encoder is generator.text_encoder and better.denoiser is not generator.denoiser
    assert better.denoiser.passes == "separate" and generator.denoiser.passes == "batch"
    facts = bundle.manifest
    assert better.denoiser.session.shapes["sample"] == (
        *(1, facts.latent_channels),
        *(facts.latent_height, facts.latent_width),
    )
    assert np.abs(drawn(better) - drawn(generator)).max() < 1e-4
    assert better.spare_sessions == ()


def test_images_of_other_sizes_are_made_as_before_the_better_generator(bundle_copy: Path) -> None:
    """The better one is compiled for the default's size. What the others take is loaded when one is asked for."""
    write_manifest(bundle_copy, other_sizes=[(96, 64)], latent_to_rgb=None)  # previews take a decoder
    generator = Generator(Bundle.open(bundle_copy), Runtime(threads=1))
    before = drawn(generator, (96, 64))
    better = generator.on(BETTER, BETTER)
    assert better.spare_sessions == (generator.denoiser.session, generator.decoder.session)
    for session in better.spare_sessions:
        session.unload()
    assert drawn(better).shape == (64, 64, 3)
    assert {session.loaded_at for session in better.spare_sessions} == {None}
    np.testing.assert_array_equal(drawn(better, (96, 64)), before)
    assert None not in {session.loaded_at for session in better.spare_sessions}


@pytest.mark.parametrize("part", ["denoiser", "decoder"])
@pytest.mark.parametrize(("factor", "taken_up"), [(np.nan, False), (1.2, False), (1.01, True)])
def test_a_provider_that_computes_something_else_is_not_taken_up(
    routed_bundle: Path, monkeypatch: pytest.MonkeyPatch, part: str, factor: float, taken_up: bool
) -> None:
    """What half precision rounds off is no such thing."""
    generator = Generator(Bundle.open(routed_bundle), Runtime(threads=1))
    kind, method = type(getattr(generator, part)), {"denoiser": "predict", "decoder": "decode"}[part]
    compute = getattr(kind, method)

    def wrong(model: Any, *given: Any, **how: Any) -> Any:
        made = compute(model, *given, **how)
        return made if model is getattr(generator, part) else made * np.float32(factor)

    monkeypatch.setattr(kind, method, wrong)
    monkeypatch.setattr(generator_module, "rehearse", lambda *_: {BETTER.providers[0]})
    if taken_up:
        assert generator.on(BETTER, BETTER) is not generator
        return
    with pytest.raises(Unfit, match=f"the {part} computes something else on AzureExecutionProvider"):
        generator.on(BETTER, BETTER)


def test_what_tensorrt_compiles_is_kept_by_model_and_version(tmp_path: Path) -> None:
    found = providers.options(("tensorrt", "cuda", "cpu"), tmp_path / "a" / "b", half=True)
    assert set(found) == {"TensorrtExecutionProvider"}
    options = found["TensorrtExecutionProvider"]
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path / "a" / "b")
    switches = {name: value for name, value in options.items() if name.endswith("_enable")}
    assert set(switches.values()) == {"True"} and len(switches) == 3  # onnxruntime refuses 1 and 0
    assert (tmp_path / "a" / "b").is_dir()
    assert providers.options(("cuda", "cpu"), tmp_path / "none", half=False) == {}
    assert not (tmp_path / "none").exists()


@pytest.mark.linux
def test_a_cache_that_cannot_be_written_to_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    """A compiler would take its minutes, keep nothing, say nothing, and take them again at each start."""
    no_folder = Path("/proc/self/fdinfo")  # lets nobody write, not even root
    for folder in (no_folder, no_folder / "none"):
        with pytest.raises(OSError, match=rf"{folder} cannot be written to .*; name another folder"):
            providers.options(("tensorrt", "cpu"), folder, half=False)
    assert providers.options(("cuda", "cpu"), no_folder, half=False) == {}


def test_a_cache_that_cannot_be_used_is_made_anew_and_a_fault_of_the_models_is_not_hidden(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {
        "bundle": str(routed_bundle),
        "threads": "1",
        "providers": f"{SECOND},cpu",
        "cache": str(tmp_path),
    }
    models = load(resolve(flags, {}))
    assert models.open_better is not None
    on = Generator.on

    def spoilt(generator: Generator, *runtimes: Runtime) -> Generator:
        if any(tmp_path.rglob("*.engine")):
            raise BundleError("the engine is of another driver")
        return on(generator, *runtimes)

    monkeypatch.setattr(Generator, "on", spoilt)
    models.open_better()
    folder = tmp_path / "engines" / f"{models.reader.bundle.model_digest[:16]}-{ort.__version__}"
    folder.mkdir(parents=True)
    (folder / "unet.engine").write_bytes(b"of another driver")
    better = models.open_better()
    assert better is not models.generator
    assert {session._runtime.threads for each in (better, models.generator) for session in each.sessions} == {
        1
    }
    assert not list(folder.glob("*.engine"))
    (tmp_path / "other.engine").write_bytes(b"not in the cache")
    with pytest.raises(BundleError, match="another driver"):
        models.open_better()


@pytest.fixture
def compiled(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[], Generator], Path]:
    """What opens the models on a better provider, and what that compiled for them at an earlier start."""
    flags = {"bundle": str(routed_bundle), "providers": f"{SECOND},cpu", "cache": str(tmp_path)}
    models = load(resolve(flags, {}))
    assert models.open_better is not None
    folder = tmp_path / "engines" / f"{models.reader.bundle.model_digest[:16]}-{ort.__version__}"
    folder.mkdir(parents=True)
    engine = folder / "unet.engine"
    engine.write_bytes(b"minutes")
    return models.open_better, engine


@pytest.mark.parametrize("fault", ["nothing", "something else"])
def test_a_provider_that_would_fail_again_costs_no_second_time_what_was_compiled(
    compiled: tuple[Callable[[], Generator], Path], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Like TensorRT, which leaves a graph of more than 2 GB to the others without a word."""
    open_better, engine = compiled
    if fault == "nothing":
        monkeypatch.setattr(generator_module, "rehearse", rehearsal.rehearse)
    else:
        monkeypatch.setattr(generator_module, "MOST_DIFFERENCE", -1.0)
    with pytest.raises(Unfit, match=fault):
        open_better()
    assert engine.read_bytes() == b"minutes"


def test_what_was_compiled_for_models_of_long_ago_is_removed(
    compiled: tuple[Callable[[], Generator], Path],
) -> None:
    open_better, engine = compiled
    ages_s = {engine.parent.name: 9.0, "last": 1.0, "second": 2.0, "third": 3.0, "fourth": 4.0}
    for name, age_s in ages_s.items():
        folder = engine.parents[1] / name
        folder.mkdir(exist_ok=True)
        (folder / "unet.engine").write_bytes(b"minutes")
        os.utime(folder, (time.time() - age_s,) * 2)
    open_better()
    assert {each.name for each in engine.parents[1].iterdir()} == ages_s.keys() - {"fourth"}
    assert engine.read_bytes() == b"minutes"


@pytest.mark.posix
def test_what_was_compiled_is_kept_where_trying_it_was_ended_from_outside(
    compiled: tuple[Callable[[], Generator], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the daemon is stopped meanwhile, or memory runs out: minutes of work are still good."""
    open_better, engine = compiled
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\nkill -TERM $$\n")
    (tmp_path / "python").chmod(0o700)
    with pytest.raises(ProcessEnded):
        open_better()
    assert engine.read_bytes() == b"minutes"


def test_tensorrt_is_told_which_graphs_are_in_half_precision(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another provider under TensorRT's name: what it is told is looked at, not what it makes of it."""
    monkeypatch.setitem(providers._FULL_NAMES, "tensorrt", "AzureExecutionProvider")
    monkeypatch.setitem(providers._SHORT_NAMES, "AzureExecutionProvider", "tensorrt")
    bundle = tmp_path / "bundle"
    shutil.copytree(routed_bundle, bundle)
    write_manifest(bundle, dtypes={"text_encoder": "fp16", "unet": "fp16"})
    flags = {
        "bundle": str(bundle),
        "threads": "1",
        "providers": "tensorrt,cpu",
        "cache": str(tmp_path / "cache"),
    }
    models = load(resolve(flags, {}))
    assert models.open_better is not None
    told: list[str] = []
    on = Generator.on

    def listening(generator: Generator, *runtimes: Runtime) -> Generator:
        for runtime in runtimes:
            options = runtime.provider_options["AzureExecutionProvider"]
            told.append(options["trt_fp16_enable"])
            assert Path(options["trt_engine_cache_path"]).is_dir()
        return on(generator, *(replace(runtime, provider_options={}) for runtime in runtimes))

    monkeypatch.setattr(Generator, "on", listening)
    assert models.open_better().denoiser.passes == "separate"
    assert told == ["True", "False"]


def test_tensorrt_is_not_given_graphs_in_eight_bits_unless_asked(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        providers.ort, "get_available_providers", lambda: [*map(providers.full_name, ("tensorrt", "cpu"))]
    )
    monkeypatch.setattr(providers, "probe", lambda _name: "")
    bundle = tmp_path / "bundle"
    shutil.copytree(routed_bundle, bundle)
    flags = {"bundle": str(bundle), "threads": "1", "cache": str(tmp_path / "cache")}
    for dtypes, wish, better in (
        ({"text_encoder": "int8"}, {}, True),  # it stays where it is
        ({"text_encoder": "int8", "vae_decoder": "int8"}, {}, False),
        ({"text_encoder": "int8", "vae_decoder": "int8"}, {"providers": "tensorrt,cpu"}, True),
    ):
        write_manifest(bundle, dtypes=dtypes)
        models = load(resolve(flags | wish, {}))
        (tensorrt,) = (each for each in models.providers if each.name == "tensorrt")
        assert (models.open_better is not None) is better
        assert ("hundreds of pieces" in tensorrt.reason) is not better


def test_on_the_cpu_nothing_is_run_before_the_first_request(
    routed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would delay each start."""
    tried: list[Generator] = []
    monkeypatch.setattr(Generator, "tried", tried.append)
    load(resolve({"bundle": str(routed_bundle), "threads": "1"}, {}))
    assert not tried


def test_what_the_cpu_does_not_run_is_refused_and_not_tried_again(
    routed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [BundleError("no such operator")]

    def opens(*_: object) -> Generator:
        raise faults.pop()

    monkeypatch.setattr("edge_agent.loader.Generator", opens)
    with pytest.raises(BundleError, match="no such operator"):
        load(resolve({"bundle": str(routed_bundle), "threads": "1"}, {}))


def test_a_provider_that_does_not_open_the_models_is_passed_over_unless_it_is_named(
    routed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU without half precision, which runs the graph that it is tried with."""
    bundle = Path(shutil.copytree(routed_bundle, tmp_path / "bundle"))
    monkeypatch.setattr(
        providers.ort, "get_available_providers", lambda: [*map(providers.full_name, ("cuda", "cpu"))]
    )
    monkeypatch.setattr(providers, "probe", lambda _name: "")
    flags = {"bundle": str(bundle), "threads": "1"}
    with pytest.warns(UserWarning, match="not in available provider"):
        models = load(resolve(flags, {}))
    found = {each.name: each for each in models.providers}
    assert found["cpu"].state is providers.State.IN_USE and all(
        s._runtime.on_cpu for s in models.generator.sessions
    )
    assert found["cuda"].reason.startswith("it does not run this model: ")
    with (
        pytest.warns(UserWarning, match="not in available provider"),
        pytest.raises(BundleError, match="CUDAExecutionProvider"),
    ):
        load(resolve(flags | {"providers": "cuda,cpu"}, {}))


def test_a_gpu_too_small_for_the_models_is_passed_over_unless_it_is_named(
    routed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's memory may do."""
    session = plugins.session

    def small(model: Any, options: Any, on: Any, **more: Any) -> Any:
        if on[0][0] == "CUDAExecutionProvider":  # in CUDA's own words
            raise RuntimeError("Failed to allocate memory for requested buffer of size 4194304")
        return session(model, options, on, **more)

    monkeypatch.setattr(
        providers.ort, "get_available_providers", lambda: [*map(providers.full_name, ("cuda", "cpu"))]
    )
    monkeypatch.setattr(providers, "probe", lambda _name: "")
    monkeypatch.setattr(plugins, "session", small)
    flags = {"bundle": str(routed_bundle), "threads": "1"}
    models = load(resolve(flags, {}))
    found = {each.name: each for each in models.providers}
    assert found["cpu"].state is providers.State.IN_USE
    assert "this device is out of memory" in found["cuda"].reason
    with pytest.raises(OutOfMemory):
        load(resolve(flags | {"providers": "cuda,cpu"}, {}))
    with pytest.raises(OutOfMemory):  # once those that serve are gone there may be room
        load(resolve(flags, {}), {"cuda", "cpu"})
    assert load(resolve(flags, {}), {"cpu"}).providers[0].name == "cpu"


def test_a_gpu_that_holds_the_models_and_not_a_run_is_passed_over(
    routed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each image would fail there, and be promised for a second later."""
    run = ort.InferenceSession.run

    def runs(session: ort.InferenceSession, outputs: Any, feeds: dict[str, Any], *how: Any) -> Any:
        if BETTER.providers[0] in session.get_providers() and "latent_sample" in feeds:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 4194304")
        return run(session, outputs, feeds, *how)

    monkeypatch.setattr(plugins._Session, "run", runs)
    monkeypatch.setattr(providers, "PREFERENCE", (SECOND, "cpu"))
    monkeypatch.setattr(providers, "QUICK_TO_OPEN", {SECOND, "cpu"})
    flags = {"bundle": str(routed_bundle), "threads": "1"}
    found = {each.name: each for each in load(resolve(flags, {})).providers}
    assert found["cpu"].state is providers.State.IN_USE
    assert "vae_decoder" in found[SECOND].reason and "out of memory" in found[SECOND].reason
    with pytest.raises(OutOfMemory):
        load(resolve(flags | {"providers": f"{SECOND},cpu"}, {}))
