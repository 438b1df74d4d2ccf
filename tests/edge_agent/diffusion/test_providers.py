"""Which providers are taken follows from what there is, what works and what is wished; what works is tried."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from edge_agent.diffusion import plugins, providers
from edge_agent.diffusion.providers import (
    _FULL_NAMES,
    _GRAPH,
    CPU,
    PREFERENCE,
    Choice,
    Standing,
    State,
    _builds,
    choose,
    find,
    full_name,
    probe,
    refusal,
    with_origin,
)
from edge_agent.errors import DeviceNotReady, StartRefused

EVERYTHING = (*PREFERENCE, "rocm", "webgpu", "migraphx", "azure")
NOT_BUILT = "this onnxruntime is built without it"
NO_FILE = "cannot open shared object file: No such file or directory"
NO_CUDA = {"cuda": f"libcublasLt.so.12: {NO_FILE}", "tensorrt": f"libnvinfer.so.10: {NO_FILE}"}


@pytest.mark.parametrize(
    ("available", "failures", "serving", "better"),
    [
        (("azure", "cpu"), {}, ("cpu",), ()),
        (("tensorrt", "cuda", "cpu"), NO_CUDA, ("cpu",), ()),
        (("cuda", "cpu"), {}, ("cuda", "cpu"), ()),
        (("tensorrt", "cuda", "cpu"), {}, ("cuda", "cpu"), ("tensorrt", "cuda", "cpu")),
        (("tensorrt", "cuda", "cpu"), {"tensorrt": "no libnvinfer"}, ("cuda", "cpu"), ()),
        (("coreml", "cpu"), {}, ("cpu",), ()),
        (("directml", "cpu"), {}, ("directml", "cpu"), ()),
        (("openvino", "cpu"), {}, ("cpu",), ("openvino", "cpu")),
    ],
)
def test_the_best_that_works_is_taken_and_what_is_slow_to_open_comes_later(
    available: tuple[str, ...], failures: dict[str, str], serving: tuple[str, ...], better: tuple[str, ...]
) -> None:
    choice = choose(available, failures)
    assert (choice.serving, choice.better) == (serving, better)


def test_every_provider_is_either_used_or_passed_over_with_a_reason() -> None:
    choice = choose(("tensorrt", "cuda", "openvino", "rocm", "azure", "cpu"), {"tensorrt": "no libnvinfer"})
    assert choice.serving == ("cuda", "cpu")
    assert choice.passed_over == {
        "tensorrt": "no libnvinfer",
        "directml": NOT_BUILT,
        "openvino": "cuda comes before it",
        "rocm": "taken only when asked for, as in --providers rocm,cpu",
        "azure": "it runs nothing on this device",
    }
    wished = choose(("tensorrt", "cuda", "rocm", "cpu"), {}, ("cuda",)).passed_over
    assert wished["tensorrt"] == wished["rocm"] == "not among --providers"


@pytest.mark.parametrize(
    ("wish", "serving", "better"),
    [
        (("cpu",), ("cpu",), ()),
        (("cuda",), ("cuda", "cpu"), ()),
        (("cuda", "directml", "cpu"), ("cuda", "directml", "cpu"), ()),
        (("tensorrt", "cpu"), ("cpu",), ("tensorrt", "cpu")),
        (("tensorrt", "cuda"), ("cuda", "cpu"), ("tensorrt", "cuda", "cpu")),
        (("cuda", "tensorrt"), ("cuda", "cpu"), ()),
        (("rocm", "cpu"), ("rocm", "cpu"), ()),
        (("webgpu", "cpu"), ("webgpu", "cpu"), ()),
        (("migraphx", "cpu"), ("cpu",), ("migraphx", "cpu")),  # as any that nobody here knows
        (("cpu", "cuda"), ("cuda", "cpu"), ()),
        (("cpu", "tensorrt", "cuda"), ("cuda", "cpu"), ("tensorrt", "cuda", "cpu")),
    ],
)
def test_a_wish_is_followed_in_its_order_and_the_cpu_comes_last(
    wish: tuple[str, ...], serving: tuple[str, ...], better: tuple[str, ...]
) -> None:
    choice = choose(EVERYTHING, {}, wish)
    assert (choice.serving, choice.better) == (serving, better)
    assert set(choice.passed_over) == set(EVERYTHING) - {*serving, *better}


def test_a_wish_that_cannot_be_is_refused_with_the_reason() -> None:
    with pytest.raises(
        StartRefused, match=r"names cuda, which does not work here: libcublasLt\.so\.12"
    ) as refused:
        choose(("tensorrt", "cuda", "cpu"), NO_CUDA, ("cuda", "cpu"))
    assert "Leave it out" in refused.value.message
    assert not isinstance(refused.value, DeviceNotReady)  # no start will find the library
    assert {
        refusal(said)
        for said in (
            "CUDA failure 209: no kernel image is available",
            "it computes wrong results: 1",
            "onnxruntime fell back to the CPU and does not say why",
            "onnxruntime_ep_made finds no device of its kind here",
        )
    } == {StartRefused}
    assert refusal("CUDA failure 999: unknown error") is DeviceNotReady  # as after the loss of a device
    with pytest.raises(DeviceNotReady, match=r"names cuda, .*: CUDA failure 46: .* busy or unavailable"):
        choose(
            ("cuda", "cpu"), {"cuda": "CUDA failure 46: all devices are busy or unavailable"}, ("cuda", "cpu")
        )
    with pytest.raises(
        StartRefused, match=r"names coreml, which this onnxruntime .* built without; it has cuda, cpu"
    ):
        choose(("cuda", "cpu"), {}, ("coreml",))


def test_two_builds_of_onnxruntime_are_told_apart_from_one_that_lacks_a_provider() -> None:
    """They are one Python package: the second overwrites the first, and what is left may lack either's providers."""
    choice = choose(("azure", "cpu"), {}, (), ("onnxruntime", "onnxruntime-gpu"))
    assert "onnxruntime and onnxruntime-gpu overwrite each other" in choice.passed_over["cuda"]
    with pytest.raises(StartRefused, match="overwrite each other: uninstall all of them, then install one"):
        choose(("azure", "cpu"), {}, ("cuda",), ("onnxruntime", "onnxruntime-gpu"))


