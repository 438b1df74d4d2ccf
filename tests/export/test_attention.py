"""Each attention of a denoiser as one operator: the same numbers, over the same weights."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import NodeProto, helper, numpy_helper

from edge_agent.manifest import DENOISER, FUSED, TEXT_ENCODER
from export import attention, graph_file
from export.attention import OPERATOR, fuse

ATTENTIONS = 8  # of the miniature: two in each of four blocks


@pytest.fixture
def traced(miniature_bundle: Path, tmp_path: Path) -> Path:
    """The miniature's denoiser as it was traced, without its twin."""
    folder = Path(shutil.copytree(miniature_bundle / "unet", tmp_path / "unet"))
    (folder / FUSED).unlink()
    return folder / Path(DENOISER).name


def operators(graph: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(graph, load_external_data=False).graph.node)


def output(graph: Path, batch: int) -> np.ndarray:
    """Of the graph, on noise."""
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    noise = np.random.default_rng(batch)
    inputs = {
        "sample": noise.standard_normal((batch, 4, 8, 8), np.float32),
        "timestep": np.asarray(500, np.float32),
        "encoder_hidden_states": noise.standard_normal((batch, 77, 32), np.float32),
    }
    (found,) = session.run(None, inputs)
    return np.asarray(found)


def test_what_is_one_operator_computes_the_same(traced: Path) -> None:
    assert fuse(traced) == ATTENTIONS == operators(traced)["Softmax"]
    fused = traced.with_name(FUSED)
    assert (operators(fused)[OPERATOR], operators(fused)["Softmax"]) == (ATTENTIONS, 0)
    for batch in (1, 2):
        np.testing.assert_allclose(output(fused, batch), output(traced, batch), atol=1e-5)


def test_the_weights_are_there_once(traced: Path) -> None:
    """Also those of a graph that had them in itself."""
    whole = onnx.load(traced)
    graph_file.save(whole, traced)
    assert not graph_file.weights_files(traced)
    before, told = traced.stat().st_size, output(traced, 1)
    fuse(traced)
    fused = traced.with_name(FUSED)
    assert (
        graph_file.weights_files(traced)
        == graph_file.weights_files(fused)
        == {traced.with_name("model.onnx_data")}
    )
    assert graph_file.size(traced) + fused.stat().st_size < 1.5 * before
    np.testing.assert_array_equal(output(traced, 1), told)


def test_attention_under_a_mask_stays_as_it_was_traced(miniature_bundle: Path, tmp_path: Path) -> None:
    graph = Path(shutil.copy(miniature_bundle / TEXT_ENCODER, tmp_path))
    content = graph.read_bytes()
    assert operators(graph)["Softmax"] > 0 == fuse(graph)
    assert list(tmp_path.iterdir()) == [graph]
    assert graph.read_bytes() == content


def another_scale(softmax: NodeProto, makers: dict[str, NodeProto]) -> None:
    for name in makers[softmax.input[0]].input:
        makers[name].input[1] = "other"


def another_scale_of_the_keys(softmax: NodeProto, makers: dict[str, NodeProto]) -> None:
    makers[makers[softmax.input[0]].input[1]].input[1] = "other"


def another_dimension(softmax: NodeProto, makers: dict[str, NodeProto]) -> None:
    """How many positions there are, in the place of the size of a head."""
    name = makers[makers[softmax.input[0]].input[0]].input[1]
    while makers[name].op_type != "Slice":
        name = makers[name].input[makers[name].op_type == "Div"]
    makers[name].input[1:3] = ["last_but_one", "last"]


def another_numerator(softmax: NodeProto, makers: dict[str, NodeProto]) -> None:
    name = makers[makers[softmax.input[0]].input[0]].input[1]
    while makers[name].op_type != "Div":
        name = makers[name].input[0]
    makers[name].input[0] = "other"


def another_axis(softmax: NodeProto, _makers: dict[str, NodeProto]) -> None:
    softmax.attribute[0].i = 2


def another_order(softmax: NodeProto, makers: dict[str, NodeProto]) -> None:
    """Turned about, as what is multiplied may be where there are as many positions as a head has numbers."""
    for node in makers.values():
        if node.op_type == "MatMul" and node.input[0] == softmax.output[0]:
            weights, values = node.input
            node.input[:] = [values, weights]


@pytest.mark.parametrize(
    "change",
    [
        another_scale,
        another_scale_of_the_keys,
        another_dimension,
        another_numerator,
        another_axis,
        another_order,
    ],
)
def test_what_multi_head_attention_would_not_compute_stays_as_it_was_traced(
    traced: Path, change: Callable[[NodeProto, dict[str, NodeProto]], None]
) -> None:
    model = onnx.load(traced)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    change(softmax, {name: node for node in model.graph.node for name in node.output})
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.3), "other"))
    for place, name in ((-2, "last_but_one"), (-1, "last")):
        model.graph.initializer.append(numpy_helper.from_array(np.array([place]), name))
    graph_file.save(model, traced)
    assert fuse(traced) == ATTENTIONS - 1
    fused = traced.with_name(FUSED)
    assert operators(fused)["Softmax"] == 1
    if change is not another_order:  # which is no product here
        np.testing.assert_allclose(output(fused, 1), output(traced, 1), atol=1e-5)


def test_heads_that_nobody_tells_leave_attention_as_it_was_traced(
    traced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", lambda *_, **__: onnx.ModelProto())
    assert fuse(traced) == 0 and not traced.with_name(FUSED).exists()


def test_heads_that_keys_share_are_not_those_of_the_queries() -> None:
    def of(heads: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(dim_value=size) for size in (1, heads, 64, 8)]

    shapes = {"queries": of(4), "turned_keys": of(4), "values": of(4)}
    one = attention._Attention(*shapes, result="result")
    assert attention._heads(one, shapes) == 4
    assert attention._heads(one, shapes | {"turned_keys": of(1), "values": of(1)}) == 0


def test_a_graph_within_the_graph_may_read_anything(traced: Path) -> None:
    model = onnx.load(traced)
    branch = helper.make_graph([helper.make_node("Identity", ["sample"], ["same"])], "branch", [], [])
    branch.output.append(helper.make_tensor_value_info("same", onnx.TensorProto.FLOAT, None))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "always"))
    model.graph.node.append(
        helper.make_node("If", ["always"], ["chosen"], then_branch=branch, else_branch=branch)
    )
    graph_file.save(model, traced)
    assert fuse(traced) == 0 and not traced.with_name(FUSED).exists()


def test_a_graph_whose_nodes_are_out_of_order_keeps_all_that_it_needs(traced: Path) -> None:
    """As onnxruntime's own tools leave them behind: what they put in at the inputs stands last."""
    model = onnx.load(traced)
    (first, *_) = (node for node in model.graph.node if "sample" in node.input)
    first.input[list(first.input).index("sample")] = "same"
    model.graph.node.append(helper.make_node("Identity", ["sample"], ["same"]))
    graph_file.save(model, traced)
    assert fuse(traced) == ATTENTIONS
    np.testing.assert_allclose(output(traced.with_name(FUSED), 1), output(traced, 1), atol=1e-5)
