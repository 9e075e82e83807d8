"""The commands behind the Makefile; `python -m scripts COMMAND` runs one."""

import os
import sys
from types import TracebackType

import handler  # noqa: F401  # must precede the import of ONNX Runtime, see handler/__init__.py


def _exit_quietly(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print no traceback for Ctrl-C while a command is importing its modules."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("Stopped by Ctrl-C.\n")
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _exit_quietly


def _bypass_proxies_on_loopback() -> None:
    """Exclude loopback addresses from the proxies of this process and its children."""
    if any(name.lower().endswith("_proxy") and name.lower() != "no_proxy" for name in os.environ):
        given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        if given != "*":
            given = ",".join(filter(None, (given, "localhost,127.0.0.1,::1")))
        # Python and curl read the lowercase name, Go and others the uppercase one.
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = given


_bypass_proxies_on_loopback()
