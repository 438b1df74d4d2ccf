"""Execution providers that are packages of their own, such as onnxruntime-ep-openvino, and no part of onnxruntime.

Their libraries are registered with onnxruntime, and have to find a device here. Each package tells its library's path
and its providers' names, as onnxruntime's "Plugin Execution Provider Library Packaging Guidance" asks.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

CPU_PROVIDER = "CPUExecutionProvider"

_PREFIX = "onnxruntime_ep_"
_PACKAGES = (f"{_PREFIX}*", "onnxruntime_qnn")

KINDS = ("GPU", "CPU", "NPU")
"""Of devices, best first, where a provider has several: an NPU runs few graphs."""

_KINDS_OF_QNN = ("NPU", "GPU", "CPU")
"""Made for the NPU; on the CPU it is there to compare with."""


@dataclass(frozen=True)
class Plugin:
    """A provider for which a package is installed."""

    device: Any = None  # onnxruntime's OrtEpDevice, what it would run on
    failure: str = ""  # why it has none, in a phrase


class _Session(ort.InferenceSession):  # type: ignore[misc]  # ships no types
    """Without the fallback, which would run everything on the CPU and print that to standard output.

    `enable_fallback=0` says so to onnxruntime from 1.23 on; those before, as Jetsons have them, take no notice of it.
    """

    _enable_fallback = property(lambda _: False, lambda *_: None)


@functools.cache
def found() -> Mapping[str, Plugin]:
    """The plugins by onnxruntime's names of their providers. The first call registers them."""
    return {name: plugin for package in _packages() for name, plugin in _registered(package).items()}


def session(
    model: str | bytes,
    options: ort.SessionOptions,
    providers: Sequence[tuple[str, Mapping[str, str]]],
    **more: Any,
) -> ort.InferenceSession:
    """A session of onnxruntime on `providers`, best first, each with its options; `more` is onnxruntime's.

    Raises what onnxruntime raises, whose exceptions share no base class.
    """
    if not any(name != CPU_PROVIDER and name in found() for name, _ in providers):
        return _Session(model, options, providers=list(providers), enable_fallback=0, **more)
    for name, given in providers:  # a plugin goes by its device, and then the others have to stand beside it
        if name in found():
            options.add_provider_for_devices([found()[name].device], dict(given))
        elif name != CPU_PROVIDER:  # which onnxruntime adds itself
            options.add_provider(name, dict(given))
    return _Session(model, options, enable_fallback=0, **more)


def _packages() -> list[str]:
    """By name, of those installed beside onnxruntime: a look at everything that could be imported takes too long."""
    beside = Path(ort.__file__).parents[1]
    return sorted(file.parent.name for each in _PACKAGES for file in beside.glob(f"{each}/__init__.py"))


def _registered(package: str) -> dict[str, Plugin]:
    names = [package.removeprefix(_PREFIX)]  # until the package has told them
    try:
        described = importlib.import_module(package)
        names = [name for name in described.get_ep_names() if name not in ort.get_available_providers()]
        if not names:  # onnxruntime has it built in
            return {}
        if not hasattr(ort, "register_execution_provider_library"):
            raise ImportError(f"onnxruntime {ort.__version__} is too old for plugins")
        # By the provider's name: those of NVIDIA, Qualcomm and AMD call their provider what they are registered as.
        ort.register_execution_provider_library(names[0], described.get_library_path())
        devices = ort.get_ep_devices()
    except Exception as error:
        # A package in disorder, or onnxruntime, whose own exceptions share no base class, and which repeats the
        # library's name before it says what the system does.
        _, _, why = str(error).rpartition(" with error: ")
        return dict.fromkeys(names, Plugin(failure=f"{package} cannot be registered: {why}"))
    plugins = {}
    for name in names:
        own = {device.device.type.name: device for device in reversed(devices) if device.ep_name == name}
        kinds = _KINDS_OF_QNN if name.startswith("QNN") else KINDS
        best = next((own[kind] for kind in kinds if kind in own), None)
        plugins[name] = Plugin(best, "" if best else f"{package} finds no device of its kind here")
    return plugins
