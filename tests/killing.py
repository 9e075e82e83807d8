"""A program that is killed at each line of a module, one after the other."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Forks for each line of input, since a new Python for each would take minutes.
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
    """Run `work` of a program until it has been killed at each line of a module that it runs.

    Args:
        program: defines `work`, which prints a line after each step.
        module: the name of the module.
        path: the file that `work` changes; each run finds it as it is now.

    Yields:
        How many steps were done before each kill, and in the last run, which ends by itself.
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
                assert line, "the program failed, as it says above"
                steps += 1
            assert line in {"ended 9\n", "ended 0\n"}
            yield steps
