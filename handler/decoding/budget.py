"""Limits of what decoding may cost: pixels and CPU time of a request, memory of a worker."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock

from handler.errors import TooLarge
from handler.settings import Settings

# With less CPU time left no further image of a request is decoded.
_MIN_SECONDS = 0.01


class PixelBudget:
    """Limits what decoding all images of one request may cost; threads may share it."""

    def __init__(self, pixels: int, seconds: float = Settings.max_seconds) -> None:
        """Args: width times height of all images; seconds of CPU."""
        self.limit = self._left = pixels
        self._max_seconds = self._seconds = seconds
        self._lock = Lock()

    def take(self, width: int, height: int) -> None:
        """Take one image's pixels; raise `TooLarge` if too few are left."""
        with self._lock:
            if width * height > self._left:
                raise TooLarge(
                    f"The image has {width} x {height} pixels; the images of a request may have "
                    f"{self.limit:,} together. Send a smaller copy, or fewer at once."
                )
            self._left -= width * height

    def spend(self, seconds: float) -> None:
        """Take CPU time that decoding an image took."""
        with self._lock:
            self._seconds -= seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Take the CPU time that this thread uses; raise `TooLarge` if hardly any is left."""
        self.seconds_left()
        started = time.thread_time()
        try:
            yield
        finally:
            self.spend(time.thread_time() - started)

    def seconds_left(self) -> float:
        """Return the CPU time for the next image; raise `TooLarge` if hardly any is left."""
        if self._seconds < _MIN_SECONDS:
            raise self.too_slow()
        return self._seconds

    def too_slow(self) -> TooLarge:
        """Return the error for an image that takes too long."""
        return TooLarge(
            "The image takes too long to decode; the images of a request may take "
            f"{self._max_seconds:g} s together. Send a smaller copy, or save it as a JPEG, or "
            "send fewer at once."
        )


class MemoryBudget:
    """Limits the memory of all images that are being decoded; threads share it."""

    def __init__(self, limit: int) -> None:
        """Args: bytes."""
        self._limit = self._left = limit
        self._changed = Condition()

    @contextmanager
    def reserved(self, needed: int) -> Iterator[None]:
        """Wait until so many bytes are left, or all if more are needed, and take them."""
        needed = min(needed, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= needed)
            self._left -= needed
        try:
            yield
        finally:
            with self._changed:
                self._left += needed
                self._changed.notify_all()
