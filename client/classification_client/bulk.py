"""Classify many images in several threads."""

import errno
import time
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from classification_client.client import Client
from classification_client.errors import RejectedError, TransientError, UnavailableError
from classification_client.results import Row


def classify_all(
    images: Sequence[Path | bytes], client: Client, at_once: int, take: Callable[[Row], object]
) -> None:
    """Classify images in `at_once` threads; call `take` in the calling thread with each row.

    If `take` raises or is interrupted, no further image is sent, and those in flight are abandoned.
    The row of an image given as bytes has the name "-".

    Raises:
        UnavailableError: the server or the drive with the images is unavailable.
        RejectedError: the server rejects every request, independent of the image.
    """
    # Its threads are daemons: a server or a drive that hangs does not keep the program running.
    with ThreadPool(max(1, min(at_once, len(images)))) as pool:
        for row in pool.imap_unordered(_Classifier(client).row, images):
            take(row)


class _Classifier:
    """Classifies one image per call; the threads share the time of the last success."""

    def __init__(self, client: Client) -> None:
        self._client, self._last_success = client, 0.0

    def row(self, image: Path | bytes) -> Row:
        """Return the result of an image; raise an error that concerns all images."""
        name = "-" if isinstance(image, bytes) else str(image)
        began = time.monotonic()
        try:
            row = Row(name, self._client.classify(image))
        except RejectedError as error:
            if error.is_permanent and not error.is_about_the_image:
                raise
            row = Row(name, error)
        except (UnavailableError, TransientError) as error:
            row = Row(name, error)
            # If other images succeeded in the second half of the retries, the cause is this image:
            # it crashes the server, or the drive cannot read it.
            others_succeed = self._last_success > (began + time.monotonic()) / 2
            if not others_succeed and getattr(error, "errno", None) != errno.ENOENT:
                message = f"{name}: {row.problem}"
                raise UnavailableError(message, is_permanent=error.is_permanent) from error
            return row
        except OSError as error:
            return Row(name, error)
        self._last_success = time.monotonic()
        return row
