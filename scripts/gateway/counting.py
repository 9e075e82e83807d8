"""Counts the gateway's answers from its access log, for Prometheus.

nginx itself counts connections only. Its log has every answer, also those that no node saw: 401,
429, 502, 504.
"""

import json
from collections.abc import Collection
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

# Answers within what people do not notice, what they do, and what they do not wait for.
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Namespace, subsystem and unit, which the metrics' names have in them already.
_NO_PREFIXES = ("", "", "")
_OWN_PATHS = {"/healthz", "/readyz", "/sign-in", "/sign-out"}


class Counting:
    """Reads what the log gained, and counts it."""

    def __init__(self, log: Path, paths: Collection[str]) -> None:
        """Args: the log; the addresses that are counted by name, all others together."""
        self._metrics = CollectorRegistry()
        self._log = log
        self._paths = {*paths, *_OWN_PATHS}
        self._place = log.stat().st_size if log.exists() else 0
        self._inode = log.stat().st_ino if log.exists() else 0
        self._requests = Counter(
            "densenet_gateway_requests",
            "Requests by address and status, as the client saw it.",
            ["path", "status"],
            *_NO_PREFIXES,
            self._metrics,
        )
        self._seconds = Histogram(
            "densenet_gateway_request_seconds",
            "From the first byte of a request to the last of its answer.",
            (),
            *_NO_PREFIXES,
            self._metrics,
            buckets=_SECONDS,
        )
        # Present before the first error, so that an increase can be seen.
        for path in sorted(paths):
            for status in ("200", "500", "502", "503", "504"):
                self._requests.labels(path, status)

    def read(self) -> None:
        """Counts the lines since the last time; a log that was rolled begins anew."""
        if not self._log.exists():
            return
        with self._log.open("rb") as file:
            status = self._log.stat()
            if status.st_ino != self._inode or status.st_size < self._place:
                self._inode, self._place = status.st_ino, 0
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._place += len(line)
                self._count(line)

    def metrics(self) -> bytes:
        """What was counted, in Prometheus' own format."""
        return generate_latest(self._metrics)

    def _count(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            path, status, seconds = entry["path"], str(entry["status"]), float(entry["seconds"])
        except (ValueError, KeyError, TypeError):
            return
        self._requests.labels(path if path in self._paths else "other", status).inc()
        if path in self._paths - _OWN_PATHS:
            self._seconds.observe(seconds)
