"""Reject requests whose client disconnected or will time out, before they are decoded.

TorchServe's queue is first in, first out and keeps the requests of disconnected clients. Under
overload, each request would be computed just after its client timed out. The gateway and the
container send the handler each request's arrival time and time limit, and the ids of requests whose
client disconnected. TorchServe itself provides none of these.
"""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from handler.errors import Expired
from handler.request import Request

# Headers that the gateway and the container set: Unix time of arrival and the client's time limit,
# both in seconds.
_ARRIVAL = "x-request-start"
_TIME_LIMIT = "x-request-timeout"
_SECONDS = re.compile(r"[0-9]{1,10}(\.[0-9]{1,6})?")

# The time limit if the client sends none.
_DEFAULT_SECONDS = 60.0
# A response is expected within this many times the average duration of a batch.
_RESPONSE_BATCHES = 1.5
_WEIGHT, _WEIGHT_WITHOUT_IMAGES = 0.2, 0.01

# Ids of canceled requests to remember. The queue holds 512 requests.
_MAX_CANCELLED = 10_000
# A larger file is truncated: this holds 30,000 of the gateway's ids.
_MAX_FILE_BYTES = 1 << 20


class Deadlines:
    """Decides which requests are still worth computing."""

    def __init__(
        self, cancelled: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """Take the gateway's list of canceled requests, if any, and a clock like `time.time`."""
        self._cancelled = CancelledRequests(cancelled) if cancelled is not None else None
        self._clock = clock
        self._batch_seconds = 0.0

    @classmethod
    def from_environment(cls) -> "Deadlines":
        """Take the path of the list of canceled requests from the variable CANCELLED_REQUESTS."""
        path = os.environ.get("CANCELLED_REQUESTS")
        return cls(Path(path) if path else None)

    def start_batch(self) -> None:
        """Read the ids of the requests that were canceled since the last batch."""
        if self._cancelled is not None:
            self._cancelled.update()

    def end_batch(self, seconds: float, images: int) -> None:
        """Update the estimated duration of a batch: a moving average, weighted by `images`.

        A batch without images has a small weight, so that rejections do not make the estimate too
        short. Its weight is not 0: an estimate above every client's time limit must fall again.
        """
        weight = _WEIGHT if images else _WEIGHT_WITHOUT_IMAGES
        self._batch_seconds += weight * (seconds - self._batch_seconds)

    def check(self, request: Request) -> None:
        """Raise `Expired` if the client disconnected, or would time out before the response."""
        if self._cancelled is not None and request.header("x-request-id") in self._cancelled:
            raise Expired("The client disconnected before its request was processed.")
        arrival = request.header(_ARRIVAL)
        if not _SECONDS.fullmatch(arrival):
            return
        given = request.header(_TIME_LIMIT)
        limit = float(given) if _SECONDS.fullmatch(given) else _DEFAULT_SECONDS
        waited = self._clock() - float(arrival)
        if waited + _RESPONSE_BATCHES * self._batch_seconds > limit and waited > 0:
            raise Expired(
                f"The request waited {waited:.1f} s for a worker, and its time limit, {limit:g} s, "
                "would have passed before the response. The server is overloaded: retry later."
            )


class CancelledRequests:
    """The request ids in a file to which nginx appends those of disconnected clients."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids: dict[str, None] = {}
        self._inode = self._position = 0
        self._rest = b""
        self.update()
        self._ids.clear()  # older ids concern no future request

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._ids

    def update(self) -> None:
        """Read the ids appended since the last call; takes 2 microseconds if there are none.

        nginx opens the file for appending, so it may be truncated. An id that gets lost costs one
        unneeded result.
        """
        try:
            found = self._path.stat()
            if found.st_ino != self._inode or found.st_size < self._position:
                # It is new, was rotated, or another worker truncated it.
                self._inode, self._position, self._rest = found.st_ino, 0, b""
            if found.st_size == self._position:
                return
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = self._rest + file.read()
                self._position = file.tell()
        except OSError:
            return
        *lines, self._rest = data.split(b"\n")
        self._ids.update(dict.fromkeys(line.decode("ascii", "replace") for line in lines))
        while len(self._ids) > _MAX_CANCELLED:
            del self._ids[next(iter(self._ids))]
        if found.st_size > _MAX_FILE_BYTES:
            with suppress(OSError):
                os.truncate(self._path, 0)
