"""The tests: unit (no server) and integration (a real TorchServe)."""

import os

# Several processes share the cores, and a thread that waits for others must not spin meanwhile.
# OpenMP reads this when it is loaded: this package is imported before PyTorch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
