"""The same model on other servers, each served as in its own documentation.

All take an image and return its top-1 label. They read `model.onnx`, `weights.pth` and
`index_to_name.json` from the folder that the variable BENCHMARK_FILES names.
"""
