"""Limit the pixels and CPU time of a request's images and the memory of a worker's decoding."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock

from handler.errors import TooLarge
from handler.settings import Settings

# With less CPU time left, no further image of the request is decoded.
_MIN_SECONDS = 0.01


class PixelBudget:
    """Limits the pixels and CPU time of one request's images; can be shared between threads."""

    def __init__(self, pixels: int, seconds: float = Settings.max_seconds) -> None:
        """Take the limits: the sum of width times height of all images, and seconds of CPU time."""
        self.limit = self._left = pixels
        self._max_seconds = self._seconds = seconds
        self._lock = Lock()

    def take(self, width: int, height: int) -> None:
        """Take one image's pixels from the budget; raise `TooLarge` if too few are left."""
        with self._lock:
            if width * height > self._left:
                raise TooLarge(
                    f"The image has {width} x {height} pixels; the images of a request may have "
                    f"{self.limit:,} together. Send a smaller copy, or fewer at once."
                )
            self._left -= width * height

    def spend(self, seconds: float) -> None:
        """Take the CPU time of decoding an image from the budget."""
        with self._lock:
            self._seconds -= seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure this thread's CPU time and take it; raise `TooLarge` if too little is left."""
        self.seconds_left()
        started = time.thread_time()
        try:
            yield
        finally:
            self.spend(time.thread_time() - started)

    def seconds_left(self) -> float:
        """Return the CPU time for the next image; raise `TooLarge` if too little is left."""
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
    """Limits the memory of all images that are being decoded; shared between threads."""

    def __init__(self, limit: int) -> None:
        """Take the limit, in bytes."""
        self._limit = self._left = limit
        self._changed = Condition()

    @contextmanager
    def reserved(self, needed: int) -> Iterator[None]:
        """Reserve `needed` bytes, at most the whole budget; wait until they are free."""
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
