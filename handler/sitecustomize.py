"""Python imports this before anything else in a worker: the archive is on its module path.

One line of TorchServe's worker asks whether an answer is a tensor, and for that it imports
PyTorch: 450 MB and two seconds. Here that line gets PyTorch when it asks, which for answers of
bytes it never does. Every other import of PyTorch is as usual.

Python imports one module of this name and no more. Where tracing agents or a distribution bring
another one, this hides it; so it runs that one too.
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
    """Runs the module of this name that Python would have found without this one."""
    here = Path(__file__).resolve().parent
    # An entry is any text; an empty one is the current folder.
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec(__name__, elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


try:
    _run_next()
except Exception as error:  # somebody else's: the worker must not miss its own part for it
    print(f"Another sitecustomize failed: {type(error).__name__}: {error}", file=sys.stderr)
