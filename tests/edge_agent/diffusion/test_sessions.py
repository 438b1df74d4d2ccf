"""A session refuses graphs that do not fit, and a stop ends a run that is under way."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from edge_agent import memory
from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion import plugins, providers, sessions
from edge_agent.diffusion.sessions import Runtime, Session, Stop
from edge_agent.errors import BundleError, Busy, Cancelled, GenerationFailed, OutOfMemory
from edge_agent.graph_files import file_states
from tests.running import process_environment

ONE_THREAD = Runtime(threads=1)


def save(path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, list[int | str]]]) -> Path:
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


PRODUCTS = 3000
SQUARE = {"x": np.zeros((1024, 1024), np.float32)}


def chain(path: Path, products: int) -> Session:
    """So many products, one after the other, on one core."""
    names = ["x", *(f"y{step}" for step in range(products - 1)), "out"]
    nodes = [helper.make_node("MatMul", [a, "x"], [b]) for a, b in pairwise(names)]
    save(path, nodes, {"x": (TensorProto.FLOAT, [1024, 1024])})
    return Session(path, ["x"], ["out"], ONE_THREAD)


@pytest.fixture
def slow(tmp_path: Path) -> Session:
    """Takes many seconds."""
    return chain(tmp_path / "slow.onnx", PRODUCTS)


@pytest.fixture
def whole_s(tmp_path: Path) -> float:
    """How long a run of `slow` would take here and now."""
    few = chain(tmp_path / "few.onnx", PRODUCTS // 150)
    few.run(SQUARE)
    before = time.monotonic()
    few.run(SQUARE)
    return 150 * (time.monotonic() - before)


def test_stop_ends_a_run_that_is_under_way(slow: Session, whole_s: float) -> None:
    stop = Stop()
    timer = threading.Timer(whole_s / 20, stop.set)
    before = time.monotonic()
    timer.start()
    with pytest.raises(Cancelled):
        slow.run(SQUARE, stop=stop)
    assert time.monotonic() - before < whole_s / 2  # a run that goes on to its end takes all of it
    timer.join()


def test_a_stop_that_is_set_starts_nothing(slow: Session, whole_s: float) -> None:
    stop = Stop()
    stop.set()
    before = time.monotonic()
    with pytest.raises(Cancelled):
        slow.run(SQUARE, stop=stop)
    assert time.monotonic() - before < whole_s / 2


def test_an_unloaded_graph_is_loaded_by_the_next_run_and_a_stop_ends_that_too(tmp_path: Path) -> None:
    """Where onnxruntime cannot break off a load, the run behind it does not begin."""
    names = ["x", *(f"y{step}" for step in range(2999)), "out"]
    nodes = [helper.make_node("MatMul", [a, "x"], [b]) for a, b in pairwise(names)]
    path = save(tmp_path / "long.onnx", nodes, {"x": (TensorProto.FLOAT, [2, 2])})
    session = Session(path, ["x"], ["out"], ONE_THREAD)
    session.unload()
    assert session.loaded_at is None
    stop = Stop()
    timer = threading.Timer(0.02, stop.set)
    timer.start()

    def run_on() -> None:  # until the stop strikes: while it loads, or in one of the runs after that
        while True:
            session.run({"x": np.eye(2)}, stop=stop)

    with pytest.raises(Cancelled):
        run_on()
    timer.join()
    assert stop._endings == []  # it holds on to nothing that has ended
    other = Stop()
    session.run({"x": np.eye(2)}, stop=other)
    assert other._endings == []
    session.unload()
    with pytest.raises(Cancelled):
        session.run({"x": np.eye(2)}, stop=stop)
    assert session.loaded_at is None  # what is cancelled loads nothing
    (out,) = session.run({"x": np.eye(2)})
    assert out.tolist() == np.eye(2).tolist()
    assert session.loaded_at is not None


def test_two_runs_that_meet_at_an_unloaded_graph_load_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice its memory may be more than there is."""
    session = chain(tmp_path / "few.onnx", 2)
    session.unload()
    begun, load = [], session._load

    def slowly(stop: Stop) -> ort.InferenceSession:
        begun.append(stop)
        time.sleep(0.1)
        return load(stop)

    monkeypatch.setattr(session, "_load", slowly)
    threads = [threading.Thread(target=session.run, args=(SQUARE,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 1 and session.loaded_at is not None


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
@pytest.mark.parametrize(
    ("providers", "what"),
    [
        (("CPUExecutionProvider",), "memory or file descriptors"),
        (("AzureExecutionProvider", "CPUExecutionProvider"), "memory, also of the device"),
    ],
)
def test_a_device_without_room_to_load_again_is_busy_and_the_bundle_not_to_blame(
    tmp_path: Path, providers: tuple[str, ...], what: str
) -> None:
    import resource

    path = chain(tmp_path / "few.onnx", 2).path
    session = Session(path, ["x"], ["out"], replace(ONE_THREAD, providers=providers))
    session.unload()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))  # those that are open stay so
    try:
        with pytest.raises(Busy, match=f"cannot now: .*; free {what}") as refused:
            session.run(SQUARE)
        assert refused.value.retry_after_s
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    session.run(SQUARE)


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from edge_agent.diffusion.sessions import Runtime, Session
from edge_agent.errors import OutOfMemory

def limit(more):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more if more else resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def refused(work):
    try:
        work()
    except OutOfMemory as error:
        print(error.message)

path, runtime = Path(sys.argv[1]), Runtime(threads=1)
limit(20_000_000)
refused(lambda: Session(path, ["x"], ["out"], runtime))
limit(None)
session = Session(path, ["x"], ["out"], runtime)
limit(20_000_000)
refused(lambda: session.run({"x": np.zeros(1, np.float32)}))
assert session.loaded_at is None, "its arena is kept"
limit(None)
(out,) = session.run({"x": np.ones(1, np.float32)})
assert out.shape == (4096, 4096), out.shape
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is limited otherwise")
def test_memory_that_runs_out_is_called_so_and_what_comes_after_it_works(tmp_path: Path) -> None:
    """In a process of its own, with 20 MB left: first for weights of 64 MB, then for a product of as many."""
    row = onnx.numpy_helper.from_array(np.ones((4096, 4096), np.float32), "weights")
    save(
        tmp_path / "a.onnx",
        [helper.make_node("Mul", ["x", "weights"], ["out"])],
        {"x": (TensorProto.FLOAT, [1])},
    )
    graph = onnx.load(tmp_path / "a.onnx")
    graph.graph.initializer.append(row)
    onnx.save(graph, tmp_path / "a.onnx")
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path / "a.onnx")],
        env=process_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loading, running = done.stdout.splitlines()
    assert "a.onnx cannot be loaded: this device is out of memory; free some, or" in loading
    assert "a.onnx cannot be run: this device is out of memory; free some, or" in running


