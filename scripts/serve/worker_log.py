"""What the logs of a TorchServe say of a worker or a frontend that ended."""

import re
from collections.abc import Iterable
from pathlib import Path

_LONGEST = 500

# What TorchServe writes before a line that a worker printed, see log4j2.xml.
_PREFIX = re.compile(r"^\d{4}-\d\d-\d\dT\S+ \[\w+ *\] .*?MODEL_LOG - ")
# The last line of a traceback, which names the exception. Its other lines are indented.
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Fail|NoSuchFile)(?:: .*)?$"
)
# What the handler raises for a wrong archive; it holds the reason of whatever it was raised from.
_ARCHIVE_ERROR = re.compile(r"\bArchiveError: (.+)$")
# What TorchServe's worker makes of a cause that it has just logged.
_OF_TORCHSERVE = re.compile(r"^RuntimeError: \d{3} - ")
_FATAL = re.compile(r"^(?:Fatal Python error: .*|.*: error while loading shared libraries: .*)$")
_DIED = ("Backend worker process died", "Failed to load model", " OOM, exception")


class NewLines:
    """What a log gains from now on; earlier starts wrote into the same file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = path.stat().st_size if path.exists() else 0

    def read(self) -> list[str]:
        """All lines since."""
        if not self._path.exists():
            return []
        with self._path.open(errors="replace") as log:
            # A log that was rolled begins anew.
            log.seek(self._start if self._path.stat().st_size >= self._start else 0)
            return log.read().splitlines()


def says_died(lines: Iterable[str]) -> bool:
    """Whether a worker says that it ends."""
    return any(sign in line for line in lines for sign in _DIED)


def cause(lines: Iterable[str]) -> str | None:
    """Why a worker ended, in its own words; None where it says nothing.

    The first exception of a run of tracebacks is the cause, those behind it are consequences.

    Args:
        lines: what the worker printed, with or without TorchServe's prefixes.
    """
    said = [_PREFIX.sub("", line).rstrip() for line in lines]
    for line in said:
        if found := _ARCHIVE_ERROR.search(line):
            return found.group(1)[:_LONGEST]
    for pattern in (_EXCEPTION, _FATAL):
        for line in said:
            if pattern.match(line) and not _OF_TORCHSERVE.match(line):
                return line[:_LONGEST]
    return None


def last_words(logs: Path) -> str:
    """Why the frontend ended, as far as its logs say it, and where they are.

    Args:
        logs: folder of console.log and server.log.
    """
    for name in ("console.log", "server.log"):
        path = logs / name
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        # Without a GPU TorchServe logs a failed look for one as an error.
        errors = [
            line.strip()
            for line in lines
            if re.search(r"\[ERROR\]|Exception|Error\b", line)
            and "nvidia-smi" not in line
            and not line.startswith("\tat ")
        ]
        if errors:
            return f"{name} says: {errors[0][:_LONGEST]}. The logs are in {logs}."
    return f"See the logs in {logs}."
