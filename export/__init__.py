"""The stages that make what the edge agent runs: labels, predictor, calibration, ONNX graphs, starter models."""

import edge_agent  # noqa: F401  # first of all: it keeps onnxruntime, which optimum imports, from reporting
