"""Attention as one operator: a denoiser's graph once more, in the form that a CPU runs best.

Traced, attention is a product of queries and keys, a softmax and a product with the values, so that the scores between
all positions lie in memory at once: at Stable Diffusion 1.5's size half a gigabyte, twice. onnxruntime's operator
MultiHeadAttention works through them piece by piece on a CPU. Other providers may lack it, or were not seen to compute
the same with it (`edge_agent.diffusion.denoiser.graph_on`), so that a bundle holds both graphs, over the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from edge_agent.manifest import FUSED
from export import graph_file

OPERATOR, DOMAIN = "MultiHeadAttention", "com.microsoft"


class _Attention(NamedTuple):
    """One that was traced: tensors of [batch, heads, positions, size of a head], by their names."""

    queries: str
    turned_keys: str  # [batch, heads, size of a head, positions]
    values: str
    result: str


def fuse(graph: Path) -> int:
    """Write FUSED beside `graph`, which has each attention as one operator; returns how many there are.

    The weights move into a file that both graphs read. Without an attention to fuse there is no FUSED.
    """
    if not any(_attentions(onnx.load(graph, load_external_data=False))):
        return 0
    if not graph_file.weights_files(graph):
        graph_file.save(onnx.load(graph), graph, apart=True)
    model = onnx.load(graph, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred.graph.value_info}
    found = {
        each.result: _operators(each, heads) for each in _attentions(model) if (heads := _heads(each, shapes))
    }
    if not found:
        return 0
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes += found.get(node.output[0], [node])
    needed = _needed(nodes, [output.name for output in model.graph.output])
    del model.graph.node[:]
    model.graph.node.extend(needed)
    if DOMAIN not in (opset.domain for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.save(model, graph.with_name(FUSED))
    return len(found)


def _attentions(model: onnx.ModelProto) -> Iterator[_Attention]:
    """As torch traces `scaled_dot_product_attention` without a mask: queries and keys are each multiplied by the root
    of the scale, which is one over the root of a head's size, as it is for MultiHeadAttention.
    """
    if any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute):
        return  # a graph within the graph, which may read anything
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for softmax in model.graph.node:
        if softmax.op_type != "Softmax" or not all(one.i in (-1, 3) for one in softmax.attribute):
            continue
        products = [makers.get(softmax.input[0]), *readers.get(softmax.output[0], [])]
        if [node and node.op_type for node in products] != ["MatMul", "MatMul"]:
            continue
        scores, result = products
        scaled = [makers.get(name) for name in scores.input]
        if result.input[0] != softmax.output[0] or not all(node and node.op_type == "Mul" for node in scaled):
            continue
        (queries, scale), (turned_keys, other_scale) = (node.input for node in scaled)
        if all(_is_scale(one, queries, makers) for one in (scale, other_scale)):
            yield _Attention(queries, turned_keys, result.input[1], result.output[0])


def _is_scale(name: str, queries: str, makers: Mapping[str, NodeProto]) -> bool:
    """Whether that is √(1 ÷ √size), of the queries' last dimension."""
    for operator, operand in (("Sqrt", 0), ("Div", 1), ("Sqrt", 0), ("Slice", 0), ("Shape", 0)):
        while name in makers and makers[name].op_type == "Cast":
            name = makers[name].input[0]
        node = makers.get(name)
        if node is None or node.op_type != operator:
            return False
        if operator == "Div" and _constant(node.input[0], makers) != 1:
            return False
        if operator == "Slice" and _constant(node.input[1], makers) != -1:
            return False
        name = node.input[operand]
    return name == queries


def _constant(name: str, makers: Mapping[str, NodeProto]) -> float | None:
    """The number that the graph has under that name, if it is one."""
    if name not in makers or makers[name].op_type != "Constant":
        return None
    value = numpy_helper.to_array(makers[name].attribute[0].t)
    return float(value.item()) if value.size == 1 else None


def _heads(attention: _Attention, shapes: Mapping[str, Sequence[Any]]) -> int:
    """How many heads queries, keys and values have; 0 where that is not known, or not the same."""
    sides = (attention.queries, attention.turned_keys, attention.values)
    found = {shapes[name][1].dim_value if len(shapes.get(name, ())) == 4 else 0 for name in sides}
    return found.pop() if len(found) == 1 else 0


def _operators(attention: _Attention, heads: int) -> list[NodeProto]:
    """The attention as one operator, which has the heads of a position side by side. That is how queries, keys and
    values were made, so that onnxruntime takes the transpositions out again.
    """
    name = attention.result

    def constant(kind: str, *shape: int) -> NodeProto:
        value = numpy_helper.from_array(np.array(shape, np.int64))
        return helper.make_node("Constant", [], [f"{name}_{kind}_shape"], value=value)

    nodes = [constant("joined", 0, 0, -1), constant("parted", 0, 0, heads, -1)]
    sides = {
        "queries": (attention.queries, [0, 2, 1, 3]),
        "keys": (attention.turned_keys, [0, 3, 1, 2]),
        "values": (attention.values, [0, 2, 1, 3]),
    }
    for side, (given, order) in sides.items():
        nodes += [
            helper.make_node("Transpose", [given], [f"{name}_{side}_parted"], perm=order),
            helper.make_node(
                "Reshape", [f"{name}_{side}_parted", f"{name}_joined_shape"], [f"{name}_{side}"]
            ),
        ]
    return [
        *nodes,
        helper.make_node(
            OPERATOR, [f"{name}_{side}" for side in sides], [f"{name}_joined"], domain=DOMAIN, num_heads=heads
        ),
        helper.make_node("Reshape", [f"{name}_joined", f"{name}_parted_shape"], [f"{name}_parted"]),
        helper.make_node("Transpose", [f"{name}_parted"], [name], perm=[0, 2, 1, 3]),
    ]


def _needed(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
    """Of `nodes` those that lead to `outputs`, in their order, which need not be that in which they run."""
    makers = {name: node for node in nodes for name in node.output}
    wanted, read = list(outputs), set(outputs)
    while wanted:
        if (node := makers.get(wanted.pop())) is not None:
            wanted += set(node.input) - read
            read.update(node.input)
    return [node for node in nodes if not read.isdisjoint(node.output)]
