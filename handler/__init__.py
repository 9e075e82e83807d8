"""All that goes into the model archive: a batch flows inputs -> images -> engine -> responses."""

import os

# From 1.29 on ONNX Runtime reports names and hashes of models to its maker unless this is set
# before it is imported. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# TorchServe's worker would parse JSON before the handler sees it, whatever that takes: 20 MB of
# empty lists become 500 MB, for each request of a batch. The handler reads it, within bounds.
os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
