"""Python imports this before anything else in a worker: the archive is on its module path.

One line of TorchServe's worker asks whether an answer is a tensor, and for that it imports
PyTorch: 450 MB and two seconds. Here that line gets PyTorch when it asks, which for answers of
bytes it never does. Every other import of PyTorch is as usual.
"""

import importlib
import sys
import types
from typing import Any


class _PostponedTorch(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch"), name)


sys.modules["torch"] = _PostponedTorch("torch")
try:
    importlib.import_module("ts.protocol.otf_message_handler")
finally:
    del sys.modules["torch"]
