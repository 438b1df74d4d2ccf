"""Execution providers: what onnxruntime could run the models on, what of it works on this machine, and what is taken.

onnxruntime lists what it was built with. Whether that works is another matter: without CUDA's libraries a session that
asks for CUDA runs on the CPU, and all that tells is a line in the log. So each candidate has to run a graph before it
is believed.

Providers go by short names here and for people: `cuda` is onnxruntime's CUDAExecutionProvider.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import importlib.util
import io
import json
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge_agent.diffusion import plugins, sessions
from edge_agent.errors import DeviceNotReady, StartRefused

CPU = "cpu"

_SUFFIX = "ExecutionProvider"

_FULL_NAMES = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    CPU: plugins.CPU_PROVIDER,
}
_SHORT_NAMES = {full: short for short, full in _FULL_NAMES.items()}

PREFERENCE = ("tensorrt", "cuda", "directml", "openvino", CPU)
"""What is taken of what works, best first. Anything else onnxruntime may have is taken only when it is asked for.

CoreML among it: every Mac has it, and of other models people report times and memory many times the CPU's
(sam-dumont/immich-video-memory-generator#810)."""

QUICK_TO_OPEN = frozenset({"cuda", "rocm", "directml", "webgpu", CPU})
"""Providers that run a graph as it is, for images of any size. Others are taken for compilers, which many are: their
sessions take seconds to open, with TensorRT many minutes, and whether they run anything has to be seen."""

_ELSEWHERE = "azure"  # which every onnxruntime for the CPU has, and no model runs on

_BUILT_WITHOUT = "this onnxruntime is built without it"

_PLACE = re.compile(
    r"^.*(\.(cc|cpp|h|cu)(:\d+|\(\d+\)\S*)\s+(onnxruntime::\S+\s+)?"
    r"|\[ONNXRuntimeError\] : \d+ : \w+ : | was false\. |(?=CUDA failure \d))(?=.)"
)
"""What an exception says before it comes to what is wrong: the line of onnxruntime's source, the function with its
types, the condition that was checked, once or several times over."""

_LOG_NOTHING, _LOG_WARNINGS = 4, 2  # severities of onnxruntime; the second is its default

_GRAPH = (
    b'\x08\x07\x12\x00:@\n\x11\n\x01x\n\x01x\x12\x01y"\x06MatMul\x12\x01pZ\x13\n\x01x\x12\x0e\n\x0c\x08\x01\x12\x08\n'
    b"\x02\x08\x02\n\x02\x08\x02b\x13\n\x01y\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x02\n\x02\x08\x02B\x04\n\x00\x10\r"
)
"""The graph a provider has to run: y = x @ x for float32 [2, 2], as serialized ONNX."""

_LACKING = re.compile(r"(lib\S+): cannot open shared object file")
"""What the loader of Linux says of a library that is not there."""

_BRINGS = {
    "libcuda.so": "NVIDIA's driver",
    "libnvinfer": "TensorRT",
    "libnvonnxparser": "TensorRT",
} | dict.fromkeys(
    (
        "libcublas",
        "libcudart",
        "libcudnn",
        "libcufft",
        "libcupti",
        "libcurand",
        "libcusolver",
        "libcusparse",
        "libnvJitLink",
        "libnvrtc",
    ),
    'CUDA and cuDNN, on a PC also with pip install "onnxruntime-gpu[cuda,cudnn]"',
)
"""Where libraries that NVIDIA's providers need come from, by how their names begin."""

_LASTING = ("no kernel image", "computes wrong results", "fell back to the CPU", "finds no device")
"""What is said of a provider that no other start will find working; so is a library that it lacks. All else may pass:
another process has the GPU or its memory, a driver is not up yet, or was replaced and is loaded anew."""

_PROBE_OPTIONS = {
    # One node is too few for TensorRT, so that no engine is built for it; that its libraries load still shows.
    "tensorrt": {"trt_min_subgraph_size": "1000"},
}


class State(enum.Enum):
    """What a provider is doing; the names are the wire's."""

    IN_USE = enum.auto()
    WARMING_UP = enum.auto()
    PASSED_OVER = enum.auto()


@dataclass(frozen=True)
class Standing:
    """One provider, as people are shown it."""

    name: str
    state: State
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """What to run the models on, and why not on something else. Short names."""

    serving: tuple[str, ...] = (CPU,)
    """For the sessions that serve from the start: best first, the CPU last, for operators that the others lack."""

    better: tuple[str, ...] = ()
    """For sessions that take long to open and are taken up once they are there; empty where there is nothing better."""

    passed_over: Mapping[str, str] = field(default_factory=dict)
    """Why not, in a phrase, by provider."""

    def standings(self, opening_s: float, *, ready: bool = False, failure: str = "") -> tuple[Standing, ...]:
        """Every provider once, the one in use first. The better sessions have been opening for so long, are `ready` and
        serve, or cannot for the reason in `failure`.
        """
        used = self.better if ready else self.serving
        shown = [Standing(used[0], State.IN_USE)]
        shown += [Standing(name, State.IN_USE, f"for what {used[0]} lacks") for name in used[1:]]
        passed_over = dict(self.passed_over)
        if self.better and failure:
            passed_over = {self.better[0]: failure} | passed_over
        elif self.better and not ready:
            reason = f"opening its sessions since {opening_s:.0f} s; {used[0]} serves meanwhile"
            shown.append(Standing(self.better[0], State.WARMING_UP, reason))
        return (
            *shown,
            *(Standing(name, State.PASSED_OVER, reason) for name, reason in passed_over.items()),
        )


def names() -> tuple[str, ...]:
    """What this onnxruntime has, whether or not it works here, best first."""
    available = [_short(name) for name in _available()]
    best = [name for name in PREFERENCE if name in available]
    return tuple(name for name in dict.fromkeys((*best, *available)) if name != _ELSEWHERE)


def find(wish: Sequence[str] = (), unfit: Mapping[str, str] | None = None) -> Choice:
    """What this machine offers, tried out. `wish` names the providers to use, best first; empty: whatever is best.
    `unfit` are those that run these models badly, and why: they are used only where the wish names them.

    Some milliseconds where onnxruntime has nothing but the CPU; elsewhere each candidate runs a graph.

    Raises:
        StartRefused: a provider of the wish cannot be used; the message says why.
    """
    available = tuple(_short(name) for name in _available())
    failures = {
        _short(name): failure(_short(name)) for name, plugin in plugins.found().items() if plugin.failure
    }
    if not wish:
        failures = dict(unfit or {}) | failures
    candidates = [
        name for name in (wish or PREFERENCE) if name in available and name != CPU and name not in failures
    ]
    failures |= {name: said for name in candidates if (said := failure(name))}
    return choose(available, failures, wish, _builds())


def choose(
    available: Iterable[str],
    failures: Mapping[str, str],
    wish: Sequence[str] = (),
    builds: Sequence[str] = ("onnxruntime",),
) -> Choice:
    """What to use of the `available` providers, of which those in `failures` do not work, for the reason given there.

    `builds` are the distributions of onnxruntime that are installed. There should be one: they share their files.

    Raises:
        StartRefused: a provider of the wish is not available or does not work; DeviceNotReady where it may soon.
    """
    available = tuple(available)
    for name in wish:
        if name != CPU and name not in available:
            raise StartRefused(
                f"--providers names {name}, which this onnxruntime ({ort.__version__}) is built without; it has "
                f"{', '.join(available)}{_collision(builds)}"
            )
        if name in failures:
            raise refusal(failures[name])(
                f"--providers names {name}, which does not work here: {failures[name]}. Leave it out, or leave "
                "--providers out to take the best that works"
            )
    order = wish or [name for name in PREFERENCE if name in available and name not in failures]
    order = (*(name for name in order if name != CPU), CPU)
    quick = tuple(name for name in order if name in QUICK_TO_OPEN)
    serving = quick if wish else tuple(dict.fromkeys((quick[0], CPU)))
    better = () if order[0] in QUICK_TO_OPEN else (order[0], *serving)
    used = {*serving, *better}

    def why_not(name: str) -> str:
        if name not in available:
            return _BUILT_WITHOUT + _collision(builds)
        if name in failures:
            return failures[name]
        if name in order:
            return f"{order[0]} comes before it"
        if name == _ELSEWHERE:
            return "it runs nothing on this device"
        if wish:
            return "not among --providers"
        return f"taken only when asked for, as in --providers {name},cpu"

    others = [name for name in dict.fromkeys((*PREFERENCE, *available)) if name not in used]
    return Choice(serving, better, {name: why_not(name) for name in others})


def refusal(failure: str) -> type[StartRefused]:
    """What a start comes to for which a provider is named that says this: DeviceNotReady where it may pass."""
    lasts = _LACKING.search(failure) or any(words in failure for words in _LASTING)
    return StartRefused if lasts else DeviceNotReady


def failure(name: str) -> str:
    """Why provider `name` does not work here, in a phrase; empty when it does."""
    if full_name(name) not in _available():
        return _BUILT_WITHOUT + _collision(_builds())
    plugin = plugins.found().get(full_name(name))
    if plugin is not None and plugin.failure:
        return with_origin(plugin.failure)
    load_packaged_libraries([full_name(name)])
    return probe(name)


def probe(name: str) -> str:
    """The same of one that worked here before, whose libraries are loaded."""
    provider = full_name(name)
    with sessions.turn([provider]):  # other models may be making an image on it
        return _tried(name, provider)


def _tried(name: str, provider: str) -> str:
    """Apart from `probe`, so that the session goes while it has the turn."""
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_NOTHING
    ort.set_default_logger_severity(_LOG_NOTHING)  # what it would say comes back as the reason
    x = np.asarray([[1, 2], [3, 4]], np.float32)
    try:
        session = plugins.session(_GRAPH, options, [(provider, _PROBE_OPTIONS.get(name, {}))])
        if provider not in session.get_providers():
            return _missing_library(name) or "onnxruntime fell back to the CPU and does not say why"
        (y,) = session.run(None, {"x": x})
    except Exception as error:  # onnxruntime's own exceptions share no base class
        return _missing_library(name) or _phrase(error)
    finally:
        ort.set_default_logger_severity(_LOG_WARNINGS)
    return (
        ""
        if np.allclose(y, x @ x, atol=0.1)
        else f"it computes wrong results: {y.tolist()} for {(x @ x).tolist()}"
    )


def options(names: Iterable[str], cache: Path, *, half: bool) -> dict[str, dict[str, str]]:
    """Options for sessions on the providers, by onnxruntime's names.

    Args:
        cache: folder for what they compile. It is made.
        half: whether the graph computes in half precision, which some versions of TensorRT refuse unless they are told.

    Raises OSError when the folder cannot be made or written to, of which compilers say nothing: they would begin anew
    each time.
    """
    known = {
        "tensorrt": {  # onnxruntime takes True and False here, and refuses 1 and 0
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(cache),
            "trt_fp16_enable": str(half),
        },
        # The other format, CoreML's own default, knows no half precision and fewer operators.
        "coreml": {"ModelFormat": "MLProgram", "ModelCacheDirectory": str(cache)},
        "openvino": {"cache_dir": str(cache)},
        "migraphx": {"migraphx_model_cache_dir": str(cache)},
    }
    if full_name("openvino") in plugins.found():
        # The plugin takes OpenVINO's own options, for each kind of device. Left to itself it computes in bfloat16 where
        # a CPU can, and draws other pictures.
        properties = {"CACHE_DIR": str(cache)} | ({} if half else {"INFERENCE_PRECISION_HINT": "f32"})
        known["openvino"] = {"load_config": json.dumps(dict.fromkeys(plugins.KINDS, properties))}
    found = {full_name(name): known[name] for name in names if name in known}
    if found:
        probe = cache / secrets.token_hex(8)  # tempfile may try for ever where it may not, on Windows
        try:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            why = error.strerror or error
            raise OSError(
                f"{cache} cannot be written to ({why}); name another folder with --cache"
            ) from error
    return found


def full_name(name: str) -> str:
    """Onnxruntime's name of the provider: CUDAExecutionProvider for cuda."""
    if name in _FULL_NAMES:
        return _FULL_NAMES[name]
    return next((full for full in _available() if _short(full) == name), name)


def _available() -> tuple[str, ...]:
    """What onnxruntime has built in or has a plugin for, by its names."""
    # onnxruntime lists plugins too once they are registered, and some that choose among others: OpenVINO's .AUTO.
    listed = [name for name in ort.get_available_providers() if name.endswith(_SUFFIX)]
    return tuple(dict.fromkeys((*listed, *plugins.found())))


def _builds() -> tuple[str, ...]:
    """The distributions that bring onnxruntime itself, and not a plugin or other companion of it.

    By their folders: reading all metadata would cost a tenth of a cold start.
    """
    folders = Path(ort.__file__).parents[1].glob("onnxruntime*.dist-info")
    builds = [folder for folder in folders if _brings_onnxruntime(folder)]
    return tuple(sorted(folder.name.split("-")[0].replace("_", "-") for folder in builds))


def _brings_onnxruntime(folder: Path) -> bool:
    try:
        # Not all have a top_level.txt.
        record = (folder / "RECORD").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it does not say, and is called so
        return True
    return "\nonnxruntime/__init__.py," in f"\n{record}"


def _collision(builds: Sequence[str]) -> str:
    if len(builds) < 2:
        return ""
    return f" ({' and '.join(builds)} overwrite each other: uninstall all of them, then install one)"


def _short(full: str) -> str:
    return _SHORT_NAMES.get(full) or full.removesuffix(_SUFFIX).lower()


def load_packaged_libraries(names: Iterable[str]) -> None:
    """Load what these providers, by onnxruntime's names, need of CUDA and cuDNN out of NVIDIA's Python packages, where
    they are installed: no loader looks there.
    """
    if {full_name("cuda"), full_name("tensorrt")}.isdisjoint(names):
        return
    since_1_21 = hasattr(ort, "preload_dlls")
    if since_1_21 and importlib.util.find_spec("nvidia") is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints comes back as the probe's reason
            ort.preload_dlls()


def _missing_library(name: str) -> str:
    """The library that the provider's own needs and this machine does not have; empty where all can be loaded.

    onnxruntime loads it when a session asks for the provider, and tells its log alone what went wrong.
    """
    if sys.platform == "linux":
        folder = Path(ort.__file__).parent / "capi"
        library = folder / f"libonnxruntime_providers_{name}.so"
        if library.is_file():
            try:
                ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
                ctypes.CDLL(str(library))
            except OSError as error:
                # libcublasLt.so.12: cannot open shared object file: No such file or directory
                return with_origin(str(error))
    return ""


def with_origin(failure: str) -> str:
    """`failure`, and where the library comes from that it says is lacking, if that is one of NVIDIA's."""
    lacking = _LACKING.search(failure)
    for begin, origin in _BRINGS.items():
        if lacking and lacking[1].startswith(begin):
            return f"{failure}; it comes with {origin}"
    return failure


def _phrase(error: Exception) -> str:
    """What an exception of onnxruntime says, without the place in its source and at a length people read."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return _PLACE.sub("", lines[-1])[-300:]
