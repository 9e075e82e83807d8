"""Reject requests that nobody waits for any more, before they cost anything.

The queue is first in, first out, and TorchServe keeps the requests of clients that have gone. So
under overload each request would be computed just after its client gave up. The gateway and the
container tell the handler when a request arrived, for how long its client waits, and which clients
have disconnected. TorchServe itself tells none of that.
"""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from handler.errors import Expired
from handler.request import Request

# Headers of the gateway and the container: Unix time of arrival, and the client's time limit.
_ARRIVAL = "x-request-start"
_TIME_LIMIT = "x-request-timeout"
_SECONDS = re.compile(r"[0-9]{1,10}(\.[0-9]{1,6})?")

# Without a time limit of the client's.
_DEFAULT_SECONDS = 60.0
# A response takes as long as the batches before it did, and some more.
_BATCHES = 1.5
_WEIGHT, _WEIGHT_WITHOUT_IMAGES = 0.2, 0.01

# Ids of cancelled requests. The queue holds 512 requests.
_MAX_CANCELLED = 10_000
_REOPEN_SECONDS = 1.0
# Then the list begins again: 30,000 of the gateway's ids.
_MAX_FILE_BYTES = 1 << 20


class Deadlines:
    """Decides which requests are still worth an answer."""

    def __init__(
        self, cancelled: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """Args: the gateway's list of cancelled requests, if any; the time, as `time.time`."""
        self._cancelled = CancelledRequests(cancelled) if cancelled is not None else None
        self._clock = clock
        self._batch_seconds = 0.0

    @classmethod
    def from_environment(cls) -> "Deadlines":
        """Find the list of cancelled requests in the variable CANCELLED_REQUESTS."""
        path = os.environ.get("CANCELLED_REQUESTS")
        return cls(Path(path) if path else None)

    def start_batch(self) -> None:
        """Read which requests were cancelled since the last batch."""
        if self._cancelled is not None:
            self._cancelled.update()

    def end_batch(self, seconds: float, images: int) -> None:
        """Take the duration of a batch, and how many images it had, into the estimate for the next.

        A batch without images says little, or each rejection would make the estimate too short. It
        lowers the estimate a little: one that is too long for all clients must not stay so.
        """
        weight = _WEIGHT if images else _WEIGHT_WITHOUT_IMAGES
        self._batch_seconds += weight * (seconds - self._batch_seconds)

    def check(self, request: Request) -> None:
        """Raise `Expired` if the client has gone, or will have before it can get a response."""
        if self._cancelled is not None and request.header("x-request-id") in self._cancelled:
            raise Expired("The client disconnected before its request was processed.")
        arrival = request.header(_ARRIVAL)
        if not _SECONDS.fullmatch(arrival):
            return
        given = request.header(_TIME_LIMIT)
        limit = float(given) if _SECONDS.fullmatch(given) else _DEFAULT_SECONDS
        waited = self._clock() - float(arrival)
        if waited + _BATCHES * self._batch_seconds > limit and waited > 0:
            raise Expired(
                f"The request waited {waited:.1f} s for a worker, and its time limit, {limit:g} s, "
                "would have passed before the response. The server is overloaded: retry later."
            )


class CancelledRequests:
    """The ids in a file to which nginx appends those of disconnected clients."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids: dict[str, None] = {}
        self._file: int | None = None
        self._inode = 0
        self._rest = b""
        self._checked = float("-inf")

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._ids

    def update(self) -> None:
        """Read what was appended since the last call; costs 2 microseconds if nothing was."""
        self._reopen()
        if self._file is None:
            return
        while data := os.read(self._file, 1 << 16):
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._ids.update(dict.fromkeys(line.decode("ascii", "replace") for line in lines))
        while len(self._ids) > _MAX_CANCELLED:
            del self._ids[next(iter(self._ids))]

    def _reopen(self) -> None:
        """Open the file when it appears, and again when it was rotated; empty a long one."""
        now = time.monotonic()
        if now < self._checked + _REOPEN_SECONDS:
            return
        self._checked = now
        try:
            found = self._path.stat()
            if found.st_ino == self._inode:
                self._limit_size(found.st_size)
                return
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        if self._file is None:
            os.lseek(file, 0, os.SEEK_END)  # what is older concerns no request that comes now
        else:
            os.close(self._file)
        self._file, self._inode, self._rest = file, found.st_ino, b""

    def _limit_size(self, size: int) -> None:
        """Start again with a file that another worker emptied; empty one that nobody else did.

        nginx appends. An id that gets lost costs no more than a result that nobody waits for.
        """
        assert self._file is not None
        if size < os.lseek(self._file, 0, os.SEEK_CUR):
            os.lseek(self._file, 0, os.SEEK_SET)
            self._rest = b""
        elif size > _MAX_FILE_BYTES:
            os.truncate(self._path, 0)
