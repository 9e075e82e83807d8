"""Choose the number of CPU threads that a worker may use for an image.

Under load a worker uses only its share of the cores, which gave the best throughput. While no other
worker of the server is busy and the queue is empty, it may use all cores, which gave a single
client the lowest latency on most machines. If virtual CPUs share a core, more threads are slower,
so a worker measures both on its first images and keeps the faster number.

All workers share a lock file. Each worker holds a lock on one byte while it is busy, and on another
byte for its lifetime. The bytes' positions are the first that were free when it started; process
ids are unsuitable, since two containers that share the file can have equal ones. The kernel
releases the locks of a dead worker. No call blocks on a lock.
"""

import fcntl
import logging
import os
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

logger = logging.getLogger(__name__)

# Images to measure with each number of threads. The medians are compared, since the first images
# are slower and other programs can delay some.
_TRIALS = 7

# Offset of the section for running workers, after the one for busy workers. Each section has this
# many bytes, more than any machine has workers.
_RUNNING = 1 << 16

# `struct flock` of fcntl(2): kind, whence, start, length, process; on BSDs and macOS: start,
# length, process, kind, whence.
_ON_LINUX = sys.platform == "linux"
_FLOCK = "hhqqi4x" if _ON_LINUX else "qqihh"


class Cores:
    """Divides a machine's cores between its workers.

    Attributes:
        share: threads that this worker may always use, 1 or more.
        all: threads that it may use while no other worker is busy, `share` or more.
    """

    def __init__(self, share: int, everything: int, lock_file: Path) -> None:
        """Open the lock file, which is common to all workers; create it if it does not exist."""
        self.share = share
        self.all = max(share, everything)
        self._file = os.open(
            lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        self._position = self._free_position()
        self._queue_not_empty = False
        self._trials: dict[int, list[float]] = {self.share: [], self.all: []}
        self._alone = self.all if len(self._trials) == 1 else 0  # 0 until measured

    def _free_position(self) -> int:
        """Lock the first position that no running worker holds, and return it."""
        for position in range(_RUNNING):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _RUNNING + position)
            except OSError:
                continue
            return position
        raise OSError(f"{_RUNNING} workers share one file")

    @contextmanager
    def busy(self, *, queue_not_empty: bool) -> Iterator[None]:
        """Mark this worker as busy while the context lasts.

        If the queue is not empty, the other workers will be busy soon.
        """
        self._queue_not_empty = queue_not_empty
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._position)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._position)

    def available(self) -> int:
        """Return the number of threads for the next image; a call takes 1 microsecond."""
        # If more requests are waiting, all running workers count as busy.
        section = _RUNNING if self._queue_not_empty else 0
        return self.all if self.all > self.share and self._is_alone(section) else self.share

    @contextmanager
    def threads(self) -> Iterator[int]:
        """Yield the number of threads for the image that is computed in this context.

        During the trials the time in the context is measured.
        """
        threads = self.available()
        if threads == self.share or self._alone:
            yield min(threads, self._alone or threads)
            return
        trial = min(self._trials, key=lambda each: len(self._trials[each]))
        started = time.perf_counter()
        yield trial
        self._trials[trial].append(time.perf_counter() - started)
        if all(len(times) == _TRIALS for times in self._trials.values()):
            medians = {each: median(times) for each, times in self._trials.items()}
            self._alone = min(medians, key=lambda each: medians[each])
            shown = ", ".join(f"{each}: {1000 * t:.1f} ms" for each, t in medians.items())
            logger.info("threads for a single image: %d (%s)", self._alone, shown)

    def _is_alone(self, section: int) -> bool:
        """Return whether no other process holds a lock in the section that begins at this byte."""
        query: tuple[int, ...] = (fcntl.F_WRLCK, os.SEEK_SET, section, _RUNNING, 0)
        if not _ON_LINUX:
            query = (section, _RUNNING, 0, fcntl.F_WRLCK, os.SEEK_SET)
        found = fcntl.fcntl(self._file, fcntl.F_GETLK, struct.pack(_FLOCK, *query))
        kind: int = struct.unpack(_FLOCK, found)[0 if _ON_LINUX else 3]
        return kind == fcntl.F_UNLCK