@pytest.mark.parametrize(
    "said",
    [
        "CUDA failure 2: out of memory ; GPU=0",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "CUDNN failure 4002: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0",  # of cuDNN 9
        "Failed to load kernel: CUDA_ERROR_OUT_OF_MEMORY",
        "DmlExecutionProvider.cpp(1088) 8007000E Not enough memory resources are available",
    ],
)
def test_a_device_without_memory_is_known_by_its_librarys_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    path = save(
        tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["out"])], {"x": (TensorProto.FLOAT, [3])}
    )
    session = Session(path, ["x"], ["out"], ONE_THREAD)

    def run(*_: Any) -> None:
        raise RuntimeError(said)

    arena = weakref.ref(session._session)
    with monkeypatch.context() as patched:
        patched.setattr(plugins._Session, "run", run)
        with pytest.raises(OutOfMemory, match="out of memory") as raised:
            session.run({"x": np.ones(3)})
    assert arena() is None, "the error holds what the session took"
    assert raised.value.retry_after_s
    np.testing.assert_array_equal(session.run({"x": np.ones(3)})[0], -np.ones(3))


def test_pythons_own_word_for_it_is_known_too() -> None:
    assert sessions.lacks_memory(MemoryError("Unable to allocate 1. GiB for an array"))
    assert not sessions.lacks_memory(RuntimeError("CUDA failure 999: unknown error"))


