"""Build model archives: sources, conversion to ONNX, quantization, packing."""
