"""The shared archives and servers, the slow tests, and the tests that a run requires."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.serve.running import ServerState
from scripts.store import PACKAGED_ARCHITECTURE
from tests.served import served

if TYPE_CHECKING:
    from scripts.build.sources.torchvision import TorchvisionSource

# Variables of `make test` must not reach the commands that tests start.
for _name in list(os.environ):
    if _name.startswith(("DENSENET_", "MAKE")) or _name in {"MFLAGS", "TEST_OPTIONS"}:
        del os.environ[_name]

# Shells start background processes with SIGINT ignored, which child processes would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Lines to print at the end.
_notes: list[str] = []

# `--require-KIND` fails if no test passed, or one was skipped that is not of _MAY_SKIP.
_REQUIRED = {
    "integration": "No integration test passed: the server was not tested.",
    "browser": "No browser test passed: the web UI was not tested.",
    "gateway": "Tests of the gateway were skipped: nginx or Prometheus is missing.",
    "containers": "Tests of the container image were skipped: docker or podman is missing.",
}
_MAY_SKIP = {"integration", "browser"}


def pytest_addoption(parser: pytest.Parser) -> None:
    for kind, message in _REQUIRED.items():
        parser.addoption(f"--require-{kind}", action="store_true", help=f"or fail: {message}")


# Folders and modules of `make test-slow`, which take minutes or need optional packages. Single slow
# tests of other modules have the mark.
_SLOW = (
    "batch",
    "containers",
    "browser/test_everybody.py",
    "browser/test_labels.py",
    "browser/test_trouble.py",
    "deploy/test_monitoring.py",
    "gateway/test_outages.py",
    "integration/test_classify.py",
    "integration/test_digits.py",
    "integration/test_evaluate.py",
    "integration/test_faults.py",
    "integration/test_kinds.py",
    "integration/test_labels.py",
    "integration/test_package.py",
    "integration/test_precision.py",
    "integration/test_run.py",
    "unit/test_batch.py",
    "unit/test_costs.py",
    "unit/test_precision.py",
    "unit/test_quantize.py",
)


# Packages of `make test` that `make test-light` lacks.
_NOT_LIGHT = {"torch", "torchvision", "timm", "transformers"}


def _is_slow(path: Path) -> bool:
    folder = Path(__file__).parent
    return path.is_relative_to(folder) and path.relative_to(folder).as_posix().startswith(_SLOW)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import slow modules in `make test`: their packages may be missing."""
    return True if config.option.markexpr == "not slow" and _is_slow(collection_path) else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip modules whose packages `make test-light` does not install."""
    report = yield
    failure = report.call.excinfo if report.call else None
    cause = failure.value.__cause__ if failure else None
    missing = cause.name or "" if isinstance(cause, ModuleNotFoundError) else ""
    if missing.split(".")[0] in _NOT_LIGHT:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "modules that import PyTorch: make test")
    return report


def pytest_itemcollected(item: pytest.Item) -> None:
    if _is_slow(item.path):
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect the notes of each process if tests run in several."""
    _notes.extend(getattr(node, "workeroutput", {}).get("notes", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for note in _notes:
        terminalreporter.write_line(note)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["notes"] = _notes
        return  # the main process checks the tests of all
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")

    def any_test(outcome: str, kind: str) -> bool:
        folder = f"tests/{kind}/"
        return any(report.nodeid.startswith(folder) for report in reporter.stats.get(outcome, ()))

    for kind, message in _REQUIRED.items():
        ran = any_test("passed", kind) and (kind in _MAY_SKIP or not any_test("skipped", kind))
        if session.config.getoption(f"--require-{kind}") and not ran:
            _notes.append(message)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def note() -> list[str]:
    """Lines to print at the end of the run, such as measurements."""
    return _notes


@pytest.fixture(scope="session")
def densenet() -> "TorchvisionSource":
    """DenseNet-121 with random weights, whose predictions differ between images."""
    from scripts.build.sources.torchvision import random_source  # imports PyTorch

    return random_source("densenet121")


def _kept(folder: str, build: Callable[[Path], Path]) -> Path:
    """Build an archive in a folder that later runs reuse, in one process at a time.

    `build` keeps an archive whose card has the SHA-256 of the same inputs.
    """
    model_store = Path("build", "tests", folder).absolute()
    model_store.mkdir(parents=True, exist_ok=True)
    with (model_store / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(model_store)


@pytest.fixture(scope="session")
def archive() -> Path:
    """The archive of DenseNet-121 with random weights."""
    spec = from_options(arch="densenet121", weights="random")
    return _kept("untrained", lambda model_store: build(spec, model_store))


@pytest.fixture(scope="session")
def lite0_archive() -> Path:
    """The archive of EfficientNet-Lite0 with trained weights."""
    return _kept("", lambda folder: build(from_options(arch=PACKAGED_ARCHITECTURE), folder))


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the shared server and its logs."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def running(archive: Path, run_dir: Path) -> Iterator[ServerState]:
    """The shared server with two workers."""
    with served(archive, run_dir, workers=2) as server:
        yield server


@pytest.fixture(scope="session")
def lite0_server(
    lite0_archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerState]:
    """A server with trained weights, for tests that need correct labels."""
    with served(lite0_archive, tmp_path_factory.mktemp("run")) as server:
        yield server


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make shapes` with enough training for different predictions, and no more."""
    folder = tmp_path_factory.mktemp("shapes")
    short = ("--epochs", "2", "--images", "320", "--min-precision", "0")
    command = [sys.executable, "-m", "examples.shapes", "--folder", str(folder), *short]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="session")
def shapes_archive(shapes: Path) -> Path:
    """The archive with the thresholds that the evaluation chose."""
    return shapes / "model_store" / "shapes.mar"


@pytest.fixture(scope="session")
def shapes_server(
    shapes_archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerState]:
    """A server of that archive with gRPC."""
    with served(shapes_archive, tmp_path_factory.mktemp("run"), grpc=True) as server:
        yield server
