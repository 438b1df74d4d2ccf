"""A reader that takes a second, as that of a large text encoder does, and callers who do not wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.bundle import Bundle, write_manifest
from edge_agent.diffusion.sessions import Stop
from edge_agent.errors import Cancelled
from edge_agent.manifest import TEXT_ENCODER
from edge_agent.policy import Reason
from edge_agent.reader import Reader
from edge_agent.tokens import Tokenizer
from tests.running import daemon_here, until

SIDE, PRODUCTS = 512, 250  # a second, or a good part of it, on one core


@pytest.fixture
def slow_bundle(bundle_copy: Path) -> Path:
    """Its text encoder adds the products of many matrices, all of them zero, to the states."""
    path = bundle_copy / TEXT_ENCODER
    model = onnx.load(path)
    graph = model.graph
    states = next(
        output for output in graph.output if output.name == Bundle.open(bundle_copy).manifest.text_output
    )
    for node in graph.node:
        node.output[:] = ["states" if name == states.name else name for name in node.output]
    names = [f"product{number}" for number in range(PRODUCTS)]
    graph.initializer.append(numpy_helper.from_array(np.zeros((SIDE, SIDE), np.float32), "zeros"))
    graph.node.extend(
        [
            helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["numbers"], ["largest"], keepdims=0),
            helper.make_node("Mul", ["zeros", "largest"], [names[0]]),
            *(helper.make_node("MatMul", [one, one], [other]) for one, other in pairwise(names)),
            helper.make_node("ReduceMax", [names[-1]], ["nothing"], keepdims=0),
            helper.make_node("Add", ["states", "nothing"], [states.name]),
        ]
    )
    onnx.save(model, path)
    write_manifest(bundle_copy)
    return bundle_copy


@pytest.mark.parametrize(
    ("rpc", "work"), [("route", "read"), ("generate", "read"), ("generate", "encode_negative")]
)
async def test_reading_ends_when_its_caller_goes_away(
    slow_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rpc: str, work: str
) -> None:
    async with daemon_here(slow_bundle, tmp_path / "state") as here:
        agent = here.daemon.agent
        assert agent is not None
        part: Any = agent.reader if work == "read" else agent.models.generator
        whole: Callable[..., Any] = getattr(part, work)
        begun, ended = threading.Event(), []

        def seen(*arguments: Any, **options: Any) -> Any:
            begun.set()
            try:
                found = whole(*arguments, **options)
            except BaseException as error:
                ended.append(type(error))
                raise
            ended.append(None)
            return found

        monkeypatch.setattr(part, work, seen)
        app, guided = here.app, {"guidance_scale": 3.0}
        call = asyncio.create_task(app.route("a cat") if rpc == "route" else app.generate("a cat", **guided))
        assert await asyncio.to_thread(begun.wait, 60)
        call.cancel()
        await until(lambda: ended)
        assert ended == [Cancelled]
        monkeypatch.setattr(part, work, whole)
        assert (await app.generate("a cat", **guided)).code == "OK"


def test_each_stage_of_reading_has_its_own_time(
    miniature_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader.open(Bundle.open(miniature_bundle), 0.5)
    clock = iter([10.0, 11.0, 13.0, 17.0])
    monkeypatch.setattr("edge_agent.reader.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    reading = reader.read("a cat")
    assert reading.timings_ms == {"tokenize": 1e3, "encode": 2e3, "predict": 4e3}
    decision = reading.decision("edge", Reason.LOCAL_ONLY, None, stages_ms={"decide": 8e3})
    assert decision.timings_ms == {**reading.timings_ms, "decide": 8e3, "total": 15e3}


def test_a_stop_that_is_set_reads_nothing(miniature_bundle: Path) -> None:
    bundle, stop = Bundle.open(miniature_bundle), Stop()
    reader = Reader.open(bundle, 0.5)
    stop.set()
    with pytest.raises(Cancelled):
        reader.read("a cat", stop)
    tokens = Tokenizer.open(bundle).encode("a cat")
    with pytest.raises(Cancelled):
        reader.prs_without(tokens, tokens.own[0], stop)
    assert reader.read("a cat").states.tokens.any()
