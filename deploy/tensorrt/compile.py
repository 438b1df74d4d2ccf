"""Compile one ONNX graph for inputs of given shapes: python compile.py GRAPH SHAPES.

The last line printed is JSON: why it was refused, such as operators and how often; otherwise layers and bytes of the
engine. Runs where `tensorrt_rtx` is installed and nothing else of this project.
"""

import collections
import json
import sys

import tensorrt_rtx as trt


def main() -> None:
    """Compile it and print what came of it."""
    path, shapes = sys.argv[1], json.loads(sys.argv[2])
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        counts = collections.Counter(error.node_operator() or error.desc() for error in errors)
        print(json.dumps({"refused": ", ".join(f"{count} {what}" for what, count in counts.items())}))
        return
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        tensor.shape = shapes[tensor.name]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        print(json.dumps({"refused": "read whole and not compiled; the lines above say why"}))
        return
    print(json.dumps({"refused": "", "layers": network.num_layers, "bytes": engine.nbytes}))


main()
