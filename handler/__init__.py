"""All that goes into the model archive: a batch flows inputs -> images -> engine -> responses."""

import os

# From 1.29 on ONNX Runtime reports names and hashes of models to its maker unless this is set
# before it is imported. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
