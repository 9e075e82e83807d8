"""The same model on other servers, each as its own documentation says to serve one.

All take a picture and answer the first label. They read `model.onnx`, `weights.pth` and
`index_to_name.json` from the folder that the variable BENCHMARK_FILES names.
"""
