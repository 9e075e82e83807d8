"""Postpone the import of PyTorch in a worker until it is used.

TorchServe's worker imports PyTorch, 450 MB and two seconds, only to check whether a response is a
tensor. This module gives it a placeholder that imports PyTorch on first use, which never happens
for responses of bytes. Other imports of PyTorch are not affected.

Python imports this module at start, since the archive is on the worker's module path. It imports
only one module of this name, so this one also runs another that tracing agents or a distribution
may have installed.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


class _PostponedTorch(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch"), name)


sys.modules["torch"] = _PostponedTorch("torch")
try:
    importlib.import_module("ts.protocol.otf_message_handler")
finally:
    del sys.modules["torch"]


def _run_next() -> None:
    """Run the module of this name that Python would have found without this one."""
    here = Path(__file__).resolve().parent
    # An empty entry is the current folder.
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec(__name__, elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


try:
    _run_next()
except Exception as error:  # an error in the other module must not stop the worker
    print(f"Another sitecustomize failed: {type(error).__name__}: {error}", file=sys.stderr)
