"""The client's wheel in an environment without this project."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from scripts.samples import CAT
from scripts.serve.running import ServerState

UV = Path(sys.executable).parent / "uv"
PACKAGE = Path("client/classification_client")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` of an environment with the wheel and the dependencies of the tests' own.

    uv works offline, with an empty cache.
    """
    place = tmp_path_factory.mktemp("elsewhere")
    own, environment = place / "venv", os.environ | {"UV_CACHE_DIR": str(place / "cache")}
    for command in (
        ("build", "--wheel", "--out-dir", place, "client"),
        ("venv", "--python", sys.executable, own),
        ("pip", "install", "--python", own, "--no-deps", "-f", place, "classification-client"),
    ):
        subprocess.run([UV, "--offline", "--quiet", *command], env=environment, check=True)
    (site,) = own.glob("lib/python*/site-packages")
    packages = dict.fromkeys(path for path in sys.path if path.endswith("-packages"))
    (site / "others.pth").write_text("\n".join(packages))
    return own / "bin"


def test_the_wheel_needs_nothing_of_this_project_and_classifies(
    installed: Path, running: ServerState, tmp_path: Path
) -> None:
    def run(*command: str | Path) -> list[str]:
        return subprocess.run(
            [installed / command[0], *command[1:]],
            cwd=tmp_path,
            env={"CLASSIFY_URL": running.predictions_url},
            capture_output=True,
            check=True,
            text=True,
        ).stdout.splitlines()

    program = """
import sys, classification_client, classification_client.command
print(classification_client.__file__)
print(*{name.partition(".")[0] for name in sys.modules})
"""
    place, modules = run("python", "-I", "-c", program)
    assert place.startswith(str(installed.parent))
    assert (Path(place).parent / "py.typed").exists()
    assert not {"torch", "numpy", "pyarrow", "handler", "scripts"} & set(modules.split())
    assert [line[:3] for line in run("classify", CAT, "--topk", "2")] == ["1. ", "2. "]


def test_the_wheel_declares_what_it_imports(installed: Path) -> None:
    site = [str(path) for path in installed.parent.glob("lib/python*/site-packages")]
    (package,) = Distribution.discover(name="classification-client", path=site)
    required = package.requires or []
    needed = {re.split(r"\W", line)[0] for line in required if "extra ==" not in line}
    optional = {re.split(r"\W", line)[0] for line in required if "extra ==" in line}
    assert needed == {"requests", "rich", "stamina", "typer", "urllib3"}
    assert optional == {"numpy", "pyarrow"}
    imported: set[str] = set()
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
    assert imported <= needed | optional | sys.stdlib_module_names | {PACKAGE.name}
