"""The commands behind the Makefile; each module is one, run as `python -m scripts.NAME`."""

import handler  # noqa: F401  # before any module imports ONNX Runtime, see there
