"""Kill a program at each line of a module, one line per run."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Forks for each line of input: starting Python each time would take minutes.
_FORKING = """
import os, sys

def trace(frame, event, argument):
    global seen
    if frame.f_code.co_filename != module:
        return None
    seen += event == "line"
    if seen == wanted:
        os._exit(9)
    return trace

exec(sys.argv[1])
module, seen = sys.modules[sys.argv[2]].__file__, 0
for wanted, _ in enumerate(sys.stdin, start=1):
    child = os.fork()
    if child == 0:
        sys.settrace(trace)
        work()
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def killed_at_each_line(program: str, module: str, path: Path) -> Iterator[int]:
    """Run the `work` of a program, killed at each line of a module; restore the file before a run.

    Args:
        program: defines `work`, which prints a line after each step.
        module: the name of the module.
        path: the file that `work` changes.

    Yields:
        the number of steps before each kill, and of the last run, which is not killed.
    """
    before = path.read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", _FORKING, program, module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        while line != "ended 0\n":
            path.write_bytes(before)
            process.stdin.write("\n")
            process.stdin.flush()
            steps = 0
            while not (line := process.stdout.readline()).startswith("ended"):
                assert line, "the program failed, see above"
                steps += 1
            assert line in {"ended 9\n", "ended 0\n"}
            yield steps
