"""`make lock-check`: whether the locks can be installed on each supported platform and Python.

uv resolves each group from its locks alone, by hash, so each package must have a file for the
platform, and its dependencies must be in the locks.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.bootstrap import NEEDS

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

# The oldest C library and macOS that PyTorch and ONNX Runtime support.
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux ARM64": "aarch64-manylinux_2_28",
    "macOS ARM64": "aarch64-apple-darwin",
}
OLDEST_MACOS = "14.0"

# Groups with their own environment; the others are installed on top of their needs.
IMAGES = ("container", "gateway", "ray", "sbom")
STANDALONE = ("run", "clients", "moto", *IMAGES)
GROUPS = {
    lock.stem: [
        *(f"requirements/{group}.lock" for group in ("run", *NEEDS.get(lock.stem, ()))),
        str(lock),
    ][-1 if lock.stem in STANDALONE else 0 :]
    for lock in sorted(Path("requirements").glob("*.lock"))
}

# Pure Python packages without a wheel.
SOURCES = {"tests": ("sslyze",)}


def problem(case: tuple[str, str, str]) -> str:
    """Return why a group cannot be installed, "" if it can."""
    group, platform, python = case
    name = PLATFORMS[platform]
    if group in {"precision", "benchmarks"} and platform == "Linux ARM64":
        name = name.replace("2_28", "2_35")  # OpenVINO wants a newer C library there
    options = ["--python-platform", name, "--python-version", python]
    options += ["--dry-run", "--require-hashes", "--only-binary", ":all:"]
    for package in SOURCES.get(group, ()) + compiled(group, platform):
        options += ["--no-binary", package]
    for lock in GROUPS[group]:
        options += ["-r", lock]
    uv = Path(sys.executable).parent / "uv"
    with tempfile.TemporaryDirectory() as nothing_installed:
        done = subprocess.run(
            [uv, "pip", "install", *options, "--target", nothing_installed],
            env=os.environ | {"MACOSX_DEPLOYMENT_TARGET": OLDEST_MACOS},
            capture_output=True,
            text=True,
            check=False,
        )
    return done.stderr if done.returncode else ""


def compiled(group: str, platform: str) -> tuple[str, ...]:
    """Return the packages that must be compiled on ARM64."""
    return ("gevent", "psutil") if (group, platform[-5:]) == ("clients", "ARM64") else ()


def main() -> int:
    """Print a line for each group and platform; return 1 if something cannot be installed."""
    places = [
        (group, platform)
        for group, platform in itertools.product(GROUPS, PLATFORMS)
        if group not in IMAGES or platform.startswith("Linux")
    ]
    cases = [(*place, python) for place in places for python in PYTHONS]
    with ThreadPoolExecutor(4) as threads:
        problems = dict(zip(cases, threads.map(problem, cases), strict=True))
    for group, platform in places:
        good = [python for python in PYTHONS if not problems[group, platform, python]]
        print(f"{group:<18}{platform:<14}{' '.join(good)}")
    for case, text in problems.items():
        if text:
            print(f"\n{', '.join(case)}:\n{text}", file=sys.stderr)
    return 1 if any(problems.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
