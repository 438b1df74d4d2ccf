"""Providers that are packages of their own are found and registered, or passed over with the reason.

No such package runs everywhere: those here are made up around a library that is none, and a session is opened on a
device that onnxruntime itself offers in the way that plugins do.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edge_agent.diffusion import plugins, providers
from edge_agent.diffusion.plugins import Plugin
from edge_agent.errors import StartRefused

NAME = "OpenVINOExecutionProvider"
PACKAGE = "onnxruntime_ep_made"

Install = Callable[..., None]

knows_plugins = pytest.mark.skipif(
    not hasattr(ort, "register_execution_provider_library"), reason="this onnxruntime is from before plugins"
)


def record_of(folder: Path, package: str) -> None:
    """What an installation leaves beside the package."""
    (info := folder / f"{package}-1.0.dist-info").mkdir()
    (info / "RECORD").write_text(f"{package}/__init__.py,,\n")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package with this text, and of that name, beside onnxruntime."""
    (tmp_path / "onnxruntime").mkdir()
    record_of(tmp_path, "onnxruntime")
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "onnxruntime" / "__init__.py"))
    monkeypatch.syspath_prepend(tmp_path)

    installed = []

    def write(text: str, package: str = PACKAGE) -> None:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(text)
        record_of(tmp_path, package)
        installed.append(package)

    plugins.found.cache_clear()
    yield write
    plugins.found.cache_clear()
    for package in installed:
        sys.modules.pop(package, None)


def made(provider: str, library: Path) -> str:
    return f"def get_library_path(): return {str(library)!r}\ndef get_ep_names(): return [{provider!r}]\n"


def test_where_no_plugin_is_installed_nothing_is_registered(install: Install) -> None:
    assert plugins.found() == {}


@knows_plugins
def test_a_library_that_cannot_be_loaded_is_told_where_its_provider_is_asked_for(
    install: Install, tmp_path: Path
) -> None:
    (tmp_path / "made.so").write_bytes(b"no library")
    install(made(NAME, tmp_path / "made.so"))
    reason = rf"{PACKAGE} cannot be registered: .*made\.so"
    choice = providers.find()
    assert (choice.serving, choice.better) == (("cpu",), ())
    assert re.match(reason, choice.passed_over["openvino"])
    assert choice.passed_over["openvino"].count("made.so") == 1  # onnxruntime says it twice
    assert "overwrite each other" not in choice.passed_over["cuda"]  # it is no second onnxruntime
    with pytest.raises(StartRefused, match=f"names openvino, which does not work here: {reason}"):
        providers.find(("openvino", "cpu"))


def test_a_package_that_does_not_say_what_it_is_goes_by_its_own_name(install: Install) -> None:
    install("")
    assert "no attribute 'get_ep_names'" in providers.find().passed_over["made"]


def test_what_onnxruntime_has_built_in_needs_no_plugin(install: Install, tmp_path: Path) -> None:
    install(made("CPUExecutionProvider", tmp_path / "none.so"))
    assert plugins.found() == {}