def test_people_are_shown_what_serves_what_warms_up_and_what_was_passed_over() -> None:
    choice = Choice(("cuda", "cpu"), ("tensorrt", "cuda", "cpu"), {"coreml": NOT_BUILT})
    without = Standing("coreml", State.PASSED_OVER, NOT_BUILT)
    spare = Standing("cpu", State.IN_USE, "for what cuda lacks")
    assert choice.standings(12.3) == (
        Standing("cuda", State.IN_USE),
        spare,
        Standing("tensorrt", State.WARMING_UP, "opening its sessions since 12 s; cuda serves meanwhile"),
        without,
    )
    assert choice.standings(12.3, failure="out of memory") == (
        Standing("cuda", State.IN_USE),
        spare,
        Standing("tensorrt", State.PASSED_OVER, "out of memory"),
        without,
    )
    assert choice.standings(12.3, ready=True) == (
        Standing("tensorrt", State.IN_USE),
        Standing("cuda", State.IN_USE, "for what tensorrt lacks"),
        Standing("cpu", State.IN_USE, "for what tensorrt lacks"),
        without,
    )


def test_what_is_taken_is_known_by_name() -> None:
    assert set(PREFERENCE) <= set(_FULL_NAMES)


def test_the_graph_that_is_tried_is_the_one_its_comment_says() -> None:
    matrix = {"x": [2, 2], "y": [2, 2]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in matrix.items())
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "p", [x], [y])
    expected = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7, producer_name=""
    )
    assert onnx.ModelProto.FromString(_GRAPH) == expected
    onnx.checker.check_model(expected)


def test_this_machines_onnxruntime_is_tried_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    choice = find()
    assert choice.serving[-1] == CPU
    listed = {full_name(name) for name in (*choice.serving, *choice.better, *choice.passed_over)}
    assert set(ort.get_available_providers()) <= listed
    assert capfd.readouterr() == ("", "")


class Tried:
    """A session that was opened on `providers` and gives `y`."""

    def __init__(self, providers: tuple[str, ...], y: np.ndarray) -> None:
        self.get_providers, self.run = lambda: providers, lambda *_: [y]


