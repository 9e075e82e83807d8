"""The pages of results, with where and by what each was measured at their head."""

import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from scripts.terminal import step

RESULTS = Path("benchmarks/results")
CORES = psutil.cpu_count() or 1

PACKAGES = (
    "torch",
    "onnxruntime",
    "torchserve",
    "pillow",
    "openvino",
    "mosec",
    "litserve",
    "bentoml",
    "flask",
    "gunicorn",
    "locust",
)


def write_report(name: str, title: str, lines: Iterable[str]) -> None:
    """Writes `benchmarks/results/NAME.md`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text("\n".join([f"# {title}", "", describe(), "", *lines]) + "\n")
    step(f"Wrote {path}")


def write_section(name: str, title: str, section: str, lines: Iterable[str]) -> None:
    """Write one section of `benchmarks/results/NAME.md`; the others stay as they are."""
    path = RESULTS / f"{name}.md"
    before = path.read_text() if path.exists() else ""
    sections = dict(part.split("\n", 1) for part in before.split("\n## ")[1:])
    sections[section] = "\n".join(["", describe(), "", *lines]) + "\n"
    texts = [f"## {heading}\n{text}" for heading, text in sections.items()]
    path.write_text("\n".join([f"# {title}\n", *texts]))
    step(f"Wrote {path}")


def describe() -> str:
    """One sentence: date, machine, versions."""
    memory = psutil.virtual_memory().total / 2**30
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    return (
        f"Measured {datetime.now(timezone.utc):%Y-%m-%d} on {psutil.cpu_count()} CPUs "
        f"({_cpu()}), {memory:.0f} GiB, {platform.system()}, Python "
        f"{platform.python_version()}; {versions}."
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name and the widest vectors it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", "").split()
    widest = next((f for f in ("avx512f", "avx2", "avx") if f in flags), "no AVX")
    return f"{facts.get('model name', platform.machine())}, {widest}"
