"""The client as other people install it: a wheel in an environment without this project."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest

from scripts.samples import CAT
from scripts.serve.running import Running

UV = Path(sys.executable).parent / "uv"
PACKAGE = Path("client/classification_client")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel; what it needs comes from the tests' own.

    Without a network, and without anything that uv would have from before.
    """
    place = tmp_path_factory.mktemp("elsewhere")
    own = place / "venv"
    commands: list[list[str | Path]] = [
        ["build", "--wheel", "--out-dir", place, "client"],
        ["venv", "--python", sys.executable, own],
        ["pip", "install", "--python", own, "--no-deps", "-f", place, "classification-client"],
    ]
    for command in commands:
        subprocess.run(
            [UV, "--offline", "--quiet", *command],
            env=os.environ | {"UV_CACHE_DIR": str(place / "cache")},
            check=True,
        )
    (site,) = own.glob("lib/python*/site-packages")
    packages = dict.fromkeys(path for path in sys.path if path.endswith("-packages"))
    (site / "others.pth").write_text("\n".join(packages))
    return own / "bin"


def test_it_stands_alone(installed: Path) -> None:
    program = """
import sys, classification_client, classification_client.command
print(classification_client.__file__)
print(*{name.partition(".")[0] for name in sys.modules})
"""
    done = subprocess.run(
        [installed / "python", "-I", "-c", program],
        cwd=installed,
        capture_output=True,
        check=True,
        text=True,
    )
    place, modules = done.stdout.splitlines()
    assert place.startswith(str(installed.parent))
    assert (Path(place).parent / "py.typed").exists()
    assert not {"torch", "numpy", "pyarrow", "handler", "scripts"} & set(modules.split())


def test_all_that_it_imports_is_said_and_is_little() -> None:
    said = requires("classification-client") or []
    needed = {re.split(r"\W", line)[0] for line in said if "extra ==" not in line}
    wanted = {re.split(r"\W", line)[0] for line in said if "extra ==" in line}
    assert needed == {"requests", "rich", "stamina", "typer"}
    assert wanted == {"pyarrow"}
    assert set(_imported()) <= needed | wanted | sys.stdlib_module_names | {PACKAGE.name}


def _imported() -> Iterator[str]:
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                yield str(node.module).partition(".")[0]
            elif isinstance(node, ast.Import):
                yield from (name.name.partition(".")[0] for name in node.names)


def test_its_command_classifies(installed: Path, running: Running, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "classify", CAT, "--topk", "2"],
        cwd=tmp_path,
        env={"CLASSIFY_URL": running.predictions_url},
        capture_output=True,
        check=True,
        text=True,
    )
    assert [line[:3] for line in done.stdout.splitlines()] == ["1. ", "2. "]
