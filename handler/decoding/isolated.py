"""Decode images in a small process whose time and memory the kernel limits.

A decoder in C cannot be stopped from within its own process, and nobody can foresee what memory it
takes. So in the decoder process a kernel timer (ITIMER_PROF, CPU time) kills the process when the
image has used its time, and RLIMIT_DATA refuses memory above the limit. (RLIMIT_CPU counts whole
seconds since the process started, and RLIMIT_AS also counts the shared libraries.) A deadline of
wall time is kept by the worker, which survives in each case and answers that image with an error.

A worker has at most one such process: started when first needed, kept for the next image, stopped
when idle or when the worker is gone.
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock, Timer
from typing import IO, Any

# The process stops after so many seconds without an image.
IDLE_SECONDS = 60

# Wall time for one image: the process sleeps, or the machine is so busy that the request is lost
# anyway (`responseTimeout` is 60 s).
_MAX_WALL_SECONDS = 30.0
# A process that closed its pipes is about to exit.
_MAX_EXIT_SECONDS = 5.0

# What an image that crashes the process costs its request above its own time: the next start.
RESTART_SECONDS = 0.3

# Precedes a message: bytes of its JSON, and of the content after that.
_PREFIX = struct.Struct("<II")

# glibc's allocator in the process: one heap, and large blocks are returned at once.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    "OPENBLAS_NUM_THREADS": "1",
}


class DecoderExitedError(Exception):
    """The process exited on this image.

    Attributes:
        ran_out_of_time: the kernel's timer or the deadline stopped it.
        was_killed: something else sent SIGKILL: the kernel, when the machine has no memory left.
    """

    def __init__(self, signal_number: int, *, overdue: bool) -> None:
        super().__init__(f"the decoder process exited with signal {signal_number}")
        self.signal = signal_number
        self.ran_out_of_time = overdue or signal_number == signal.SIGPROF
        self.was_killed = signal_number == signal.SIGKILL and not overdue


class DecoderProcess:
    """The worker's side; threads may share it, and take turns."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def decode(
        self, task: Mapping[str, Any], pieces: Sequence[bytes | memoryview], seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        """Send one image to the process; return the reply's JSON, with `seconds`, and its bytes.

        Args:
            task: the fields of `handler.decoding.pillow.Task`.
            pieces: the encoded image.
            seconds: of CPU that it may take, above 0.

        Raises:
            DecoderExitedError: the image took too long, or crashed the process otherwise.
        """
        with self._lock:
            for _ in range(2):
                if self._process is not None and self._process.poll() is not None:
                    self._reap(self._process)  # it exited while it was idle
                process = self._process or self._start()
                started = time.monotonic()
                try:
                    with _deadline(process):
                        send(process.stdin, {**task, "limit": seconds}, pieces)
                        return receive(process.stdout)
                except (OSError, EOFError):
                    code = self._reap(process)
                    if code:
                        break
                    # It had been idle for too long.
                except BaseException:
                    # Otherwise the next image would get this reply.
                    process.kill()
                    self._reap(process)
                    raise
            overdue = time.monotonic() - started >= _MAX_WALL_SECONDS
            raise DecoderExitedError(max(0, -code), overdue=overdue)

    def close(self) -> None:
        """Stop the process, if there is one."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._reap(self._process)

    @property
    def pid(self) -> int | None:
        """Return the process's id; None if there is none."""
        return self._process.pid if self._process is not None else None

    def program(self) -> str:
        """Return the process's Python code, which runs `handler.decoding.child`."""
        return (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from handler.decoding.child import main; main()"
        )

    def _start(self) -> subprocess.Popen[bytes]:
        # Isolated from the environment: TorchServe's, and what the archive does at Python's start.
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", self.program()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ALLOCATOR},
        )
        try:
            with _deadline(process):
                receive(process.stdout)
        except EOFError as error:
            code = self._reap(process)
            raise RuntimeError(f"The decoder process cannot start: exit status {code}.") from error
        self._process = process
        return process

    def _reap(self, process: "subprocess.Popen[bytes]") -> int:
        """Return the exit status of a process that closed its pipes or was killed."""
        self._process = None
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            return process.wait(_MAX_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


@contextlib.contextmanager
def _deadline(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Kill the process after the longest wall time, which ends all waiting for its pipes."""
    timer = Timer(_MAX_WALL_SECONDS, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def send(
    target: IO[bytes] | None, message: Mapping[str, Any], pieces: Sequence[bytes | memoryview]
) -> None:
    """Write a message: JSON, and the bytes of all pieces behind it."""
    assert target is not None
    text = json.dumps(message).encode()
    target.write(_PREFIX.pack(len(text), sum(map(len, pieces))) + text)
    for piece in pieces:
        target.write(piece)
    target.flush()


def receive(source: IO[bytes] | None) -> tuple[dict[str, Any], bytes]:
    """Read a message, as `send` writes it; raise `EOFError` if the other side is gone."""
    assert source is not None
    lengths = _PREFIX.unpack(_read(source, _PREFIX.size))
    text, content = (_read(source, length) for length in lengths)
    return json.loads(text), content


def _read(source: IO[bytes], length: int) -> bytes:
    content = source.read(length)
    if len(content) < length:
        raise EOFError
    return content
