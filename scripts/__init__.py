"""The commands behind the Makefile; `python -m scripts COMMAND` runs one."""

import sys
from types import TracebackType

import handler  # noqa: F401  # before any module imports ONNX Runtime, see there


def _end_quietly(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Ctrl-C while a command is still importing what it needs is no mistake to be traced."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("Stopped by Ctrl-C.\n")
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _end_quietly
