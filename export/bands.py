"""A decoder's largest convolutions in bands of channels, so that a stop need not wait for all of one.

onnxruntime looks for a stop between two nodes of a graph. A band is a convolution over the same input with some of the
filters, and one Concat joins what they make: no number changes, whatever the height and width are at last, and there
are as many weights as before. Bands of rows would need a copy of each band's input, with a row above and below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export import graph_file

LIMIT = 40e9
"""Floating point operations of one convolution, two for each product. It is for the CPU, where two cores did 200e9 to
500e9 a second, so that a stop waits 200 ms at most; a GPU has no use for bands. They cost a copy of what the bands
make, and onnxruntime no longer adds a sum within the convolution before it. At Stable Diffusion 1.5's size, where 21 of
36 are above, a decode took as long as before, in 9 % less memory."""

GRAIN = 32
"""Channels of a band: a multiple of this, and no fewer. onnxruntime's convolution on a CPU computes 16 or 8 at once,
and several such blocks for each number that it reads."""


def split(graph: Path, height: int, width: int) -> int:
    """Put bands in the place of each convolution of the decoder `graph` that takes more than LIMIT for latents of that
    size; returns how many those were. Without any the file is not touched.

    Quantized ones, those in groups, and those whose weights or sizes are not known here, stay.
    """
    model = onnx.load(graph, load_external_data=False)
    places = _places(model, height, width)
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    parted = {
        node.output[0]: channels
        for node in model.graph.node
        if node.op_type == "Conv" and (channels := _channels(node, sizes, places.get(node.output[0], 0)))
    }
    if not parted:
        return 0
    model = onnx.load(graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if channels := parted.get(node.output[0]):
            banded, filters = _bands(node, weights, channels)
            nodes += banded
            model.graph.initializer.extend(filters)
        else:
            nodes.append(node)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    for field, values in ((model.graph.node, nodes), (model.graph.initializer, kept)):
        del field[:]
        field.extend(values)
    graph_file.save(model, graph)
    return len(parted)


def _places(model: onnx.ModelProto, height: int, width: int) -> dict[str, int]:
    """How many places, height times width, each tensor of four dimensions has, for latents of that size."""
    axes = model.graph.input[0].type.tensor_type.shape.dim
    for axis, size in ((0, 1), (2, height), (3, width)):
        axes[axis].dim_value = size
    del model.graph.value_info[:]  # which name the sizes that are open
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*inferred.value_info, *inferred.output)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in values}
    return {
        name: shape[2].dim_value * shape[3].dim_value for name, shape in shapes.items() if len(shape) == 4
    }


def _channels(node: NodeProto, sizes: Mapping[str, Sequence[int]], places: int) -> int:
    """Channels of each band of a convolution; 0 where it stays as it is."""
    filters, *bias = node.input[1:]
    if not all(name in sizes for name in (filters, *filter(None, bias))):
        return 0
    if any(attribute.name == "group" and attribute.i != 1 for attribute in node.attribute):
        return 0
    made, *rest = sizes[filters]
    fitting = int(LIMIT / max(2 * places * prod(rest), 1))
    channels = max(GRAIN, fitting // GRAIN * GRAIN)
    return channels if max(fitting, channels) < made else 0


def _bands(
    node: NodeProto, weights: Mapping[str, TensorProto], channels: int
) -> tuple[list[NodeProto], list[TensorProto]]:
    """In the place of a convolution: one for each so many `channels`, and what joins them; with their weights."""
    given, *own = node.input
    arrays: list[np.ndarray] = [numpy_helper.to_array(weights[name]) for name in own if name]
    nodes, tensors = [], []
    made = [f"{node.output[0]}_band_{number}" for number in range(ceil(len(arrays[0]) / channels))]
    for number, name in enumerate(made):
        filters = [array[number * channels : (number + 1) * channels] for array in arrays]
        band = [numpy_helper.from_array(values, f"{name}_{kind}") for kind, values in enumerate(filters)]
        nodes.append(NodeProto())
        nodes[-1].CopyFrom(node)
        nodes[-1].name = f"{node.name}_band_{number}"
        nodes[-1].input[:] = [given, *(tensor.name for tensor in band)]
        nodes[-1].output[:] = [name]
        tensors += band
    nodes.append(helper.make_node("Concat", made, node.output, name=f"{node.name}_bands", axis=1))
    return nodes, tensors
