"""The commands behind the Makefile; `python -m scripts COMMAND` runs one."""

import sys
from types import TracebackType

import handler  # noqa: F401  # before any module imports ONNX Runtime, see there


def _exit_quietly(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print no traceback for Ctrl-C while a command is importing its modules."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("Stopped by Ctrl-C.\n")
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _exit_quietly
