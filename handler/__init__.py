"""The package in the model archive. A batch flows protocols -> decoding -> inference -> results."""

import os

# Since 1.29, ONNX Runtime reports names and hashes of models to its vendor unless this is set
# before the import. Setting it to 0 in the environment enables the reports.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# TorchServe's worker would parse JSON before the handler and without limits: 20 MB of empty lists
# take 500 MB of memory per request of a batch. The handler parses JSON within limits.
os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