@pytest.mark.parametrize(
    ("on", "off", "why"),
    [
        ("CUDAExecutionProvider", 0.0, ""),
        ("CUDAExecutionProvider", 0.01, ""),  # as GPUs round off by default, and half precision
        (
            "CUDAExecutionProvider",
            3.0,
            "it computes wrong results: [[10.0, 13.0], [18.0, 25.0]] for [[7.0, 10.0",
        ),
        ("CPUExecutionProvider", 0.0, "onnxruntime fell back to the CPU and does not say why"),
    ],
)
def test_a_provider_works_that_runs_the_graph_itself_and_rightly(
    on: str, off: float, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What onnxruntime would log of it meanwhile is the reason, and afterwards it logs as before."""
    severities: list[int] = []

    def session(_: bytes, options: ort.SessionOptions, *_how: object) -> Tried:
        severities.append(options.log_severity_level)
        return Tried((on,), np.asarray([[7, 10], [15, 22]], np.float32) + np.float32(off))

    monkeypatch.setattr(plugins, "session", session)
    monkeypatch.setattr(ort, "set_default_logger_severity", severities.append)
    assert probe("cuda").startswith(why) and bool(probe("cuda")) is bool(why)
    assert severities == [4, 4, 2] * 2


def test_tensorrt_builds_no_engine_to_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take seconds at each start."""
    told: list[object] = []
    monkeypatch.setattr(plugins, "session", lambda _graph, _options, on: told.extend(on))
    probe("tensorrt")
    assert told == [("TensorrtExecutionProvider", {"trt_min_subgraph_size": "1000"})]


@pytest.mark.linux
def test_a_provider_whose_library_cannot_be_loaded_says_which_library_that_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log alone is told of that by onnxruntime, which falls back or fails. The shared library comes first."""
    loaded: list[tuple[object, ...]] = []

    def load(*what: object) -> None:
        loaded.append(what)
        if "cuda" in str(what[0]):
            raise OSError(f"libcublasLt.so.12: {NO_FILE}")

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA failure 100: no CUDA-capable device")

    shared, own = (tmp_path / "capi" / f"libonnxruntime_providers_{name}.so" for name in ("shared", "cuda"))
    own.parent.mkdir()
    own.touch()
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(ctypes, "CDLL", load)
    for session in (lambda *_: Tried(("CPUExecutionProvider",), np.zeros(1)), fail):
        monkeypatch.setattr(plugins, "session", session)
        assert re.fullmatch(f"libcublasLt.so.12: {NO_FILE}; it comes with CUDA and cuDNN, .*", probe("cuda"))
    assert loaded == [(str(shared), ctypes.RTLD_GLOBAL), (str(own),)] * 2


def test_nvidias_packages_are_loaded_without_a_word_before_what_needs_them_is_tried(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where they are installed, and for no other provider: no loader looks there."""
    done: list[str] = []

    def preload() -> None:
        sys.stdout.write("Failed to load a library\n")
        done.append("libraries")

    monkeypatch.setattr(ort, "preload_dlls", preload, raising=False)
    monkeypatch.setattr(providers, "probe", lambda name: done.append(name) or "")
    for installed, name, expected in (
        (True, "cuda", ["libraries", "cuda"]),
        (True, "tensorrt", ["libraries", "tensorrt"]),
        (True, "directml", ["directml"]),
        (False, "cuda", ["cuda"]),
    ):
        done.clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, installed=installed: installed or None)
        monkeypatch.setattr(ort, "get_available_providers", lambda name=name: [full_name(name)])
        find((name,))
        assert done == expected
    assert capfd.readouterr() == ("", "")


def test_the_cpu_works_and_what_onnxruntime_does_not_have_fails_with_a_reason() -> None:
    assert probe(CPU) == ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.warns(UserWarning, match="not in available provider"):
        assert "NoSuchExecutionProvider" in probe("NoSuchExecutionProvider")
    assert printed.getvalue() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the names are those of Linux")
