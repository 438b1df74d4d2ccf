"""The file of an ONNX graph, and the one beside it with weights that it cannot hold, or that two graphs share."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

WEIGHTS = "model.onnx_data"  # as optimum names them
LARGEST_GRAPH = 1 << 30  # bytes in one file; protobuf itself ends at 2 GiB


def save(model: onnx.ModelProto, graph: Path, *, apart: bool = False) -> None:
    """Over `graph`. Weights that one file cannot hold, or all of them if `apart`, go into WEIGHTS beside it."""
    for stale in weights_files(graph):
        stale.unlink()
    partial = graph.with_suffix(".partial")
    onnx.save_model(model, partial, save_as_external_data=apart or _large(model), location=WEIGHTS)
    os.replace(partial, graph)


def weights_files(graph: Path) -> set[Path]:
    """The files beside `graph` that have its weights."""
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    apart = filter(uses_external_data, tensors)
    return {graph.parent / ExternalDataInfo(tensor).location for tensor in apart}


def size(graph: Path) -> int:
    """Bytes of the graph and its weights."""
    return sum(path.stat().st_size for path in (graph, *weights_files(graph)))


def _large(model: onnx.ModelProto) -> bool:
    """Whether its weights belong in a file of their own. Counted one by one: protobuf sizes no model above 2 GiB."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST_GRAPH
