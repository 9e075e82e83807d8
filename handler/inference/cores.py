"""Choose how many CPU threads a worker may use at the moment.

Under load a worker keeps to its own share of the cores, which gave the best throughput. While no
other worker of the server is busy and the queue is empty it may use them all, which gave a single
client the lowest latency on most machines. Virtual CPUs can share a core, though, and then more
threads are slower: so a worker tries both on its first images and keeps what was faster.

Each busy worker holds a lock on one byte of a file that all of them share, and on another one for
as long as it lives, both at a place that was free when it started: process ids would not do, since
two containers that share the file can have equal ones. The kernel drops a dead worker's locks, so
that nothing is left to clean up. No lock is ever waited for.
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

# Images that a worker alone tries each number of threads on. Their median is compared, since the
# first ones are slower, and other programs can slow others down.
_TRIALS = 7

# Where the bytes of the living begin, behind those of the busy: more than any machine has workers.
_LIVING = 1 << 16

# `struct flock`, as fcntl(2) has it: kind, whence, start, length, process; on BSDs and macOS start,
# length, process, kind, whence.
_ON_LINUX = sys.platform == "linux"
_FLOCK = "hhqqi4x" if _ON_LINUX else "qqihh"


class Cores:
    """The cores of a machine as its workers share them.

    Attributes:
        share: threads that are this worker's at any time, 1 or more.
        all: threads that it may use while it alone is busy, `share` or more.
    """

    def __init__(self, share: int, everything: int, lock_file: Path) -> None:
        """Open the lock file.

        Args:
            share: see the class.
            everything: becomes `all`; less than `share` counts as `share`.
            lock_file: created if it does not exist; the same for all workers.
        """
        self.share = share
        self.all = max(share, everything)
        self._file = os.open(
            lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        self._position = self._free_position()
        self._queue_not_empty = False
        self._trials: dict[int, list[float]] = {self.share: [], self.all: []}
        self._alone = self.all if len(self._trials) == 1 else 0  # 0 until it is known

    def _free_position(self) -> int:
        """Lock the first position that no living worker holds, and return it."""
        for position in range(_LIVING):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LIVING + position)
            except OSError:
                continue
            return position
        raise OSError(f"{_LIVING} workers share one file")

    @contextmanager
    def busy(self, *, queue_not_empty: bool) -> Iterator[None]:
        """Mark this worker as busy while the context lasts.

        Args:
            queue_not_empty: more work is waiting, so the other workers will be busy soon.
        """
        self._queue_not_empty = queue_not_empty
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._position)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._position)

    def available(self) -> int:
        """Return the threads to use for the next image; a call costs 1 microsecond."""
        if self.all == self.share:
            return self.share
        # If more work is waiting, every other living worker will be busy soon.
        return (
            self.all if self._is_only_one(_LIVING if self._queue_not_empty else 0) else self.share
        )

    @contextmanager
    def threads(self) -> Iterator[int]:
        """Choose the threads for one image, which is computed in this context.

        Yields:
            `share` or `all`. While that is not decided its time is measured.
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

    def _is_only_one(self, start: int) -> bool:
        """Return whether no other process holds a lock from `start` on; acquires none itself."""
        found = fcntl.fcntl(self._file, fcntl.F_GETLK, _request(start, _LIVING))
        return _kind(found) == fcntl.F_UNLCK


def _request(start: int, length: int) -> bytes:
    """Return a `struct flock` that asks for the locks on all of these bytes."""
    if _ON_LINUX:
        return struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    return struct.pack(_FLOCK, start, length, 0, fcntl.F_WRLCK, os.SEEK_SET)


def _kind(answer: bytes) -> int:
    """Return the kind of lock that the kernel found; `F_UNLCK` if there is none."""
    fields = struct.unpack(_FLOCK, answer)
    kind: int = fields[0] if _ON_LINUX else fields[3]
    return kind
