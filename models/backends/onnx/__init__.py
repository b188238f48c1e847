"""Layers exported from the unmodified modules, run by ONNX Runtime."""
