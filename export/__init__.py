"""The stages that make what the edge agent runs: labels, predictor, calibration, ONNX graphs, starter models."""
