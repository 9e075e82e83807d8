"""The tests; docs/CONTRIBUTING.md lists the folders."""

import os

# Several processes share the cores, so waiting threads must not spin. OpenMP reads this when
# PyTorch is imported, after this package.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
