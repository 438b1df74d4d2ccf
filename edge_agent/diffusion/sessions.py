"""onnxruntime sessions: how they are opened, run, and stopped from another thread."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_agent import memory
from edge_agent.diffusion import plugins
from edge_agent.errors import BundleError, Cancelled, GenerationFailed, NotLoaded, OutOfMemory, printable
from edge_agent.graph_files import FileState, GraphFiles, file_states
from edge_agent.manifest import Facts, Size

Array = NDArray[Any]

# From here on a graph runs without onnxruntime's memory pattern, which lays out the second run anew in one block and
# holds the first run's beside it: 2.3 GB more at Stable Diffusion 1.5's size, for no time. A small graph keeps it: its
# runs are so short that 2 % of them is allocation.
LARGE_BYTES = 100_000_000  # of the graph and the weights beside it

RELOAD_RETRY_S = 1.0

_ONE_AT_A_TIME = frozenset({"DmlExecutionProvider", "WebGpuExecutionProvider"})
"""Providers on which what runs or opens at once disturbs each other. DirectML takes one run of a session at a time, its
documentation says, and several sessions have stalled each other (microsoft/onnxruntime#20713). WebGPU's sessions share
what they record commands with, so that two fail, or crash the process (microsoft/onnxruntime#32561)."""

_TURN = threading.Lock()

# As C++, onnxruntime's arena, CUDA and its libraries, and Windows put it; in lower case.
_NO_MEMORY = (
    *("bad_alloc", "failed to allocate memory", "out of memory", "out_of_memory", "not enough memory"),
    *("alloc_failed", "allocation_failed"),
)

# Element types a graph may ask for, and how numpy spells them.
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}

_OTHER_FLOATS = ("tensor(float16)", "tensor(double)")

_NO_ARENA = "arena based allocator"
"""What onnxruntime says, before it runs anything, of memory that is not its arena's and cannot be given back so.
DirectML brings such an allocator for the CPU as well."""


@dataclass(frozen=True)
class Runtime:
    """What onnxruntime runs on."""

    threads: int | None = None  # intra-op threads; None = one a physical core
    # Whether they spin while they wait, which takes the core from whoever else has work: the event loop, a decision.
    spinning: bool = False
    providers: tuple[str, ...] = (plugins.CPU_PROVIDER,)  # onnxruntime's names, best first
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by onnxruntime's name
    # Of those that graphs leave open, by their names there.
    sizes: Mapping[str, int] = field(default_factory=dict)
    unfused: tuple[str, ...] = ()  # onnxruntime's graph optimizers that are left out, by its names for them
    profile: str = ""  # how the file begins in which onnxruntime notes what ran where; empty: it does not

    @property
    def on_cpu(self) -> bool:
        """Whether nothing but the CPU runs the graphs."""
        return self.providers == (plugins.CPU_PROVIDER,)

    def sizes_of(self, facts: Facts) -> tuple[Size, ...]:
        """The images that graphs must be able to make here: all of the bundle's, or its default alone where `sizes` are
        given. The default is the last, so that it is what `Session.expect` then knows of sizes that are left open.
        """
        return facts.sizes[:1] if self.sizes else facts.sizes[::-1]


class Stop(threading.Event):
    """An event whose `set` also ends the onnxruntime run in progress, between two nodes of its graph.

    One `Stop` belongs to one image, or to one reading of a prompt; once set it stays set.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._endings: list[Callable[[], None]] = []

    def set(self) -> None:
        """Stop, from any thread."""
        with self._lock:
            super().set()
            for end in self._endings:
                end()

    def check(self) -> None:
        """Raises Cancelled once the event is set."""
        if self.is_set():
            raise Cancelled("the image was cancelled")

    def enter(self, end: Callable[[], None]) -> None:
        """Have `set` call `end`, which ends work that is about to start. Raises Cancelled when it must not start."""
        with self._lock:
            self.check()
            self._endings.append(end)

    def leave(self, end: Callable[[], None]) -> None:
        """The work has ended."""
        with self._lock:
            self._endings.remove(end)


def turn(providers: Iterable[str]) -> AbstractContextManager[object]:
    """To be held, and not twice by one thread, while a session on `providers` is opened, run or let go: some bear one
    at a time in the whole process. By onnxruntime's names.
    """
    return _TURN if takes_turns(providers) else nullcontext()


def takes_turns(providers: Iterable[str]) -> bool:
    """Whether sessions on `providers` bear one at a time in the whole process. By onnxruntime's names."""
    return not _ONE_AT_A_TIME.isdisjoint(providers)


class Session:
    """One graph of a bundle. Inputs are cast to the graph's types; float outputs come back as float32.

    It is loaded when it is made, and again by the first run after `unload`. `loaded_at` says when, in seconds since
    1970; None while it is not. `large` says whether graph and weights have LARGE_BYTES or more, `takes_turns` whether a
    run may have to wait for one of another session.
    """

    def __init__(
        self,
        path: Path,
        inputs: Sequence[str],
        outputs: Sequence[str],
        runtime: Runtime,
        files: Mapping[Path, FileState] | None = None,
    ) -> None:
        """Open the graph at `path`, which must take exactly `inputs` and give at least `outputs`. `files` are the graph
        and its weights, as they were when they were checked (`Bundle.files_of`); left out, the graph as it is now.

        Raises:
            BundleError: naming the file, when onnxruntime cannot load it, when it has changed since it was checked,
                when its signature differs, or when onnxruntime left a provider out, which it does in silence.
        """
        self.path = path
        self.loaded_at: float | None = None
        self._known_good = False  # whether it has been loaded once
        self._runtime = runtime
        self.takes_turns = takes_turns(runtime.providers)
        self._turn = turn(runtime.providers)
        self._loading = threading.Lock()  # taken after the turn
        self._files = GraphFiles(path, file_states([path]) if files is None else files)
        self.large = self._files.bytes >= LARGE_BYTES
        with self._turn:
            session = self._session = self._load(Stop())
        found = {node.name: node for node in session.get_inputs()}
        given = {node.name: node for node in session.get_outputs()}
        if set(found) != set(inputs) or not set(outputs) <= set(given):
            raise BundleError(
                f"{path} takes {sorted(found)} and gives {sorted(given)}; "
                f"expected to take {sorted(inputs)} and give {sorted(outputs)}"
            )
        if unknown := {node.type for node in found.values()} - set(_DTYPES):
            raise BundleError(
                f"{path} asks for inputs of the types {sorted(unknown)}, which are not supported"
            )
        # Also what is no tensor at all: a sequence of some, or an optional one.
        if unknown := {given[name].type for name in outputs} - {"tensor(float)", *_OTHER_FLOATS}:
            raise BundleError(f"{path} gives outputs of the types {sorted(unknown)}, which are not supported")
        self._dtypes = {name: _DTYPES[node.type] for name, node in found.items()}
        # Of every input and output; a size that may vary is None or has a name.
        self.shapes = {n.name: tuple(n.shape) for n in (*session.get_inputs(), *session.get_outputs())}
        self.sizes: dict[str, int] = {}  # what `expect` has told of the names in them
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)  # by name
        self._casting = any(given[name].type in _OTHER_FLOATS for name in outputs)
        self._arenas = _arenas(session.get_providers())

    @property
    def fault(self) -> str:
        """Why it cannot be loaded again, where that was tried; empty once its files are as they were, or are new ones,
        whose bytes the next load looks at.
        """
        return self._files.fault

    def unload(self) -> None:
        """Give its memory back, after the runs in progress."""
        with self._turn, self._loading:
            self._session = self.loaded_at = None

    def _loaded(self, stop: Stop | None) -> ort.InferenceSession:
        """The session, loaded if it is not. Raises what `_load` does."""
        session = self._session
        if session is None:
            with self._loading:
                session = self._session
                if session is None:
                    session = self._session = self._load(stop or Stop())
        return session

    def _load(self, stop: Stop) -> ort.InferenceSession:
        """A new session. Raises Cancelled, Busy (OutOfMemory among it), and BundleError also where its files are not
        what was checked.
        """
        self._files.check()
        self._find_room()
        runtime = self._runtime
        options = ort.SessionOptions()
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = runtime.threads or 0  # 0: onnxruntime counts physical cores
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if runtime.spinning else "0")
        options.enable_mem_pattern = not self.large
        # Errors are raised, too; the rest is about graphs nobody here can change.
        options.log_severity_level = 4
        if runtime.profile:
            options.enable_profiling, options.profile_file_prefix = True, runtime.profile
        for name, size in runtime.sizes.items():
            options.add_free_dimension_override_by_name(name, size)
        providers = [(name, dict(runtime.provider_options.get(name, {}))) for name in runtime.providers]
        # Where onnxruntime has no such flag, a load runs to its end: some seconds for the largest graphs.
        cancel = getattr(options, "set_load_cancellation_flag", lambda _: None)
        end = partial(cancel, True)
        stop.enter(end)
        try:
            session = plugins.session(str(self.path), options, providers, disabled_optimizers=runtime.unfused)
        except Exception as error:  # onnxruntime's own exceptions share no base class
            stop.check()
            if lacks_memory(error):
                raise _out_of_memory(error, f"{self.path} cannot be loaded") from error
            if self._known_good:  # and unchanged: the device lacks something, not the bundle
                what = "memory or file descriptors" if runtime.on_cpu else "memory, also of the device"
                raise NotLoaded(
                    f"{self.path} could be loaded before and cannot now: {_said(error)}; free {what}",
                    retry_after_s=RELOAD_RETRY_S,
                ) from error
            raise BundleError(f"{self.path} cannot be loaded by onnxruntime: {_said(error)}") from error
        finally:
            stop.leave(end)
        if left_out := [name for name in runtime.providers if name not in session.get_providers()]:
            raise BundleError(f"{self.path}: onnxruntime does not run it on {', '.join(left_out)}")
        self.loaded_at, self._known_good = time.time(), True
        return session

    def _find_room(self) -> None:
        """Raises OutOfMemory where a large graph certainly does not fit. Nothing else would: Linux promises memory that
        it does not have, and later ends a process, most likely this one.
        """
        if not self.large:
            return
        free = memory.available_bytes()
        # onnxruntime keeps a graph's own file twice while it loads it, and weights beside it once.
        needed = self._files.bytes + self._files.states[self.path].bytes
        if free is not None and needed > free:
            raise OutOfMemory(
                f"{self.path} takes {needed / 1e6:,.0f} MB of memory to load, and {free / 1e6:,.0f} MB can be had; "
                "free some, raise the limit of the unit or container if it has one, or choose a smaller model",
                retry_after_s=RELOAD_RETRY_S,
            )

    def expect(self, sizes: Mapping[str, tuple[int | None, ...]]) -> None:
        """Check inputs and outputs, by name, against the sizes they must have; None where any will do.

        What the graph leaves open of its inputs is then known, and in `sizes`: one image where any number will do.

        Raises BundleError, naming the file, when the graph is made for others.
        """
        for name, expected in sizes.items():
            found = self.shapes[name]
            pairs = list(zip(found, expected, strict=False))
            if len(found) != len(expected) or any(
                isinstance(size, int) and wanted is not None and size != wanted for size, wanted in pairs
            ):
                raise BundleError(
                    f"{self.path}: {name} has the shape {found}, the manifest asks for {expected}"
                )
            if name in self._dtypes:
                self.sizes |= {size: wanted or 1 for size, wanted in pairs if isinstance(size, str)}

    def run(
        self, inputs: Mapping[str, Array], *, stop: Stop | None = None, shrink: bool = False
    ) -> list[Array]:
        """The outputs, in the order of the constructor's `outputs`.

        Args:
            stop: ends the run early when set from another thread.
            shrink: give the memory that this session's arena holds back to the system after the run. It
                costs allocations in the next run, so ask for it only in the last run for an image.

        Raises:
            Cancelled: `stop` was set before or during the run.
            GenerationFailed: onnxruntime failed.
            OutOfMemory: this device has too little memory for the run, or to load the graph again.
            BundleError: the graph had been unloaded and its files have changed since.
            Busy: it had been unloaded, and this device has no room to load it again.
        """
        feeds = {name: np.asarray(value, self._dtypes[name]) for name, value in inputs.items()}
        with self._turn:
            outputs = self._run(feeds, stop, shrink=shrink)
        if not self._casting:
            return list(outputs)
        return [value.astype(np.float32, copy=False) for value in outputs]

    def ran_on(self) -> frozenset[str]:
        """The providers that ran nodes of the graph since it was loaded, by onnxruntime's names. It must be loaded, on
        a runtime with a `profile`, which ends here. A provider that takes no node stays among the session's all the
        same, without a word.
        """
        assert self._session is not None  # noqa: S101  # as asked
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        return frozenset(event["args"]["provider"] for event in events if "provider" in event["args"])

    def _run(self, feeds: Mapping[str, Array], stop: Stop | None, *, shrink: bool) -> Sequence[Array]:
        session = self._loaded(stop)
        try:
            if stop is None and not shrink:  # as a decision's runs are
                outputs: Sequence[Array] = session.run(self.outputs, feeds)
                return outputs
            return self._run_with_options(session, feeds, stop or Stop(), shrink=shrink)
        except Cancelled:
            raise
        except Exception as error:  # onnxruntime's own exceptions share no base class
            if stop is not None:
                stop.check()
            if shrink and self._arenas and _NO_ARENA in str(error):
                self._arenas = ""
                del session  # which this frame would hold should that run be out of memory
                return self._run(feeds, stop, shrink=False)
            if lacks_memory(error):
                # It goes with what its arena has grown to, or the next run would find as little: at once, so that
                # neither this frame nor those that the error knows hold on to it.
                if self._session is session:
                    self._session = self.loaded_at = None
                del session
                traceback.clear_frames(error.__traceback__)
                raise _out_of_memory(error, f"{self.path} cannot be run") from error
            raise GenerationFailed(f"onnxruntime failed in {self.path}: {_said(error)}") from error

    def _run_with_options(
        self, session: ort.InferenceSession, feeds: Mapping[str, Array], stop: Stop, *, shrink: bool
    ) -> Sequence[Array]:
        options = ort.RunOptions()
        if shrink and self._arenas:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", self._arenas)
        end = partial(setattr, options, "terminate", True)
        stop.enter(end)
        try:
            outputs: Sequence[Array] = session.run(self.outputs, feeds, options)
            return outputs
        finally:
            stop.leave(end)


def lacks_memory(failure: Exception | str) -> bool:
    """Whether an error of onnxruntime's, or what one said, comes of too little memory."""
    return isinstance(failure, MemoryError) or any(words in str(failure).lower() for words in _NO_MEMORY)


def _out_of_memory(error: Exception, what: str) -> OutOfMemory:
    return OutOfMemory(
        f"{what}: this device is out of memory; free some, or choose a smaller model ({_said(error)})",
        retry_after_s=RELOAD_RETRY_S,
    )


def _said(error: Exception) -> str:
    """What onnxruntime says, fit for a terminal: it quotes a graph's own names."""
    return printable(str(error))


def _arenas(providers: Sequence[str]) -> str:
    """Of a session, as onnxruntime's shrinkage option names them."""
    gpu = any(name.startswith(("CUDA", "Tensorrt")) for name in providers)
    return "cpu:0;gpu:0" if gpu else "cpu:0"