def test_a_large_graph_that_does_not_fit_is_refused_before_the_system_ends_a_process_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(
        tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["out"])], {"x": (TensorProto.FLOAT, [3])}
    )
    size = path.stat().st_size
    left = [2 * size - 1]
    monkeypatch.setattr(memory, "available_bytes", lambda: left[0])
    Session(path, ["x"], ["out"], ONE_THREAD)  # a small one is not worth a question
    monkeypatch.setattr(sessions, "LARGE_BYTES", size)
    with pytest.raises(OutOfMemory, match=r"a\.onnx takes 0 MB of memory to load, and 0 MB can be had"):
        Session(path, ["x"], ["out"], ONE_THREAD)
    left[0] += 1
    session = Session(path, ["x"], ["out"], ONE_THREAD)
    session.unload()
    left[0] -= 1
    with pytest.raises(OutOfMemory) as refused:
        session.run({"x": np.zeros(3)})
    assert refused.value.retry_after_s
    monkeypatch.setattr(memory, "available_bytes", lambda: None)  # a system that does not say
    session.run({"x": np.zeros(3)})


def test_weights_beside_a_graph_need_their_room_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(
        tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["out"])], {"x": (TensorProto.FLOAT, [3])}
    )
    (tmp_path / "weights").write_bytes(bytes(10_000))
    files = file_states([path, tmp_path / "weights"])
    monkeypatch.setattr(sessions, "LARGE_BYTES", 10_000)
    left = [10_000 + 2 * path.stat().st_size]
    monkeypatch.setattr(memory, "available_bytes", lambda: left[0])
    Session(path, ["x"], ["out"], ONE_THREAD, files)
    left[0] -= 1
    with pytest.raises(OutOfMemory):
        Session(path, ["x"], ["out"], ONE_THREAD, files)


@pytest.mark.skipif(
    not hasattr(ort.SessionOptions(), "set_load_cancellation_flag"),
    reason="this onnxruntime loads to the end",
)
def test_a_stop_while_a_graph_loads_breaks_off_the_load(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["out"])], {"x": (TensorProto.FLOAT, [3])}
    )
    session = Session(path, ["x"], ["out"], ONE_THREAD)
    session.unload()

    class StopsAtOnce(Stop):
        """It is set once the load has been entered, before onnxruntime begins: a moment that no timer would meet."""

        def enter(self, end: Callable[[], None]) -> None:
            super().enter(end)
            self.set()

    with pytest.raises(Cancelled):
        session.run({"x": np.ones(3)}, stop=StopsAtOnce())
    assert session.loaded_at is None  # a load that goes on to its end leaves a session behind


def resident_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def test_threads_sleep_between_nodes_unless_they_are_told_to_spin(tmp_path: Path) -> None:
    """Decisions and the event loop share the cores with them."""
    path = save(
        tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["out"])], {"x": (TensorProto.FLOAT, [1])}
    )
    for runtime, spins in ((Runtime(), "0"), (Runtime(spinning=True), "1")):
        session = Session(path, ["x"], ["out"], runtime)._session
        assert session is not None
        options = session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins


