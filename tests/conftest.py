"""What all tests share: the archives, their servers, and a report of what ran and for how long."""

import fcntl
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.build.sources.torchvision import TorchvisionSource, random_source
from scripts.serve.running import ServerState, free_ports
from scripts.serve.server import start, stop
from scripts.store import PACKAGED_ARCHITECTURE

# What `make test` tells this process is not for the commands that tests start.
for _name in list(os.environ):
    if _name.startswith(("DENSENET_", "MAKE")) or _name in {"MFLAGS", "TEST_OPTIONS"}:
        del os.environ[_name]

# A shell that starts tests in the background has them ignore Ctrl-C, and so would what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Of each module, with the fixtures that were set up there.
_seconds: dict[str, float] = defaultdict(float)
# Of each folder.
_outcomes: dict[str, Counter[str]] = defaultdict(Counter)
_notes: list[str] = []

# What `--require-KIND` fails for: no test of that kind passed, or one was skipped.
_REQUIRED = {
    "integration": "No integration test passed: these tests did not show that the server works.",
    "browser": "No browser test passed: these tests did not show that the page works.",
    "gateway": "Not every test of the gateway ran: nginx or Prometheus is missing.",
    "containers": "Not every test of the image ran: docker or podman is missing.",
}
_MAY_SKIP = {"integration", "browser"}
_SLOWEST = 10
# The Debian package of a program, for reasons to skip that do not name it.
_PACKAGES = {"chromium": "chromium", "nginx": "nginx", "prometheus": "prometheus"}


def pytest_addoption(parser: pytest.Parser) -> None:
    for kind, message in _REQUIRED.items():
        parser.addoption(f"--require-{kind}", action="store_true", help=f"or fail: {message}")


# Folders and modules that `make test` leaves to `make test-slow`: each takes minutes, or packages
# that a newcomer has no use for. Single tests of other modules are marked where they stand.
_SLOW = (
    "batch",
    "containers",
    "browser/test_everybody.py",
    "browser/test_labels.py",
    "browser/test_trouble.py",
    "gateway/test_hostile.py",
    "deploy/test_monitoring.py",
    "gateway/test_outages.py",
    "integration/test_classify.py",
    "integration/test_digits.py",
    "integration/test_evaluate.py",
    "integration/test_faults.py",
    "integration/test_kinds.py",
    "integration/test_labels.py",
    "integration/test_models.py",
    "integration/test_package.py",
    "integration/test_precision.py",
    "integration/test_run.py",
    "unit/test_batch.py",
    "unit/test_costs.py",
    "unit/test_precision.py",
    "unit/test_quantize.py",
)


