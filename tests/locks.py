"""Whether the locks can be installed on every platform and Python that the project supports.

Asks uv to resolve each group for each of them, from the lock alone and by hash: so each package
has a file for that platform, and each package that another one needs is in the lock.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

# The oldest C library, and the oldest macOS, that PyTorch and ONNX Runtime are built for.
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux ARM64": "aarch64-manylinux_2_28",
    "macOS ARM64": "aarch64-apple-darwin",
}
OLDEST_MACOS = "14.0"

GROUPS = {
    "run": ("requirements.lock",),
    "tests": ("requirements.lock", "tests/requirements.lock"),
    "precision": ("requirements.lock", "precision/requirements.lock"),
    "timm": ("requirements.lock", "timm-models/requirements.lock"),
    "lite0": ("requirements.lock", "timm-models/lite0/requirements.lock"),
    "batch": ("requirements.lock", "batch/requirements.lock"),
    "benchmarks": ("requirements.lock", "benchmarks/requirements.lock"),
    "clients": ("tests/clients/requirements.lock",),
    "s3": ("tests/batch/requirements.lock",),
    "container": ("deploy/container/requirements.lock",),
    "container, sbom": ("deploy/container/sbom.lock",),
    "gateway": ("deploy/gateway/requirements.lock",),
    "ray": ("deploy/ray/requirements.lock",),
}

# Installed in images only.
LINUX_ONLY = {"container", "container, sbom", "gateway", "ray"}

# Packages of pure Python without a wheel.
SOURCES = {"tests": ("sslyze",)}


def platform_of(group: str, platform: str) -> str:
    """What uv calls a platform; OpenVINO wants a newer C library on ARM64."""
    name = PLATFORMS[platform]
    newer = group in {"precision", "benchmarks"} and platform == "Linux ARM64"
    return name.replace("2_28", "2_35") if newer else name


def compiled(group: str, platform: str, python: str) -> tuple[str, ...]:
    """Packages that must be compiled: gevent, of the load generator and of Triton's client, on a
    Mac's older Pythons; on ARM64 also the older psutil that KServe's client needs. On a Mac no test
    runs Swift, which would need pyeclib.
    """
    if group == "s3" and platform == "macOS ARM64":
        return ("pyeclib",)
    if group == "clients" and platform != "Linux x86-64":
        return ("gevent", "psutil")
    older = python in {"3.10", "3.11"}
    return ("gevent",) if (group, platform) == ("benchmarks", "macOS ARM64") and older else ()


def problem(case: tuple[str, str, str]) -> str:
    """Why a group cannot be installed; nothing where it can."""
    group, platform, python = case
    options = ["--python-platform", platform_of(group, platform), "--python-version", python]
    options += ["--dry-run", "--require-hashes", "--only-binary", ":all:"]
    for name in SOURCES.get(group, ()) + compiled(group, platform, python):
        options += ["--no-binary", name]
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


def main() -> int:
    """Prints a line for each group and platform; 1 where something cannot be installed."""
    places = [
        (group, platform)
        for group, platform in itertools.product(GROUPS, PLATFORMS)
        if group not in LINUX_ONLY or platform.startswith("Linux")
    ]
    cases = [(*place, python) for place in places for python in PYTHONS]
    with ThreadPoolExecutor(4) as threads:
        problems = dict(zip(cases, threads.map(problem, cases), strict=True))
    for group, platform in places:
        good = [p for p in PYTHONS if not problems[group, platform, p]]
        print(f"{group:<17}{platform:<14}{' '.join(good)}")
    for case, text in problems.items():
        if text:
            print(f"\n{', '.join(case)}:\n{text}", file=sys.stderr)
    return 1 if any(problems.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
