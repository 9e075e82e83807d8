"""What all tests share: the archive they serve, the server that serves it, and a count of what was
really run.
"""

import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.build.archive import build, recipe
from scripts.build.commands import build_timm
from scripts.build.weights import Weights, untrained
from scripts.serve.running import Running, free_ports
from scripts.serve.server import start, stop
from scripts.store import PACKAGED_ARCHITECTURE

# What `make test` tells this process is not for the commands that tests start.
for _name in list(os.environ):
    if _name.startswith("GIVEN_") or _name in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "TEST_OPTIONS"}:
        del os.environ[_name]

# A shell that starts tests in the background has them ignore Ctrl-C, and so would what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_seconds: dict[str, float] = defaultdict(float)
_counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
_notes: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-integration",
        action="store_true",
        help="fail unless tests against a real TorchServe ran",
    )
    parser.addoption(
        "--require-browser",
        action="store_true",
        help="fail unless tests in a real browser ran",
    )
    parser.addoption(
        "--require-gateway",
        action="store_true",
        help="fail unless the tests of the gateway ran, which need nginx and Prometheus",
    )
    parser.addoption(
        "--require-containers",
        action="store_true",
        help="fail unless the tests of the image ran, which need docker or podman",
    )


# Folders and modules that `make test` leaves to `make test-slow`: each takes minutes, or packages
# that a newcomer has no use for. Single tests of other modules are marked where they stand.
_SLOW = (
    "batch",
    "containers",
    "browser/test_everybody.py",
    "browser/test_labels.py",
    "browser/test_trouble.py",
    "gateway/test_hostile.py",
    "gateway/test_monitoring.py",
    "gateway/test_options.py",
    "gateway/test_outages.py",
    "gateway/test_sign_in.py",
    "gateway/test_tls.py",
    "gateway/test_upstreams.py",
    "integration/test_classify.py",
    "integration/test_corpus.py",
    "integration/test_costs.py",
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
    "unit/test_bootstrap.py",
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


def _kind(nodeid: str) -> str:
    parts = Path(nodeid.split("::", maxsplit=1)[0]).parts
    return parts[1] if len(parts) > 1 else parts[0]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    kind = _kind(report.nodeid)
    _seconds[kind] += report.duration
    if report.when == "call" or report.outcome != "passed":
        _counts[kind][report.outcome] += 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Where tests run in several processes: each one's notes come to this one."""
    _notes.extend(getattr(node, "workeroutput", {}).get("notes", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for note in _notes:
        terminalreporter.write_line(note)
    for kind, counts in sorted(_counts.items()):
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        terminalreporter.write_line(f"{kind} tests: {outcomes} in {_seconds[kind]:.0f} s")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["notes"] = _notes
    for kind, shown in (
        ("integration", "that the server works"),
        ("browser", "that the page works"),
    ):
        passed = _counts.get(kind, {}).get("passed")
        if session.config.getoption(f"--require-{kind}") and not passed:
            _notes.append(f"No {kind} test passed: these tests did not show {shown}.")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    for kind, missing in (
        ("gateway", "Not every test of the gateway ran: nginx or Prometheus is missing."),
        ("containers", "Not every test of the image ran: docker or podman is missing."),
    ):
        counts = _counts.get(kind, {})
        required = session.config.getoption(f"--require-{kind}")
        if required and (not counts.get("passed") or counts.get("skipped")):
            _notes.append(missing)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def note() -> list[str]:
    """Lines to print at the end of the run: figures that a test measured."""
    return _notes


@pytest.fixture(scope="session")
def weights() -> Weights:
    """Random weights whose answers differ from picture to picture."""
    return untrained()


@pytest.fixture(scope="session")
def archive(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real archive, built as `make run` builds it, in a model store of its own."""
    return build(recipe(weights), tmp_path_factory.mktemp("model_store"))


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder, with its logs."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def running(archive: Path, run_dir: Path) -> Iterator[Running]:
    """The server that the tests share. It must survive them all."""
    server = start(archive, free_ports(), workers=2, run_dir=run_dir)
    yield server
    survived = server.process() is not None
    stop(server, run_dir)
    assert survived, f"TorchServe ended during the tests; see {run_dir}"


@pytest.fixture(scope="session")
def lite0_archive() -> Path:
    """The archive of EfficientNet-Lite0, whose weights are trained; kept from run to run."""
    return build_timm(PACKAGED_ARCHITECTURE, model_store=Path("build", "tests"))


@pytest.fixture(scope="session")
def lite0_server(
    lite0_archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server of that archive, for what needs right answers."""
    run_dir = tmp_path_factory.mktemp("run")
    server = start(lite0_archive, free_ports(), workers=1, run_dir=run_dir)
    yield server
    stop(server, run_dir)


@dataclass(frozen=True)
class Shapes:
    """The example that gives several labels a picture, in a short form.

    Attributes:
        folder: all that it made: weights, classes, pictures with their labels, the archive.
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
    """Too little training to be good, but its answers differ from picture to picture."""
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
def shapes_server(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of that archive, with gRPC."""
    run_dir = tmp_path_factory.mktemp("run")
    server = start(shapes.archive, free_ports(), workers=1, run_dir=run_dir, grpc=True)
    yield server
    survived = server.process() is not None
    stop(server, run_dir)
    assert survived, f"TorchServe ended during the tests; see {run_dir}"