def _is_slow(path: Path) -> bool:
    folder = Path(__file__).parent
    return path.is_relative_to(folder) and path.relative_to(folder).as_posix().startswith(_SLOW)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Nor does `make test` import them, since it does without some of their packages."""
    return True if config.option.markexpr == "not slow" and _is_slow(collection_path) else None


def pytest_itemcollected(item: pytest.Item) -> None:
    if _is_slow(item.path):
        item.add_marker(pytest.mark.slow)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    module = report.nodeid.split("::", maxsplit=1)[0]
    _seconds[module] += report.duration
    if report.when == "call" or report.outcome != "passed":
        _outcomes[_folder(module)][report.outcome] += 1


def _folder(module: str) -> str:
    parts = Path(module).parts
    return parts[1] if len(parts) > 1 else parts[0]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Where tests run in several processes: each one's notes come to this one."""
    _notes.extend(getattr(node, "workeroutput", {}).get("notes", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    for note in _notes:
        write(note)
    folders: dict[str, float] = defaultdict(float)
    for module, seconds in _seconds.items():
        folders[_folder(module)] += seconds
    if folders:
        terminalreporter.section("seconds with setup and teardown, of folders and slowest modules")
    for folder, seconds in sorted(folders.items()):
        counts = sorted(_outcomes[folder].items())
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts)
        write(f"{seconds:7.1f}  {folder} tests: {outcomes}")
    slowest = sorted(_seconds, key=_seconds.__getitem__, reverse=True)[:_SLOWEST]
    for module in slowest:
        write(f"{_seconds[module]:7.1f}  {module}")
    skipped = Counter(map(_reason, terminalreporter.stats.get("skipped", [])))
    for reason, count in skipped.most_common():
        write(f"NOT RUN: {count} test(s): {reason}")


def _reason(report: pytest.TestReport) -> str:
    """Return why a test was skipped, and what to install."""
    place = report.longrepr
    text = str(place[2] if isinstance(place, tuple) else place)
    reason = text.removeprefix("Skipped: ").removeprefix("NOT RUN: ")
    for program, package in _PACKAGES.items():
        if program in reason.lower() and "apt install" not in reason:
            return f"{reason} (on Debian: apt install {package})"
    return reason


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["notes"] = _notes
        return  # whoever started this process sees the tests of all
    for kind, message in _REQUIRED.items():
        ran = _outcomes[kind]["passed"] and (kind in _MAY_SKIP or not _outcomes[kind]["skipped"])
        if session.config.getoption(f"--require-{kind}") and not ran:
            _notes.append(message)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def note() -> list[str]:
    """Lines to print at the end of the run: figures that a test measured."""
    return _notes


@pytest.fixture(scope="session")
def densenet() -> TorchvisionSource:
    """DenseNet-121 with random weights whose answers differ from image to image."""
    return random_source("densenet121")


def _kept(folder: str, build: Callable[[Path], Path]) -> Path:
    """Build an archive in a folder that outlives the run, one process at a time.

    `build` makes none if the one that is there is of the same inputs, by their SHA-256 in its card.
    """
    model_store = Path("build", "tests", folder).absolute()
    model_store.mkdir(parents=True, exist_ok=True)
    with (model_store / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(model_store)


@pytest.fixture(scope="session")
def archive() -> Path:
    """A real archive, built as `make run` builds it, in a model store of its own."""
    spec = from_options(arch="densenet121", weights="random")
    return _kept("untrained", lambda model_store: build(spec, model_store))


@pytest.fixture(scope="session")
def lite0_archive() -> Path:
    """The archive of EfficientNet-Lite0, whose weights are trained."""
    return _kept("", lambda folder: build(from_options(arch=PACKAGED_ARCHITECTURE), folder))


@contextmanager
def _served(
    archive: Path, run_dir: Path, workers: int, *, grpc: bool = False
) -> Iterator[ServerState]:
    """Run a server, which must survive its tests."""
    server = start(archive, free_ports(), workers=workers, run_dir=run_dir, grpc=grpc)
    yield server
    survived = server.process() is not None
    stop(server, run_dir)
    assert survived, f"TorchServe ended during the tests; see {run_dir}"


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the shared server, with its logs."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def running(archive: Path, run_dir: Path) -> Iterator[ServerState]:
    """The server that the tests share."""
    with _served(archive, run_dir, workers=2) as server:
        yield server


@pytest.fixture(scope="session")
def lite0_server(
    lite0_archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerState]:
    """A server of trained weights, for what needs right answers."""
    with _served(lite0_archive, tmp_path_factory.mktemp("run"), workers=1) as server:
        yield server


@dataclass(frozen=True)
class Shapes:
    """The multi-label example, in a short form.

    Attributes:
        folder: all that it made: weights, classes, images with their labels, the archive.
        said: what it printed.
    """

    folder: Path
    said: str

    @property
    def archive(self) -> Path:
        """With the thresholds that the evaluation chose."""
        return self.folder / "model_store" / "shapes.mar"


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """Too little training to be good, but its answers differ from image to image."""
    folder = tmp_path_factory.mktemp("shapes")
    short = ("--epochs", "2", "--pictures", "320", "--least", "0")
    result = subprocess.run(
        [sys.executable, "-m", "examples.shapes", "--folder", str(folder), *short],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return Shapes(folder, result.stdout)


@pytest.fixture(scope="session")
def shapes_server(
    shapes: Shapes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerState]:
    """A server of that archive, with gRPC."""
    run_dir = tmp_path_factory.mktemp("run")
    with _served(shapes.archive, run_dir, workers=1, grpc=True) as server:
        yield server
