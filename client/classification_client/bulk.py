"""Classifies many images in several threads."""

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
    """Classify images in so many threads; `take` is called in this one with each row.

    If it raises or is interrupted, no other image is begun, and nobody waits for those in flight.
    Bytes have a row with the name "-".

    Raises:
        UnavailableError: the server is gone, or the drive with the images.
        RefusedError: the server rejects every request, whatever the image.
    """
    waiting: SimpleQueue[Path | bytes] = SimpleQueue()
    for image in images:
        waiting.put(image)
    work = _Work(waiting, client)
    for _ in range(min(at_once, len(images))):
        # A daemon: a server or a drive that hangs must not keep the program.
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
    """What the threads share."""

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
        """Return the result of an image; raise an error that the others would have too."""
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
            # If others were answered in the second half of the retries, it is this image that the
            # server dies of, or that is on a bad spot of the drive.
            others_go_on = self._last_answer > (began + time.monotonic()) / 2
            if not others_go_on and getattr(error, "errno", None) != errno.ENOENT:
                raise UnavailableError(f"{name}: {row.problem}") from error
            return row
        except OSError as error:
            return Row(name, error)
        self._last_answer = time.monotonic()
        return row
