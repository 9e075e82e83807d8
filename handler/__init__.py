"""All that goes into the archive. A batch flows protocols -> decoding -> inference -> results."""

import os

# From 1.29 on ONNX Runtime reports names and hashes of models to its maker unless this is set
# before it is imported. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# TorchServe's worker would parse JSON before the handler sees it, without limits: 20 MB of empty
# lists become 500 MB, for each request of a batch. The handler parses it within limits.
os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
