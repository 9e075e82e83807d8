"""Classify many images in several threads."""

import errno
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

from classification_client.client import Client
from classification_client.errors import PassingError, RefusedError, UnavailableError
from classification_client.results import Row

_SERVER_ERROR = 500


def classify_all(
    images: Sequence[Path | bytes], client: Client, at_once: int, take: Callable[[Row], None]
) -> None:
    """Classify images in `at_once` threads; call `take` in the calling thread with each row.

    If `take` raises or is interrupted, no further image is sent, and those in flight are abandoned.
    The row of an image given as bytes has the name "-".

    Raises:
        UnavailableError: the server or the drive with the images is unavailable.
        RefusedError: the server rejects every request, independent of the image.
    """
    waiting: SimpleQueue[Path | bytes] = SimpleQueue()
    for image in images:
        waiting.put(image)
    work = _Work(waiting, client)
    for _ in range(min(at_once, len(images))):
        # Daemon threads, so that a server or a drive that hangs does not keep the program running.
        threading.Thread(target=work.run, daemon=True).start()
    try:
        for _ in images:
            row = work.done.get()
            if isinstance(row, Exception):
                raise row
            take(row)
    finally:
        work.stopped = True


class _Work:
    """The state that the threads share."""

    def __init__(self, waiting: "SimpleQueue[Path | bytes]", client: Client) -> None:
        self._waiting, self._client, self._last_answer = waiting, client, 0.0
        self.done: SimpleQueue[Row | Exception] = SimpleQueue()
        self.stopped = False

    def run(self) -> None:
        try:
            while not self.stopped:
                self.done.put(self._classify(self._waiting.get_nowait()))
        except Empty:
            return
        except Exception as error:
            self.done.put(error)

    def _classify(self, image: Path | bytes) -> Row:
        """Return the result of an image; raise an error that concerns all images."""
        name = "-" if isinstance(image, bytes) else str(image)
        began = time.monotonic()
        try:
            row = Row(name, self._client.classify(image))
        except RefusedError as error:
            if not error.is_about_the_image and error.code < _SERVER_ERROR:
                raise
            row = Row(name, error)
        except (UnavailableError, PassingError) as error:
            row = Row(name, error)
            # If other images succeeded in the second half of the retries, the cause is this image:
            # it crashes the server, or the drive cannot read it.
            others_go_on = self._last_answer > (began + time.monotonic()) / 2
            if not others_go_on and getattr(error, "errno", None) != errno.ENOENT:
                raise UnavailableError(f"{name}: {row.problem}") from error
            return row
        except OSError as error:
            return Row(name, error)
        self._last_answer = time.monotonic()
        return row
