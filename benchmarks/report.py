"""Writes the pages of results; each section begins with date, commit, machine and versions."""

import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from scripts.terminal import step

RESULTS = Path("benchmarks/results")
CORES = psutil.cpu_count() or 1

_PACKAGES = (
    *("torch", "onnxruntime", "torchserve", "pillow", "openvino"),
    *("mosec", "litserve", "bentoml", "flask", "gunicorn"),
)
# Processor flags that decide how fast reduced precision is.
_INSTRUCTIONS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
)


def write_section(name: str, title: str, section: str, *parts: str | Iterable[str]) -> None:
    """Write one section of `benchmarks/results/NAME.md`; keep the others.

    Args:
        name: of the page.
        title: of the page.
        section: heading of the section.
        parts: paragraphs, and lines of tables.
    """
    lines = [line for part in parts for line in ((part, "") if isinstance(part, str) else part)]
    path = RESULTS / f"{name}.md"
    before = path.read_text() if path.exists() else ""
    sections = dict(part.split("\n", 1) for part in before.split("\n## ")[1:])
    sections[section] = "\n".join(["", describe(), "", *lines]) + "\n"
    texts = [f"## {heading}\n{text}" for heading, text in sections.items()]
    path.write_text("\n".join([f"# {title}\n", *texts]))
    step(f"Wrote {path}")


def table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Return the lines of a Markdown table and an empty one.

    Numbers have one decimal place, from 100 on none.
    """
    columns = list(headings)
    lines = [_row(columns), "|---" * len(columns) + "|", *map(_row, rows)]
    return [*lines, ""]


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:,.{0 if abs(value) >= 100 else 1}f}"  # noqa: PLR0124
    return str(value)


def describe() -> str:
    """Return two sentences: date, commit and machine; versions."""
    memory = psutil.virtual_memory().total / 2**30
    versions = ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)))
    return (
        f"Measured {datetime.now(timezone.utc):%Y-%m-%d} at commit {_commit()} on {CORES} CPUs "
        f"({_cpu()}), {memory:.0f} GiB, {platform.system()}, Python "
        f"{platform.python_version()}; {versions}."
    )


def _commit() -> str:
    git = ("git", "describe", "--always", "--dirty")
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """Return the processor's name and its vector instructions."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = [flag for flag in _INSTRUCTIONS if flag in facts.get("flags", "").split()]
    return ", ".join([facts.get("model name", platform.machine()), *flags])
