"""Graphs whose weights lie in a file of their own."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto


def move_weights(graph: Path, weights: Path, location: str) -> None:
    """Puts the largest tensor of the graph into the file `weights`; the graph says that it lies at `location`."""
    model = onnx.load(graph)
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights.write_bytes(tensor.raw_data)
    name_weights(tensor, location)
    graph.write_bytes(model.SerializeToString())


def name_weights(tensor: TensorProto, location: str) -> None:
    """Has the tensor say that its weights are what lies at `location`."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
