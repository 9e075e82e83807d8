"""How many CPU threads a worker may use just now.

Under load a worker keeps to its own share of the cores, which gave the best throughput. While no
other worker of the server is busy and nobody waits in the queue it takes them all, which gave a
lone client the shortest wait.

Each busy worker holds a lock on one byte of a file that all of them share, and on another one for
as long as it lives; both bytes' place is its process id. The kernel drops a dead worker's locks,
so that nothing is left to clean up.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Where the bytes of the living begin, behind those of the busy: no process id is as large.
_LIVING = 1 << 32


class Cores:
    """The cores of a machine as its workers share them.

    Attributes:
        share: threads that are this worker's at any time, 1 or more.
        all: threads that it may use while it alone is busy, `share` or more.
    """

    def __init__(self, share: int, everything: int, meeting_place: Path) -> None:
        """Opens the shared file.

        Args:
            share: see the class.
            everything: becomes `all`; less than `share` counts as `share`.
            meeting_place: the shared file, made if it is not there; the same for all workers.
        """
        self.share = share
        self.all = max(share, everything)
        self._file = os.open(meeting_place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._position = os.getpid()
        self._crowded = False
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _LIVING + self._position)

    @contextmanager
    def busy(self, *, crowded: bool) -> Iterator[None]:
        """Others see this worker as busy for as long as the context lasts.

        Args:
            crowded: more work is waiting, so that the others will be busy in a moment.
        """
        self._crowded = crowded
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._position)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._position)

    def available(self) -> int:
        """Threads to use for the next piece of work; ask again for each (2 microseconds)."""
        if self.all == self.share:
            return self.share
        # Where more work is waiting, whoever else lives will be busy in a moment.
        return self.all if self._is_only_one(_LIVING if self._crowded else 0) else self.share

    def _is_only_one(self, start: int) -> bool:
        """Whether nobody else holds a byte from there on; what is not this worker's is let go."""
        mine = start + self._position
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, _LIVING, start)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, mine - start, start)
        fcntl.lockf(self._file, fcntl.LOCK_UN, start + _LIVING - mine - 1, mine + 1)
        return True
