"""What all tests share: the archive they serve, and a count of what was really run."""

from collections import defaultdict
from pathlib import Path

import pytest

from scripts.archive import build
from scripts.weights import Weights, untrained

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
        "--require-gateway",
        action="store_true",
        help="fail unless the tests of the gateway ran, which need nginx and Prometheus",
    )


def _kind(nodeid: str) -> str:
    parts = Path(nodeid.split("::", maxsplit=1)[0]).parts
    return parts[1] if len(parts) > 1 else parts[0]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    kind = _kind(report.nodeid)
    _seconds[kind] += report.duration
    if report.when == "call" or report.outcome != "passed":
        _counts[kind][report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for note in _notes:
        terminalreporter.write_line(note)
    for kind, counts in sorted(_counts.items()):
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        terminalreporter.write_line(f"{kind} tests: {outcomes} in {_seconds[kind]:.0f} s")


def pytest_sessionfinish(session: pytest.Session) -> None:
    missing = not _counts.get("integration", {}).get("passed")
    if session.config.getoption("--require-integration") and missing:
        _notes.append("No integration test passed: these tests did not show that the server works.")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    gateway = _counts.get("gateway", {})
    if session.config.getoption("--require-gateway") and (
        not gateway.get("passed") or gateway.get("skipped")
    ):
        _notes.append("Not every test of the gateway ran: nginx or Prometheus is missing.")
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
    return build(weights, tmp_path_factory.mktemp("model_store"))
