"""The benchmarks' command line: `python -m benchmarks NAME [OPTIONS]`, or `make bench-NAME`.

Each benchmark is one module with a function `main`, whose options `--help` lists.
"""

import sys
from importlib import import_module

from benchmarks.load import require_wrk
from scripts.terminal import command

BENCHMARKS = {
    "compare": "this service and other servers, one at a time",
    "engines": "inference engines and their options",
    "settings": "settings of TorchServe and of its Java runtime",
    "stages": "the stages of a request, and workers without PyTorch",
    "overload": "more clients than the queue holds, clients that give up or leave",
    "endurance": "memory, descriptors and files after 20,000 requests of mixed kinds",
    "gateway": "what the gateway adds to a request",
    "install": "`make run` in a fresh clone: seconds to the first answer, download, disk",
    "containers": "the container image: size, start, memory, overload, shutdown",
    "batch": "classify-batch, classify and a bare loop",
    "accuracy": "what reduced precision changes in a trained model",
    "architectures": "archives of torchvision's and timm's architectures; takes hours",
    "gpu": "the PyTorch engine on a GPU, or on the CPU if there is none",
}
_NEED_WRK = {"compare", "settings", "stages", "overload", "gateway"}


def main() -> None:
    """Run the benchmark that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHMARKS:
        lines = [f"  {known:14} {text}" for known, text in BENCHMARKS.items()]
        print("usage: python -m benchmarks NAME [OPTIONS]", *lines, sep="\n")
        raise SystemExit(0 if name in {"--help", "-h"} else 2)
    if name in _NEED_WRK:
        require_wrk()
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    command(import_module(f"benchmarks.{name}").main)


if __name__ == "__main__":
    main()