def test_an_onnxruntime_from_before_plugins_says_so(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(made(NAME, tmp_path / "none.so"))
    monkeypatch.delattr(ort, "register_execution_provider_library", raising=False)
    assert "is too old for plugins" in plugins.found()[NAME].failure


def device(name: str, kind: str) -> SimpleNamespace:
    return SimpleNamespace(ep_name=name, device=SimpleNamespace(type=SimpleNamespace(name=kind)))


def test_a_library_that_calls_its_provider_what_it_is_registered_as_is_found(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of Qualcomm, NVIDIA and AMD do. Qualcomm's goes by another name, and is made for the NPU."""
    names = {PACKAGE: NAME, "onnxruntime_qnn": "QNNExecutionProvider"}
    for package, name in names.items():
        install(made(name, tmp_path / "made.so"), package)
    offered: list[SimpleNamespace] = []

    def register(name: str, _path: str) -> None:
        offered.extend(device(name, kind) for kind in ("CPU", "GPU", "NPU"))

    monkeypatch.setattr(ort, "register_execution_provider_library", register, raising=False)
    monkeypatch.setattr(ort, "get_ep_devices", lambda: offered, raising=False)
    kinds = {name: plugin.device.device.type.name for name, plugin in plugins.found().items()}
    assert kinds == {NAME: "GPU", "QNNExecutionProvider": "NPU"}


def test_of_a_plugins_devices_the_first_of_the_best_kind_is_taken(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are of other plugins, or choose among these."""
    offered = [device(NAME, kind) for kind in ("NPU", "GPU", "GPU", "CPU")]
    others = [device("CPUExecutionProvider", "GPU"), device(f"{NAME}.AUTO", "GPU")]
    install(made(NAME, tmp_path / "made.so"))
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda _name, _path: None, raising=False)
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [*others, *offered], raising=False)
    assert plugins.found().keys() == {NAME} and plugins.found()[NAME].device is offered[1]
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: [f"{NAME}.AUTO", NAME, "CPUExecutionProvider"]
    )
    monkeypatch.setattr(providers, "probe", lambda _name: "")
    choice = providers.find()
    assert (choice.serving, choice.better) == (("cpu",), ("openvino", "cpu"))
    assert not any("auto" in name for name in choice.passed_over)


def test_a_plugin_that_finds_no_device_is_passed_over(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenVINO's where there is neither an Intel GPU nor a CPU that it knows."""
    install(made(NAME, tmp_path / "made.so"))
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda _name, _path: None, raising=False)
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [device("CPUExecutionProvider", "GPU")], raising=False)
    assert plugins.found() == {NAME: Plugin(failure=f"{PACKAGE} finds no device of its kind here")}
    assert providers.find().passed_over["openvino"] == f"{PACKAGE} finds no device of its kind here"


@knows_plugins
def test_a_session_goes_to_the_plugins_device(monkeypatch: pytest.MonkeyPatch) -> None:
    (device,) = (each for each in ort.get_ep_devices() if each.ep_name == "CPUExecutionProvider")
    monkeypatch.setattr(plugins, "found", lambda: {"MadeExecutionProvider": Plugin(device)})
    x = np.asarray([[1, 2], [3, 4]], np.float32)
    options = ort.SessionOptions()
    wanted = ("MadeExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider")
    session = plugins.session(providers._GRAPH, options, [(name, {}) for name in wanted])
    assert options.has_providers() and "AzureExecutionProvider" in session.get_providers()
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x @ x)


def test_a_plugin_and_those_beside_it_are_told_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them a precision, without which the same seed draws another picture."""
    told: list[tuple[object, object]] = []
    options: Any = SimpleNamespace(
        add_provider_for_devices=lambda devices, given: told.append((devices, given)),
        add_provider=lambda name, given: told.append((name, given)),
    )
    monkeypatch.setattr(plugins, "found", lambda: {"MadeExecutionProvider": Plugin("its device")})
    monkeypatch.setattr(plugins, "_Session", lambda *_, **more: more)
    wanted = {"Made": {"load_config": "{}"}, "CUDA": {"gpu_mem_limit": "7"}, "CPU": {}}
    on = [(f"{name}ExecutionProvider", given) for name, given in wanted.items()]
    session = plugins.session(b"", options, on, disabled_optimizers=("SomeFusion",))
    assert told == [(["its device"], wanted["Made"]), ("CUDAExecutionProvider", wanted["CUDA"])]
    assert session["disabled_optimizers"] == ("SomeFusion",)


@pytest.mark.parametrize(
    ("short", "name", "expected"),
    [
        ("migraphx", "MIGraphXExecutionProvider", {"migraphx_model_cache_dir": "{cache}"}),
        # Its own default for the format knows no half precision.
        (
            "coreml",
            "CoreMLExecutionProvider",
            {"ModelFormat": "MLProgram", "ModelCacheDirectory": "{cache}"},
        ),
    ],
)
def test_a_compiler_is_told_where_to_keep_what_it_compiles(
    short: str, name: str, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it compiles anew at each start, and whenever models that were unloaded are loaded again."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [name, "CPUExecutionProvider"])
    cache = tmp_path / "cache"
    told = providers.options((short, "cpu"), cache, half=False)
    assert told == {name: {option: value.format(cache=cache) for option, value in expected.items()}}
    assert list(cache.iterdir()) == []  # that it can be written to was tried
    assert os.name != "posix" or stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_openvinos_plugin_is_told_of_cache_and_precision_in_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ignores the option of the provider that is built in, and computes in half precision unless told not to."""
    assert providers.options(("openvino",), tmp_path, half=False) == {NAME: {"cache_dir": str(tmp_path)}}
    monkeypatch.setattr(plugins, "found", lambda: {NAME: Plugin()})
    for half in (True, False):
        (options,) = providers.options(("openvino",), tmp_path, half=half).values()
        told = json.loads(options.pop("load_config"))
        assert options == {} and told.keys() == {"CPU", "GPU", "NPU"}
        for properties in told.values():
            assert properties["CACHE_DIR"] == str(tmp_path)
            assert properties.get("INFERENCE_PRECISION_HINT") == (None if half else "f32")
