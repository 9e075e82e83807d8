"""Parse TorchServe's logs for the reason why a worker or the frontend exited."""

import re
from collections.abc import Iterable
from pathlib import Path

# Maximum length of a reason, in characters.
_MAX_LENGTH = 500

# TorchServe's prefix of lines that workers print, see log4j2.xml.
_PREFIX = re.compile(r"^\d{4}-\d\d-\d\dT\S+ \[\w+ *\] .*?MODEL_LOG - ")
# The last line of a traceback, with the exception. The preceding lines are indented.
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Fail|NoSuchFile)(?:: .*)?$"
)
# The handler's error for an invalid archive; its message includes that of its cause.
_ARCHIVE_ERROR = re.compile(r"\bArchiveError: (.+)$")
# TorchServe's error that follows a cause that is already logged.
_CONSEQUENCE = re.compile(r"^RuntimeError: \d{3} - ")
_FATAL = re.compile(r"^(?:Fatal Python error: .*|.*: error while loading shared libraries: .*)$")


def lines_from(log: Path, start: int) -> list[str]:
    """Return the lines of a log from a byte position; if it has been rotated since, all lines."""
    if not log.exists():
        return []
    with log.open(errors="replace") as file:
        file.seek(start if log.stat().st_size >= start else 0)
        return file.read().splitlines()


def root_cause(lines: Iterable[str]) -> str | None:
    """Return the error for which a worker exited; None if it logged none.

    In a chain of tracebacks, the first exception is the cause and the later ones its consequences.

    Args:
        lines: the worker's output, with or without TorchServe's prefixes.
    """
    printed = [_PREFIX.sub("", line).rstrip() for line in lines]
    for line in printed:
        if found := _ARCHIVE_ERROR.search(line):
            return found.group(1)[:_MAX_LENGTH]
    for pattern in (_EXCEPTION, _FATAL):
        for line in printed:
            if pattern.match(line) and not _CONSEQUENCE.match(line):
                return line[:_MAX_LENGTH]
    return None


def frontend_error(logs: Path) -> str:
    """Return the first error in the frontend's logs, and where the logs are, for a message.

    Args:
        logs: folder of console.log and server.log.
    """
    for name in ("console.log", "server.log"):
        path = logs / name
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        # Without a GPU, TorchServe logs an error because it cannot run nvidia-smi.
        errors = [
            line.strip()
            for line in lines
            if re.search(r"\[ERROR\]|Exception|Error\b", line)
            and "nvidia-smi" not in line
            and not line.startswith("\tat ")
        ]
        if errors:
            return f"{name} reports: {errors[0][:_MAX_LENGTH]}. The logs are in {logs}."
    return f"See the logs in {logs}."
