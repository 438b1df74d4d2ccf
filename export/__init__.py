"""The stages that make what the edge agent runs: labels, predictor, calibration, ONNX graphs, starter models."""

import logging

import edge_agent  # noqa: F401  # first of all: it keeps onnxruntime, which optimum imports, from reporting

# optimum comes as two distributions, on which diffusers remarks each time it is imported.
logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