@pytest.mark.parametrize(
    ("library", "origin"),
    [
        ("libcuda.so.999", "NVIDIA's driver"),
        ("libcudnn.so.999", "onnxruntime-gpu[cuda,cudnn]"),
        ("libcublasLt.so.999", "onnxruntime-gpu[cuda,cudnn]"),
        ("libnvJitLink.so.999", "onnxruntime-gpu[cuda,cudnn]"),
        ("libnvrtc.so.999", "onnxruntime-gpu[cuda,cudnn]"),
        ("libnvinfer.so.999", "TensorRT"),
    ],
)
def test_a_library_that_is_not_there_is_named_with_what_brings_it(library: str, origin: str) -> None:
    with pytest.raises(OSError, match=library) as missing:
        ctypes.CDLL(library)
    told = with_origin(f"a plugin cannot be registered: {missing.value}")
    assert re.search(f"{library}: .*; it comes with .*{re.escape(origin)}", told)


def test_other_libraries_are_not_said_to_be_of_cuda() -> None:
    for failure in (
        "libcurl.so.4: cannot open shared object file",
        "libcups.so.2: cannot open shared object file",
    ):
        assert with_origin(failure) == failure


def test_a_companion_of_onnxruntime_is_not_taken_for_a_second_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As onnxruntime_ggml 0.2.0 is installed, which has no top_level.txt."""
    for name, file in {"": "onnxruntime", "_ggml": "onnxruntime_ggml", "_gpu": "onnxruntime"}.items():
        (folder := tmp_path / f"onnxruntime{name}-1.0.dist-info").mkdir()
        (folder / "RECORD").write_text(f"{folder.name}/METADATA,sha256=a,1\n{file}/__init__.py,sha256=b,2\n")
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "onnxruntime" / "__init__.py"))
    assert _builds() == ("onnxruntime", "onnxruntime-gpu")
    (folder / "RECORD").write_bytes(b"\xff.py,,\nonnxruntime/__init__.py,,\n")
    assert _builds() == ("onnxruntime", "onnxruntime-gpu")
    (folder / "RECORD").unlink()
    (folder / "RECORD").mkdir()  # what cannot be read
    assert _builds() == ("onnxruntime", "onnxruntime-gpu")


@pytest.mark.parametrize(
    ("name", "said", "wrong"),
    [
        (
            "directml",  # where Windows lacks it
            r"E:\_work\1\s\onnxruntime\core\providers\dml\dml_provider_factory.cc:338 "
            "onnxruntime::DMLProviderFactoryCreator::CreateFromDeviceOptions DXCore is not available on this platform.",
            "DXCore is not available on this platform.",
        ),
        (
            "qnn",
            "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/onnxruntime/core/session/plugin_ep/ep_plugin.cc:393 "
            "virtual std::unique_ptr<onnxruntime::IExecutionProvider> onnxruntime::PluginExecutionProviderFactory::"
            "CreateProvider(const OrtSessionOptions&, const OrtLogger&) [ONNXRuntimeError] : 1 : FAIL : "
            "Could not determine default backend path for device\n",
            "Could not determine default backend path for device",
        ),
        (
            "webgpu",
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : /onnxruntime_src/onnxruntime/core/providers/webgpu/context.cc"
            ":118 onnxruntime::webgpu::WebGpuContext::Initialize(const onnxruntime::webgpu::WebGpuContextConfig&)::"
            "<lambda()>::<lambda(wgpu::RequestAdapterStatus, wgpu::Adapter)> status == wgpu::RequestAdapterStatus::"
            "Success was false. Failed to get a WebGPU adapter: No supported adapters.",
            "Failed to get a WebGPU adapter: No supported adapters.",
        ),
        (
            "cuda",
            "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:129 std::conditional_t<THRW, void, "
            "onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*) [with ERRTYPE = cudaError] CUDA "
            "failure 35: CUDA driver version is insufficient ; GPU=0 ; file=/onnxruntime_src/cuda_provider.cc ; line=9",
            "CUDA failure 35: CUDA driver version is insufficient ; GPU=0 ; file=/onnxruntime_src/cuda_provider.cc "
            "; line=9",
        ),
        ("directml", "", "RuntimeError"),
        ("cuda", "first " + "x" * 1000 + " last", "x" * 295 + " last"),
    ],
)
def test_people_are_told_what_is_wrong_and_not_where_onnxruntime_noticed(
    name: str, said: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(plugins, "session", fail)
    assert probe(name) == wrong
