"""Write a trained predictor into a bundle as an ONNX graph, checked against torch.

    edge-export predictor WEIGHTS BUNDLE

The graph takes `states [1, L, d]`, `mask [1, L]` and `ids [1, L]`, and gives `edge [1, M]`, `cloud [1, M]` and
`pull [1, L, M]`.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from edge_agent.bundle import Bundle, put_file
from edge_agent.manifest import CALIBRATION, PREDICTOR
from edge_agent.predictor import INPUTS, OUTPUTS, Predictor
from edge_agent.superiority import METRICS
from export.errors import ExportError
from export.folded import Folded
from export.mixture import Ensemble, Shape
from export.outcomes import CLOUD_DIGEST, EDGE_DIGEST, JUDGE_DIGEST
from export.terminal import console

TOLERANCE = 1e-5
"""Largest difference from torch in any output; float32 rounding over sums this short stays well below it."""


def export(ensemble: Ensemble, path: Path, tokens: int, learnt: Mapping[str, str] = {}) -> float:
    """Write `ensemble` for prompts of `tokens` positions (L) to `path`; returns the largest difference from torch.
    `learnt` are the digests of the cloud model and the judge that it learnt from, as far as they are known.

    ExportError when it is an ablation that does not predict every metric, or the graph differs from torch.
    """
    shape = ensemble.shape
    if shape.metrics != len(METRICS):
        raise ExportError(
            f"a predictor of {shape.metrics} metrics is an ablation; a bundle's has {len(METRICS)}"
        )
    ensemble = ensemble.eval()
    example = (
        torch.randn(1, tokens, shape.width),
        torch.ones(1, tokens, dtype=torch.bool),
        torch.zeros(1, tokens, dtype=torch.int64),
    )
    with warnings.catch_warnings():
        # Tracing warns of a newer exporter, which needs packages that nothing else here does. Whether the graph is
        # right is decided by the comparison below.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Folded(ensemble, tokens).eval(),
            example,
            path,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_axes={name: {1: "L"} for name in (*INPUTS, "pull")},
            opset_version=18,
            dynamo=False,
        )
    _state_facts(path, shape, learnt)
    difference = max(
        _difference(ensemble, Predictor.load(path, shape.width), tokens, own) for own in range(tokens)
    )
    if not difference <= TOLERANCE:
        raise ExportError(
            f"not written: the graph differs from torch by {difference:.2g}, more than {TOLERANCE:g}"
        )
    return difference


def _state_facts(path: Path, shape: Shape, learnt: Mapping[str, str]) -> None:
    """Write into the graph what tracing leaves out: the outputs' sizes, for which it leaves names that older
    onnxruntimes cannot resolve, the words' ids where nothing reads them, and whose quality it predicts.
    """
    model = onnx.load(path)
    if learnt:
        onnx.helper.set_model_props(model, dict(learnt))
    if "ids" not in {node.name for node in model.graph.input}:
        ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, (1, "L"))
        model.graph.input.append(ids)
    sizes = {"edge": (1, shape.metrics), "cloud": (1, shape.metrics), "pull": (1, "L", shape.metrics)}
    for output in model.graph.output:
        for dimension, size in zip(output.type.tensor_type.shape.dim, sizes[output.name], strict=True):
            if isinstance(size, int):
                dimension.dim_value = size
            else:
                dimension.dim_param = size
    onnx.save(model, path)


def _difference(ensemble: Ensemble, predictor: Predictor, tokens: int, own: int) -> float:
    """Between torch and the graph, for a made-up prompt with `own` tokens of its own."""
    draw = torch.Generator().manual_seed(own)
    scale = ensemble.members[0].inputs
    states = scale.mean + scale.deviation * torch.randn(1, tokens, ensemble.shape.width, generator=draw)
    mask = (torch.arange(tokens) > 0) & (torch.arange(tokens) <= own)
    ids = torch.randint(max(ensemble.shape.vocabulary, 1), (1, tokens), generator=draw)
    with torch.inference_mode():
        expected = ensemble(states, mask[None], ids)
    edge, cloud, pull = (part[0].numpy() for part in expected)
    made = predictor.predict(states.numpy(), range(1, own + 1), ids.numpy())
    return max(  # a prompt may have no token of its own
        float(np.abs(np.reshape(ours, theirs.shape) - theirs).max(initial=0.0))
        for ours, theirs in ((made.edge, edge), (made.cloud, cloud), (made.pull, pull[mask.numpy()]))
    )


def install(weights: Path, bundle: Bundle) -> float:
    """Put the trained predictor into `bundle` and renew its manifest; returns the largest difference from torch.

    A calibration that is there was made with another predictor's scores and is removed.
    """
    ensemble, record = Ensemble.load(weights)
    if record.get(EDGE_DIGEST) != bundle.model_digest:
        raise ExportError(
            f"{weights} was trained on another edge model's token states; train it on {bundle.folder}"
        )
    # Inside, as only that is sure to be on the bundle's disk and writable: it may be a link, or its folder another's.
    # Not by tempfile, which tries for ever where Windows lets nobody write.
    graph = bundle.folder / f".predictor-{os.getpid()}.onnx"
    try:
        learnt = {name: record[name] for name in (CLOUD_DIGEST, JUDGE_DIGEST) if record.get(name)}
        difference = export(ensemble, graph, bundle.manifest.text_tokens, learnt)
        put_file(bundle.folder, PREDICTOR, graph, without=CALIBRATION)
    finally:
        graph.unlink(missing_ok=True)
    return difference


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = argparse.ArgumentParser("edge-export predictor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("weights", type=Path, help="predictor.safetensors of `edge-export train`")
    parser.add_argument("bundle", type=Path, help="bundle the predictor was trained on")
    options = parser.parse_args(argv)
    difference = install(options.weights, Bundle.open(options.bundle))
    target = options.bundle / PREDICTOR
    console.print(
        f"{target}: {target.stat().st_size:,} bytes; differs from torch by {difference:.1e} at most"
    )
    console.print("Now calibrate it: edge-export calibrate LABELS BUNDLE")
    return 0
