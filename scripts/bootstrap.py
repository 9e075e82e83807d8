"""Makes the virtual environment and installs what the lock file pins, once.

Runs on the system's Python before anything is installed, so it uses the standard library only,
and stays readable to Pythons older than the project supports, to be able to say so.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
REQUIREMENTS = Path("requirements.in")
LOCK = Path("requirements.lock")

OLDEST_PYTHON = (3, 10)

# What an installation took, and half as much again.
GIGABYTES_WITH_CUDA = 9
GIGABYTES_CPU_ONLY = 3

# What pip prints when it fails, and what to tell a person.
FAILURES = (
    (
        "No space left on device",
        "The disk is full. Free some space (TMPDIR chooses another disk for temporary files).",
    ),
    (
        "Python.h",
        "A package must be compiled, and Python's headers are missing. Install them "
        "(on Debian and Ubuntu: python3-dev), or use a Python version for which it is prebuilt.",
    ),
    ("No matching distribution", "A pinned package is not to be had for this Python or machine."),
    ("error: command", "A package must be compiled, and the compiler failed or is missing."),
    ("HTTPSConnectionPool", "The package index cannot be reached. Check the network."),
    ("HTTPConnectionPool", "The package index cannot be reached. Check the network."),
    ("Temporary failure in name resolution", "The package index cannot be reached."),
    ("IncompleteRead", "The connection to the package index was lost."),
)


def main() -> None:
    """Sets up `.venv`, or finds that it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--torch-index",
        # As `make` passes it on.
        default=os.environ.get("GIVEN_TORCH_INDEX", ""),
        help="index to take torch from, by address",
    )
    torch_index = parser.parse_args().torch_index

    if sys.version_info < OLDEST_PYTHON:
        fail(
            "Python %d.%d or newer is needed, this is %s. Choose another with PYTHON=python3.12"
            % (OLDEST_PYTHON + (sys.version.split()[0],))
        )
    wanted = fingerprint(torch_index)
    if STAMP.exists() and STAMP.read_text() == wanted and works():
        return
    check_disk(GIGABYTES_CPU_ONLY if torch_index else GIGABYTES_WITH_CUDA)
    if STAMP.exists():
        STAMP.unlink()
    if not works():
        make_venv()
    install(torch_index)
    STAMP.write_text(wanted)
    say("Packages: installed into %s" % VENV)


def fingerprint(torch_index: str) -> str:
    """Changes whenever the installation should."""
    digest = hashlib.sha256()
    for part in (REQUIREMENTS.read_bytes(), LOCK.read_bytes(), torch_index.encode()):
        digest.update(part)
    return digest.hexdigest()


def works() -> bool:
    """Whether the environment's Python starts and is of this version."""
    if not PYTHON.exists():
        return False
    code = "import sys, pip; print(sys.version)"
    result = subprocess.run([str(PYTHON), "-c", code], stdout=subprocess.PIPE, check=False)
    return result.stdout.decode().strip() == sys.version


def check_disk(gigabytes: float) -> None:
    """Stops before a download that cannot fit."""
    free = shutil.disk_usage(".").free / 1e9
    if free < gigabytes and not VENV.exists():
        fail(
            "Only %.1f GB are free here, and the packages need up to %d GB. Free some space%s."
            % (free, gigabytes, "" if gigabytes == GIGABYTES_CPU_ONLY else CPU_HINT)
        )


CPU_HINT = ", or set TORCH_INDEX to the address of PyTorch's CPU-only index (3 GB)"


def make_venv() -> None:
    """Makes the virtual environment; what is left of a broken one goes first."""
    say("Packages: making the virtual environment %s" % VENV)
    if VENV.exists():
        shutil.rmtree(str(VENV))
    result = subprocess.run(
        [sys.executable, "-m", "venv", str(VENV)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if result.returncode != 0:
        shutil.rmtree(str(VENV), ignore_errors=True)
        output = result.stdout.decode(errors="replace")
        if "ensurepip" in output:
            fail(
                "This Python cannot make virtual environments. Install the part that does "
                "(on Debian and Ubuntu: python3-venv), then run the same command again."
            )
        fail("The virtual environment cannot be made: %s" % output.strip()[-300:])


def install(torch_index: str) -> None:
    """Runs pip with the lock file as constraints: a CPU-only torch then needs no CUDA packages."""
    size = "about 1 GB" if torch_index else "about 3 GB"
    say("Packages: installing, %s to download; this takes some minutes" % size)
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "-c", str(LOCK)]
    if torch_index:
        run_pip(pip + ["--index-url", torch_index, "torch", "torchvision"])
    run_pip(pip + ["-r", str(REQUIREMENTS)])


def run_pip(command: list[str]) -> None:
    """Shows pip's progress as it is, and turns its errors into a sentence."""
    errors = []
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            text = line.decode(errors="replace")
            if "WARNING" not in text:
                sys.stderr.write(text)
                errors.append(text)
    if process.returncode == 0:
        return
    output = "".join(errors)
    for sign, sentence in FAILURES:
        if sign in output:
            fail("%s Then run the same command again; what was installed is kept." % sentence)
    last = [line for line in errors if line.startswith("ERROR")] or errors or ["no reason given"]
    fail("pip failed: %s" % last[-1].strip()[:500])


def say(text: str) -> None:
    """One line of progress."""
    print("==> %s" % text, flush=True)


def fail(text: str) -> NoReturn:
    """One sentence, and exit status 1."""
    sys.stderr.write("Error: %s\n" % text)
    sys.exit(1)


if __name__ == "__main__":
    os.chdir(str(Path(__file__).resolve().parent.parent))
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped by Ctrl-C. Run the same command again to go on.\n")
        sys.exit(130)
