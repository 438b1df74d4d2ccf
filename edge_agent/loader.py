"""Loads a bundle's models: on the best provider that runs them, and later on a better one that opens slowly."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from pathlib import Path

import onnxruntime as ort

from edge_agent import memory
from edge_agent.bundle import Bundle
from edge_agent.diffusion import providers
from edge_agent.diffusion.generator import Generator
from edge_agent.diffusion.providers import Choice
from edge_agent.diffusion.sessions import Runtime
from edge_agent.errors import (
    BundleError,
    GenerationFailed,
    OutOfMemory,
    ProcessEnded,
    RouteT2IError,
    Unfit,
)
from edge_agent.manifest import DECODER, MANIFEST, Manifest
from edge_agent.reader import Reader
from edge_agent.request import Limits
from edge_agent.resident import Resident
from edge_agent.settings import Settings

KEPT = 4
"""Models whose compiled graphs are kept, those used last. TensorRT's take gigabytes, and a device takes up one version
of a model after the other."""


def load(settings: Settings, taken: Collection[str] = (), model: str = "") -> Resident:
    """The models of the bundle that `model` names in the store, or the settings where it is empty. A provider that has
    no room for them is passed over, unless it is among the `taken`: the models on it may be about to go.

    Raises BundleError, StoreError, StartRefused, OutOfMemory and GenerationFailed; nothing is left of them then.
    """
    try:
        return _load(settings, taken, model)
    except BaseException as error:
        _let_go(error)  # or it would hold on to the models before the one that cannot be loaded
        raise


def _let_go(error: BaseException) -> None:
    """Give back what the frames hold that `error` came through."""
    held: BaseException | None = error
    while held is not None:
        traceback.clear_frames(held.__traceback__)
        held = held.__cause__
    memory.give_back()


def _load(settings: Settings, taken: Collection[str], model: str) -> Resident:
    folder = settings.store.path(model) if model else settings.bundle_folder
    # The folder itself and no link to it: what the link leads to may change, and these graphs be loaded again.
    # Path.resolve would raise something of its own for a loop of links.
    bundle = Bundle.open(os.path.realpath(folder))
    generator, choice = _open(settings, bundle, taken)
    # What a budget pays for is a share of this device's prompts.
    follow = settings.follow_prompts or settings.pace_budget
    followed = settings.state_folder if follow else None
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
    """On the best provider that opens and runs them, unless the settings name which: that does or nothing."""
    passed_over = unfit(bundle.manifest)
    while True:
        choice = providers.find(settings.providers, passed_over)
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
            passed_over[best] = f"it does not run this model: {error.message}"
            _let_go(error)  # before the next provider takes as much


def _tried(bundle: Bundle, runtime: Runtime) -> Generator:
    """The models, opened there, and run once where that is not the CPU."""
    generator = Generator(bundle, runtime)
    if not runtime.on_cpu:
        generator.tried()
    return generator


def unfit(manifest: Manifest) -> dict[str, str]:
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
    memory ran out, or we are stopped, or nothing kept is to blame. Raises what `Generator.on` does, and OSError.
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
        better = opened()
    except (ProcessEnded, Unfit, OutOfMemory):
        raise
    except RouteT2IError:
        if not kept:
            raise
        shutil.rmtree(cache)
        better = opened()
    _forget_others(cache)
    return better


def _forget_others(cache: Path) -> None:
    """Remove what was compiled for models that were not among the last ones used; `cache` is that of the one in use."""
    with suppress(OSError):  # it holds nothing, or another daemon does the same
        os.utime(cache)
        latest_first = sorted(cache.parent.iterdir(), key=lambda each: each.stat().st_mtime, reverse=True)
        for each in latest_first[KEPT:]:
            shutil.rmtree(each, ignore_errors=True)
