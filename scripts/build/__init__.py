"""Build model archives: sources, conversion to ONNX, quantization, packing.

What is wrong with a user's model, files or options raises `UserError`, whose text is printed.
"""