def test_each_provider_is_told_its_own_options_and_onnxruntime_to_be_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them where to keep what it compiles: else a start takes minutes each time."""
    made, told = plugins.session, []

    def noted(path: str, options: ort.SessionOptions, on: Any, **more: Any) -> ort.InferenceSession:
        told.append((options.log_severity_level, on))
        return made(path, options, [(name, {}) for name, _ in on], **more)

    monkeypatch.setattr(plugins, "session", noted)
    path = save(
        tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["out"])], {"x": (TensorProto.FLOAT, [1])}
    )
    names = ("AzureExecutionProvider", "CPUExecutionProvider")
    Session(
        path, ["x"], ["out"], Runtime(providers=names, provider_options={names[0]: {"cache_dir": "here"}})
    )
    assert told == [(4, [(names[0], {"cache_dir": "here"}), (names[1], {})])]


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_run_that_shrinks_gives_the_memory_of_its_large_tensors_back(tmp_path: Path) -> None:
    """128 MB between an input and an output of some kilobytes: far more than anything else here takes or frees."""
    nodes = [
        helper.make_node(
            "Neg", ["x"], ["first"]
        ),  # the arena's first block is small, as it is never given back
        helper.make_node("MatMul", ["first", "y"], ["product"]),
        helper.make_node("ReduceMax", ["product"], ["out"], keepdims=0),
    ]
    inputs: dict[str, tuple[int, list[int | str]]] = {
        "x": (TensorProto.FLOAT, [4096, 1]),
        "y": (TensorProto.FLOAT, [1, 8192]),
    }
    session = Session(save(tmp_path / "a.onnx", nodes, inputs), ["x", "y"], ["out"], ONE_THREAD)
    feeds = {"x": np.ones((4096, 1)), "y": np.ones((1, 8192))}
    session.run(feeds, stop=Stop())
    held = resident_bytes()
    session.run(feeds, stop=Stop(), shrink=True)
    assert held - resident_bytes() > 64_000_000


@pytest.mark.parametrize(
    ("names", "arenas"),
    [("CPU", "cpu:0"), ("CUDA CPU", "cpu:0;gpu:0"), ("Tensorrt CPU", "cpu:0;gpu:0"), ("Dml CPU", "cpu:0")],
)
def test_a_run_that_shrinks_gives_the_memory_of_nvidias_gpus_back_too(names: str, arenas: str) -> None:
    """Of an arena that is not there onnxruntime makes an error."""
    assert sessions._arenas([f"{name}ExecutionProvider" for name in names.split()]) == arenas


def test_a_run_that_shrinks_is_made_where_no_arena_holds_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on DirectML, whose own allocator for the CPU is none. onnxruntime refuses such a run before it begins."""
    made = plugins.session

    def without_arena(path: str, options: ort.SessionOptions, *how: Any, **more: Any) -> ort.InferenceSession:
        options.enable_cpu_mem_arena = False
        return made(path, options, *how, **more)

    monkeypatch.setattr(plugins, "session", without_arena)
    path = save(
        tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["out"])], {"x": (TensorProto.FLOAT, [3])}
    )
    session = Session(path, ["x"], ["out"], ONE_THREAD)
    x = np.ones(3, np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(session.run({"x": x}, shrink=True)[0], -x)


def test_only_a_large_graph_runs_without_the_memory_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights beside the graph count, and it makes no difference to the result."""
    path = save(
        tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["out"])], {"x": (TensorProto.FLOAT, [3])}
    )
    (tmp_path / "a.onnx_data").write_bytes(bytes(2000))
    x = np.ones(3, np.float32)
    kept = []
    for limit in (1_000_000, 1_000):
        monkeypatch.setattr(sessions, "LARGE_BYTES", limit)
        session = Session(path, ["x"], ["out"], ONE_THREAD, file_states([path, tmp_path / "a.onnx_data"]))
        assert session._session is not None
        kept.append(session._session.get_session_options().enable_mem_pattern)
        np.testing.assert_array_equal(session.run({"x": x})[0], -x)
    assert kept == [True, False]


def test_onnxruntimes_own_format_is_not_taken_for_a_graph(tmp_path: Path) -> None:
    """Where it has its weights nobody has looked: onnxruntime must go on to know it by its name alone."""
    path = save(
        tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["out"])], {"x": (TensorProto.FLOAT, [3])}
    )
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "b.onnx")
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(path, options)  # writes it
    assert (tmp_path / "b.onnx").read_bytes()[4:8] == b"ORTM"
    with pytest.raises(BundleError, match=r"b\.onnx cannot be loaded by onnxruntime"):
        Session(tmp_path / "b.onnx", ["x"], ["out"], ONE_THREAD)


def test_inputs_take_the_types_of_the_graph(tmp_path: Path) -> None:
    """Exports differ in whether token ids are int32 or int64, and timesteps floats or integers."""
    for kind in (TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT16, TensorProto.DOUBLE):
        node = helper.make_node("Cast", ["x"], ["out"], to=TensorProto.FLOAT)
        session = Session(
            save(tmp_path / "cast.onnx", [node], {"x": (kind, [1])}), ["x"], ["out"], ONE_THREAD
        )
        (out,) = session.run({"x": np.asarray([7], np.int64)})
        assert out.tolist() == [7.0]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_outputs_of_other_floats_come_back_as_float32(tmp_path: Path, kind: int) -> None:
    """Whichever of the outputs they are."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["out"], to=kind), helper.make_node("Neg", ["x"], ["plain"])],
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [
            helper.make_tensor_value_info("plain", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("out", kind, [1]),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8),
        tmp_path / "h.onnx",
    )
    session = Session(tmp_path / "h.onnx", ["x"], ["plain", "out"], ONE_THREAD)
    assert [out.dtype for out in session.run({"x": np.ones(1)})] == [np.float32] * 2
    (out,) = Session(tmp_path / "h.onnx", ["x"], ["out"], ONE_THREAD).run(
        {"x": np.ones(1)}
    )  # without the other
    assert out.dtype == np.float32


def test_a_graph_that_gives_what_is_no_tensor_of_floats_is_refused_by_name(tmp_path: Path) -> None:
    floats = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    for operator, kind in (
        ("SequenceConstruct", helper.make_sequence_type_proto(floats)),
        ("Optional", helper.make_optional_type_proto(floats)),
        ("IsNaN", helper.make_tensor_type_proto(TensorProto.BOOL, [1])),
    ):
        graph = helper.make_graph(
            [helper.make_node(operator, ["x"], ["out"])],
            "made",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_value_info("out", kind)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(model, tmp_path / "odd.onnx")
        with pytest.raises(BundleError, match=r"odd\.onnx gives outputs of the types"):
            Session(tmp_path / "odd.onnx", ["x"], ["out"], ONE_THREAD)


def test_sizes_that_a_graph_leaves_open_are_known_once_they_are_expected(tmp_path: Path) -> None:
    """Of its inputs: compilers are told of these. Of images any number will do, and one is made at a time."""
    node = helper.make_node("ReduceMax", ["x"], ["out"], keepdims=0)
    path = save(tmp_path / "open.onnx", [node], {"x": (TensorProto.FLOAT, ["batch", 3, "width"])})
    model = onnx.load(path)
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    onnx.save(model, path)
    session = Session(path, ["x"], ["out"], ONE_THREAD)
    session.expect({"x": (None, 3, 8), "out": ()})
    assert session.sizes == {"batch": 1, "width": 8}
    for other in ((None, 3), (None, 3, 8, 8), (None, 4, 8)):
        with pytest.raises(BundleError, match=r"open\.onnx: x has the shape .*, the manifest asks for"):
            session.expect({"x": other})


def test_a_runtime_of_one_size_is_for_the_bundles_default_which_else_comes_last(bundle_copy: Path) -> None:
    write_manifest(bundle_copy, other_sizes=[(96, 64), (64, 96)])
    facts = Bundle.open(bundle_copy).manifest
    assert Runtime().sizes_of(facts) == ((64, 96), (96, 64), (64, 64))
    assert Runtime(sizes={"width": 64}).sizes_of(facts) == ((64, 64),)


def test_a_graph_that_asks_for_what_nobody_makes_is_refused_by_name(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["out"], to=TensorProto.FLOAT)
    path = save(tmp_path / "odd.onnx", [node], {"x": (TensorProto.UINT8, [1])})
    with pytest.raises(BundleError, match=r"odd\.onnx asks for inputs of the types \['tensor\(uint8\)'\]"):
        Session(path, ["x"], ["out"], ONE_THREAD)


def test_a_graph_with_another_signature_is_refused_by_name(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["out"])
    path = save(tmp_path / "other.onnx", [node], {"x": (TensorProto.FLOAT, [1])})
    with pytest.raises(BundleError, match=r"other\.onnx takes \['x'\]"):
        Session(path, ["sample"], ["out"], ONE_THREAD)
    with pytest.raises(BundleError, match=r"other\.onnx .* gives \['out'\]"):
        Session(path, ["x"], ["sample"], ONE_THREAD)


def test_a_file_that_is_no_graph_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"bad\.onnx cannot be loaded"):
        Session(tmp_path / "bad.onnx", ["x"], ["out"], ONE_THREAD)


def test_the_names_in_a_graph_steer_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They are quoted in what onnxruntime raises, and what it says on standard error itself."""
    name, inputs = "\x1b[2J", {"x": (TensorProto.FLOAT, [2])}
    unknown = save(tmp_path / "unknown.onnx", [helper.make_node(name, ["x"], ["out"])], inputs)
    with pytest.raises(BundleError, match=r"No Op registered for \?\[2J ") as refused:
        Session(unknown, ["x"], ["out"], ONE_THREAD)
    assert refused.value.message.isprintable()
    failing = save(
        tmp_path / "failing.onnx", [helper.make_node("Reshape", ["x", "x2"], ["out"], name)], inputs
    )
    model = onnx.load(failing)
    model.graph.initializer.append(helper.make_tensor("x2", TensorProto.INT64, [1], [7]))
    onnx.save(model, failing)
    with pytest.raises(GenerationFailed, match=r"'\?\[2J'") as failed:
        Session(failing, ["x"], ["out"], ONE_THREAD).run({"x": np.zeros(2)})
    assert failed.value.message.isprintable()
    assert "\x1b" not in capfd.readouterr().err


def test_a_run_that_fails_names_the_graph(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["out"])
    path = save(tmp_path / "two.onnx", [node], {"x": (TensorProto.FLOAT, [2])})
    with pytest.raises(GenerationFailed, match=r"two\.onnx"):
        Session(path, ["x"], ["out"], ONE_THREAD).run({"x": np.zeros(3)})


def test_a_provider_that_is_not_there_is_refused_and_not_replaced_by_the_cpu(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    node = helper.make_node("Identity", ["x"], ["out"])
    path = save(tmp_path / "one.onnx", [node], {"x": (TensorProto.FLOAT, [1])})
    runtime = Runtime(threads=1, providers=("NoSuchExecutionProvider", "CPUExecutionProvider"))
    with (
        pytest.warns(UserWarning, match="not in available provider"),
        pytest.raises(BundleError, match=r"one\.onnx .*NoSuchExecutionProvider"),
    ):
        Session(path, ["x"], ["out"], runtime)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "alone"), [("Dml", True), ("WebGpu", True), ("CUDA", False), ("OpenVINO", False)]
)
def test_which_providers_bear_no_two_sessions_at_once(name: str, alone: bool) -> None:
    """Also where they are not the first."""
    assert sessions.takes_turns(("CPUExecutionProvider", f"{name}ExecutionProvider")) is alone


def test_providers_that_bear_no_two_sessions_at_once_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open, run or unload. With others a decision does not wait for the image before it."""
    chain(tmp_path / "few.onnx", 2)
    inside: set[int] = set()  # threads
    most = 0

    def watched(work: Callable[..., object]) -> Callable[..., object]:
        def watching(*arguments: object, **named: object) -> object:
            nonlocal most
            outermost = threading.get_ident() not in inside  # an unloaded graph is loaded within its run
            inside.add(threading.get_ident())
            most = max(most, len(inside))
            time.sleep(0.01)
            try:
                return work(*arguments, **named)
            finally:
                if outermost:
                    inside.remove(threading.get_ident())

        return watching

    def use() -> None:
        session = Session(tmp_path / "few.onnx", ["x"], ["out"], ONE_THREAD)
        for _ in range(5):
            session.run(SQUARE)
            session.unload()

    def most_at_once() -> int:
        nonlocal most
        most = 0
        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return most

    for name in ("_load", "_run"):
        monkeypatch.setattr(Session, name, watched(getattr(Session, name)))
    assert most_at_once() > 1
    monkeypatch.setattr(sessions, "_ONE_AT_A_TIME", frozenset(ONE_THREAD.providers))
    assert most_at_once() == 1


def test_with_them_unloading_and_trying_them_out_wait_for_the_run_in_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are tried out also while their models serve, when others are to take the place of these."""
    chain(tmp_path / "few.onnx", 2)
    monkeypatch.setattr(sessions, "_ONE_AT_A_TIME", frozenset(ONE_THREAD.providers))
    session = Session(tmp_path / "few.onnx", ["x"], ["out"], ONE_THREAD)
    ended: set[str] = set()
    work = {"unload": session.unload, "probe": lambda: providers.probe(providers.CPU)}
    threads = [threading.Thread(target=lambda name=name: (work[name](), ended.add(name))) for name in work]
    with sessions.turn(ONE_THREAD.providers):
        for thread in threads:
            thread.start()
            thread.join(0.2)
        assert not ended
    for thread in threads:
        thread.join()
    assert ended == work.keys()
